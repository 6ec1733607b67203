"""A method's name and options to its normalizer and weighting."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from moa_diffusion.assembly.construct import construct
from moa_diffusion.config import Config
from moa_diffusion.config.presets import forward_rules
from moa_diffusion.objectives.apex import Apex
from moa_diffusion.objectives.base import Normalizer, Weighting
from moa_diffusion.objectives.chebyshev import Chebyshev
from moa_diffusion.objectives.gradient import Gradient
from moa_diffusion.objectives.mopo import Mopo
from moa_diffusion.objectives.noon import Noon
from moa_diffusion.objectives.normalize import GDPO, DualStage, PromptHistory, Raw
from moa_diffusion.objectives.pama import Pama, PamaVector
from moa_diffusion.objectives.static import Static
from moa_diffusion.objectives.win_rate import WinRate
from moa_diffusion.policies.samplers import SAMPLERS, StochasticSampler
from moa_diffusion.storage import calibration_file
from moa_diffusion.types import ConfigError
from rewards.source import source_of
from rewards.suggestions import did_you_mean
from rewards.targets import import_object

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A name's normalizer and weighting; ``options`` are the weighting's, fixed by the name."""

    normalizer: type[Normalizer]
    weighting: type[Weighting]
    options: Mapping[str, Any] = field(default_factory=dict)


def _torchjd(name: str, **options: Any) -> Method:
    fixed = {"aggregator": name} | ({"options": options} if options else {})
    return Method(normalizer=DualStage, weighting=Gradient, options=fixed)


METHODS = {
    "static": Method(normalizer=Raw, weighting=Static),
    "gdpo": Method(normalizer=GDPO, weighting=Static),
    "dual_stage": Method(normalizer=DualStage, weighting=Static),
    "ddpo": Method(normalizer=PromptHistory, weighting=Static),
    "apex": Method(normalizer=DualStage, weighting=Apex),
    "pama": Method(normalizer=Noon, weighting=Pama),
    "pama_vector": Method(normalizer=Noon, weighting=PamaVector),
    "mopo": Method(normalizer=WinRate, weighting=Mopo),
    "chebyshev": Method(normalizer=DualStage, weighting=Chebyshev),
    "upgrad": _torchjd("upgrad"),
    "mgda": _torchjd("mgda"),
    "pcgrad": _torchjd("pcgrad"),
    "cagrad": _torchjd("cagrad", c=0.5),  # TorchJD has no default; any value in [0, 1) converges
    "gradient": Method(normalizer=DualStage, weighting=Gradient),
}


def method_of(settings: Config) -> Method:
    """Return the normalizer and the weighting that are chosen, by name or import path.

    Raises:
        ConfigError: For a name that is not known, or a path that does not lead to such a class.
    """
    name, options = settings.objectives.method, settings.objectives.normalizer
    if name in METHODS:
        method = METHODS[name]
    elif ":" in name:
        weighting = _imported("objectives.method", name, "weighting", Weighting)  # type: ignore[type-abstract]
        method = Method(normalizer=DualStage, weighting=weighting)
    else:
        raise ConfigError(
            f"objectives.method: unknown method {name!r}.{did_you_mean(name, METHODS)} "
            f"Known: {', '.join(METHODS)}; or an import path such as my_module:MyWeighting."
        )
    if "path" in options:
        key = "objectives.normalizer.path"
        normalizer = _imported(key, options["path"], "normalizer", Normalizer)  # type: ignore[type-abstract]
        method = dataclasses.replace(method, normalizer=normalizer)
    return method


def sampler_of(settings: Config) -> StochasticSampler:
    """Return the stochastic step that is chosen, by name or import path.

    Raises:
        ConfigError: For a path that does not lead to a function.
    """
    name = settings.sampling.sampler
    if name in SAMPLERS:
        return SAMPLERS[name]
    sampler: StochasticSampler = _import("sampling.sampler", name, "sampler")
    if not callable(sampler) or isinstance(sampler, type):
        raise ConfigError(
            f"sampling.sampler: should name a function, see StochasticSampler of "
            f"moa_diffusion.policies.samplers. Found {sampler!r}."
        )
    return sampler


def own_code(settings: Config) -> dict[str, Any]:
    """Return module, name and file digest of the user's own code, by dotted key."""
    method, chosen = method_of(settings), settings.objectives
    own: dict[str, Any] = {}
    if chosen.method not in METHODS:
        own["objectives.method"] = source_of(method.weighting)
    if "path" in chosen.normalizer:
        own["objectives.normalizer.path"] = source_of(method.normalizer)
    if settings.sampling.sampler not in SAMPLERS:
        own["sampling.sampler"] = source_of(sampler_of(settings))
    return own


def _import(key: str, path: Any, kind: str) -> Any:
    if not isinstance(path, str):
        raise ConfigError(f"{key}: should be text. Found {path!r}.")
    try:
        return import_object(path, kind)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def _imported(key: str, path: Any, kind: str, base: type[T]) -> type[T]:
    target = _import(key, path, kind)
    if not isinstance(target, type) or not issubclass(target, base):
        raise ConfigError(
            f"{key}: should name a subclass of {base.__module__}.{base.__name__}. Found {target!r}."
        )
    return target


def objectives(settings: Config) -> tuple[Normalizer, Weighting]:
    """Return the method's two parts.

    Raises:
        ConfigError: For an unknown method or option, or an option's bad value.
    """
    method, chosen, names = settings.objectives.method, method_of(settings), tuple(settings.rewards)
    own = settings.objectives.normalizer
    normalizer = construct(
        chosen.normalizer,
        "objectives.normalizer",
        {option: value for option, value in own.items() if option != "path"},
        {"objectives": names},
    )
    weights = [float(options.get("weight", 1.0)) for options in settings.rewards.values()]
    fixed = {"objectives": names, **chosen.options}
    if "weights" in inspect.signature(chosen.weighting).parameters:
        fixed["weights"] = weights
    else:
        for name, weight in zip(names, weights, strict=True):
            if weight != 1:
                logger.warning(
                    "objectives.method %s finds its own weights: rewards.%s.weight = %g is not "
                    "used.",
                    *(method, name, weight),
                )
    if len(names) == 1 and not issubclass(chosen.weighting, Static):
        logger.warning("objectives.method %s has a single reward to weigh.", method)
    options = weighting_options(settings)
    weighting = construct(chosen.weighting, "objectives.weighting", options, fixed)
    _check_penalties(settings, normalizer, weighting)
    return normalizer, weighting


def weighting_options(settings: Config) -> dict[str, Any]:
    """Return the weighting's options, with those that a calibration file supplies.

    Raises:
        ConfigError: If the file cannot be used, or lacks an objective.
    """
    options = dict(settings.objectives.weighting)
    if settings.objectives.calibration is not None:
        accepted = inspect.signature(method_of(settings).weighting).parameters
        path, names = Path(settings.objectives.calibration), tuple(settings.rewards)
        for key, values in _calibrated(path, names, accepted, options).items():
            given = {} if options.get(key) is None else options[key]
            if isinstance(given, Mapping):  # not one number for all
                options[key] = {**values, **given}
    return options


def _calibrated(
    path: Path, names: Sequence[str], accepted: Container[str], options: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Return options that a calibration file supplies: base levels, levels to reach, bounds.

    Raises:
        ConfigError: If the file cannot be used, or lacks an objective.
    """
    measured = calibration_file.load(path).objectives
    for name in names:
        if name not in measured:
            raise ConfigError(
                f"objectives.calibration: `{path}` should have the objective {name!r}. "
                f"Found {', '.join(measured)}."
            )
    base = {n: measured[n].base for n in names if math.isfinite(measured[n].base)}
    # A reward without any spread has nothing to aim at.
    target = {n: measured[n].target for n in base if measured[n].target > measured[n].base}
    secondary = [name for name in base if name != (options.get("primary") or names[0])]
    in_units = options.get("units") == "reward"
    bounds = {n: measured[n].base if in_units else measured[n].bound for n in secondary}
    levels = {"base": base, "targets": target, "ideal": target, "bounds": bounds}
    used = {option: values for option, values in levels.items() if option in accepted}
    if not used:
        logger.warning("objectives.calibration: this method does not use it.")
    return used


def is_fused(settings: Config, weighting: Weighting) -> bool:
    """Return whether weights are solved at every optimizer step, instead of once per rollout.

    Raises:
        ConfigError: If they cannot be in the way that the configuration asks for.
    """
    mode = settings.gradients.mode
    if mode == "fused" and not weighting.from_gramian_alone:
        raise ConfigError(
            f"gradients.mode: should be probe or auto for the method {settings.objectives.method}, "
            "whose weights depend on more than the gradients. Found 'fused'."
        )
    return mode != "probe" and weighting.from_gramian_alone


def _check_penalties(settings: Config, normalizer: Normalizer, weighting: Weighting) -> None:
    """Check that losses that are weighted already have the unit of the advantages they meet."""
    loss, keeps_unit = settings.loss, type(normalizer).kl_scale is not Normalizer.kl_scale
    penalties = {"loss.norm_weight": loss.norm_weight}
    if loss.kind == "forward":
        copies = forward_rules(loss.forward).copies
        penalties |= {f"loss.forward.{name}.weight": copy.weight for name, copy in copies.items()}
    for key, weight in penalties.items():
        if weight and keeps_unit and is_fused(settings, weighting):
            raise ConfigError(
                f"{key}: should be 0 where the normalizer {type(normalizer).__name__} keeps the "
                "unit of the rewards and weights are solved at every optimizer step: it has the "
                f"unit of normalized advantages. Found {weight:g}. Or set gradients.mode: probe."
            )


def check_ppo(settings: Config) -> None:
    """Check that the method can weigh decisions, if there are value heads.

    Raises:
        ConfigError: If the method's normalizer or weighting works on whole samples alone.
    """
    if settings.loss.kind == "ppo" and not _weighs_decisions(method_of(settings)):
        fitting = [name for name, method in METHODS.items() if _weighs_decisions(method)]
        raise ConfigError(
            f"loss.kind: should be grpo for the method {settings.objectives.method}, which looks "
            f"at rewards of whole samples or at gradients. Found 'ppo', with which "
            f"{', '.join(fitting)} work."
        )


def _weighs_decisions(method: Method) -> bool:
    return issubclass(method.weighting, (Static, Pama, PamaVector)) and issubclass(
        method.normalizer, (Raw, GDPO, DualStage, Noon)
    )
