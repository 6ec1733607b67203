"""LoRA weights as updates of linear layers, read as diffusers and peft read them.

An adapter adds ``s B A`` to a layer's weight. Here s is multiplied into B, so that adapters of any
rank and scale are alike.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from moa_diffusion.files.digests import file_digest, json_digest
from moa_diffusion.policies.language_model import read_config
from moa_diffusion.policies.lora_files import CONFIG, LoraFile, damaged, read_lora_file
from moa_diffusion.types import ConfigError

logger = logging.getLogger(__name__)

_NAME = "read"  # the adapter's name while diffusers or peft interprets the file
_PREFIX = "transformer"  # diffusers puts it before the names of layers
_PEFT_PREFIX = "base_model.model."
# Starts of A and B that leave the base model's weights as they are; the others change them.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# Options that make more of a layer, or of the model, than ``W + s B A``.
_FURTHER = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "target_parameters"),
    *("trainable_token_indices", "layer_replication", "alora_invocation_tokens"),
    *("arrow_config", "monteclora_config", "velora_config", "kasa_config"),
)
# What peft takes unseen, and fails at in the middle of a model.
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "r": ((int,), "a whole number"),
    "lora_alpha": ((int, float), "a number"),
    "target_modules": ((list, str, NoneType), "a list of names or a pattern"),
    "rank_pattern": ((dict,), "a mapping"),
    "alpha_pattern": ((dict,), "a mapping"),
}
# What peft and diffusers raise for settings and weights that do not belong together.
_REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, re.error)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """Updates ``B A`` by the name of the linear layer in the model."""

    layers: Mapping[str, tuple[Tensor, Tensor]]  # A [rank, in] and B [out, rank], float32, CPU
    digest: str  # SHA-256 of what is read, or of what a soup is made of

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(len(a) for a, _ in self.layers.values())


def sd3_skeleton(path: str, *, revision: str | None = None, config: Any = None) -> Any:
    """Return the transformer of a pipeline without its weights.

    Args:
        path: Folder or hub id of a pipeline.
        revision: The revision of a hub id.
        config: The configuration of the transformer, if it need not be read.
    """
    from diffusers import SD3Transformer2DModel

    if config is None:
        config = SD3Transformer2DModel.load_config(path, subfolder="transformer", revision=revision)
    with torch.device("meta"):
        return SD3Transformer2DModel.from_config(config)


def text_skeleton(path: str, *, revision: str | None = None) -> Any:
    """Return a causal language model without its weights.

    Args:
        path: Folder or hub id.
        revision: The revision of a hub id.

    Raises:
        ConfigError: If there is none.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(read_config(path, revision=revision))


def read_sd3_adapter(place: Path, transformer: Any, *, tell: bool = True) -> Adapter:
    """Read LoRA weights as ``StableDiffusion3Pipeline.load_lora_weights`` or peft would.

    Args:
        place: Folder or file of LoRA weights; see ``lora_files``.
        transformer: An ``sd3_skeleton`` of the base model, which the weights are fitted to; as it
            was afterwards.
        tell: Whether to warn of layers that the file leaves out.

    Raises:
        ConfigError: If the file is missing, damaged or foreign, or does not fit the base model.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    file = read_lora_file(place, (f"{_PREFIX}.", _PEFT_PREFIX), of=_PREFIX)
    if file.config is not None:
        settings = peft_config(file.config)
        if settings.target_modules is None:
            raise ConfigError(
                f"`{file.config}` should name the adapted layers in `target_modules`: peft has no "
                "default for this model. Found null."
            )
        return _fit_peft(file, settings, transformer, tell)
    path, state = file.path, dict(file.state)
    config = _metadata(file)
    if not any(".lora_A." in name for name in state):
        state = convert_unet_state_dict_to_peft(state)
    _check_layers(path, state, transformer)
    model = copy.deepcopy(transformer)  # without its weights; what fails may leave half an adapter
    try:
        with _without_log():
            model.load_lora_adapter(
                {f"{_PREFIX}.{name}": tensor.to("meta") for name, tensor in state.items()},
                prefix=_PREFIX,
                adapter_name=_NAME,
                metadata=config,
                low_cpu_mem_usage=True,
            )
    except _REFUSALS as error:
        raise _refused(path, error) from error
    return Adapter(layers=fitted(path, state, model, _NAME), digest=file_digest(path))


def _metadata(file: LoraFile) -> dict[str, Any] | None:
    """Return what diffusers wrote of the LoRA's settings beside its tensors; None if it did not."""
    key, where = f"{_PREFIX}.target_modules", f"LoRA weights `{file.path}` have damaged metadata"
    try:
        config = json.loads(file.metadata.get("lora_adapter_metadata", "null"))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    if config is not None and not (isinstance(config, dict) and config.get(key)):
        raise ConfigError(f"{where}: they should name `{key}`. Found {config!r}.")
    return config


@contextmanager
def _without_log() -> Iterator[None]:
    """Hide the errors that diffusers logs before it raises them."""
    log = logging.getLogger("diffusers.loaders.peft")

    def milder(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    log.addFilter(milder)
    try:
        yield
    finally:
        log.removeFilter(milder)


def read_text_adapter(
    place: Path, model: Any, base: str | None = None, *, tell: bool = True
) -> Adapter:
    """Read LoRA weights of a language model as ``PeftModel.from_pretrained`` would.

    That it belongs to another base model is noticed by shapes and, where the folder names one, by
    the last part of the name.

    Args:
        place: Folder of ``adapter_config.json`` and ``adapter_model.safetensors``, or that file.
        model: A ``text_skeleton`` of the base model, which peft fits the weights to; as it was
            afterwards.
        base: Folder or hub id of the base model; None for no comparison of names.
        tell: Whether to warn of layers that the file leaves out.

    Raises:
        ConfigError: If a file is missing, damaged or foreign, is no plain LoRA, or does not fit
            the base model.
    """
    folder = place.parent if place.is_file() else place
    if (folder / CONFIG).is_file():
        config = peft_config(folder / CONFIG)
        named = config.base_model_name_or_path
        if base is not None and named and Path(named).name != Path(base).name:
            raise ConfigError(
                f"LoRA weights `{folder}` should be of the base model {base!r}. Found those of "
                f"{named!r} ({CONFIG}); where that is another name of the same model, take it out."
            )
    file = read_lora_file(place, (_PEFT_PREFIX,), of="model")
    if file.config is None:
        raise ConfigError(
            f"LoRA weights `{file.path}` should be of a language model, as peft writes them. Found "
            f"`{next(iter(file.state))}` and no {CONFIG} beside it."
        )
    return _fit_peft(file, peft_config(file.config), model, tell)


def _fit_peft(file: LoraFile, config: Any, model: Any, tell: bool) -> Adapter:
    from peft import LoraModel

    zero = config.init_lora_weights is not False  # the B of a layer that the file leaves out
    config.init_lora_weights = False  # reading it draws nothing
    model = copy.deepcopy(model)  # without its weights; what fails may leave half an adapter
    try:
        with torch.device("meta"):
            LoraModel(model, {_NAME: config}, _NAME)
    except _REFUSALS as error:
        raise _refused(file.path, error) from error
    for place, layer in _adapted(model).items():
        a = file.state.get(f"{place}.lora_A.weight")
        if a is not None and len(a) != layer.r[_NAME]:
            raise ConfigError(
                f"LoRA weights `{file.path}` should have the rank of {CONFIG}, {layer.r[_NAME]} in "
                f"layer {place}. Found A {_shape(a)}."
            )
    layers = fitted(file.path, file.state, model, _NAME, whole=not zero, tell=tell)
    scales = {name: model.get_submodule(name).scaling[_NAME] for name in layers}
    return Adapter(layers=layers, digest=json_digest([file_digest(file.path), scales]))


def _refused(path: Path, error: Exception) -> ConfigError:
    message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return ConfigError(f"LoRA weights `{path}` do not fit the base model: {message}")


def peft_config(path: Path) -> Any:
    """Return peft's settings of a plain LoRA.

    Args:
        path: The path of ``adapter_config.json``.

    Raises:
        ConfigError: If it is missing or damaged, or of more than a plain LoRA.
    """
    from peft import LoraConfig, PeftConfig

    if not path.is_file():
        raise ConfigError(
            f"`{path.parent}` should be a folder that peft wrote. Found no {CONFIG} in it."
        )
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(path, error, f"`{path}` is damaged") from error
    if not isinstance(written, dict):
        raise ConfigError(f"`{path}` should be a mapping of settings. Found {written!r}.")
    if written.get("peft_type") != "LORA":
        raise ConfigError(
            f"`{path}` should be of a LoRA. Found peft_type {written.get('peft_type')}."
        )
    for name, (kinds, expected) in _KINDS.items():
        if name in written and not isinstance(written[name], kinds):
            raise ConfigError(f"`{path}`: {name} should be {expected}. Found {written[name]!r}.")
    try:
        config = PeftConfig.from_pretrained(str(path.parent))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"`{path}` is damaged ({type(error).__name__}: {error}).") from error
    assert isinstance(config, LoraConfig)
    if not math.isfinite(config.lora_alpha):
        raise ConfigError(f"`{path}`: lora_alpha should be finite. Found {config.lora_alpha}.")
    further = [name for name in _FURTHER if vars(config).get(name)]
    if config.bias != "none":
        further.append("bias")
    if config.init_lora_weights not in _STARTS:
        further.append(f"init_lora_weights {config.init_lora_weights!r}")
    if further:
        raise ConfigError(
            f"`{path}` should be of a plain LoRA, which adds B A to linear layers alone. Found "
            f"{', '.join(further)}."
        )
    return config


def fitted(
    path: Path,
    state: Mapping[str, Tensor],
    model: Any,
    name: str,
    *,
    whole: bool = True,
    tell: bool = True,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the layers of an ``Adapter``, whose scales are those of the adapted model.

    Args:
        path: The path of the weights, for messages.
        state: All tensors of the adapter.
        model: Carries the adapter, with any values.
        name: The name of the adapter.
        whole: Whether every adapted layer should have tensors; else those without are left out, as
            their B is zero.
        tell: Whether to warn of those that are left out.

    Raises:
        ConfigError: If a layer lacks its tensors, their shapes do not fit, or more is left.
    """
    layers, left_out = {}, []
    for place, layer in _adapted(model).items():
        a, b = (state.get(f"{place}.lora_{part}.weight") for part in "AB")
        if a is None and b is None and not whole:
            left_out.append(place)
            continue
        shape = (layer.out_features, layer.in_features)
        if a is None or b is None or not _fits(shape, a, b):
            raise _misfit(path, place, shape, a, b)
        layers[place] = (a.float(), b.float() * layer.scaling[name])
    known = {f"{place}.lora_{part}.weight" for place in layers for part in "AB"}
    if unknown := sorted(state.keys() - known):
        raise _unknown(path, unknown)
    if left_out and tell:
        logger.warning(
            "LoRA weights `%s` have none for %d of the %d layers that their configuration names, "
            "first %s: these stay as in the base model.",
            *(path, len(left_out), len(left_out) + len(layers), left_out[0]),
        )
    return layers


def _check_layers(path: Path, state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Check what diffusers would refuse at greater length, or not at all."""
    modules = dict(model.named_modules())
    named = {name: re.fullmatch(r"(.+)\.lora_[AB]\.weight", name) for name in state}
    places = {name: located[1] for name, located in named.items() if located is not None}
    unknown = [n for n in state if not isinstance(modules.get(places.get(n, "")), nn.Linear)]
    if unknown:
        raise _unknown(path, unknown)
    for place in dict.fromkeys(places.values()):
        layer = modules[place]
        a, b = (state.get(f"{place}.lora_{part}.weight") for part in "AB")
        shape = (layer.out_features, layer.in_features)
        if a is None or b is None or not _fits(shape, a, b):
            raise _misfit(path, place, shape, a, b)


def _fits(shape: tuple[int, int], a: Tensor, b: Tensor) -> bool:
    """Return whether A ``[rank, in]`` and B ``[out, rank]`` update a weight ``[out, in]``."""
    plain = a.ndim == b.ndim == 2
    return plain and (len(b), a.shape[1]) == shape and len(a) == b.shape[1] > 0


def _unknown(path: Path, names: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"LoRA weights `{path}` should be updates of the base model's linear layers, A and B. "
        f"Found `{names[0]}`{f' and {len(names) - 1} more' if names[1:] else ''}."
    )


def _misfit(
    path: Path, place: str, shape: tuple[int, int], a: Tensor | None, b: Tensor | None
) -> ConfigError:
    other = ""
    if a is not None and b is not None and a.ndim == b.ndim == 2 and len(a) == b.shape[1]:
        if (actual := (len(b), a.shape[1])) != shape:
            other = f", of another base model, where it is {actual}"
    elif (a is None) != (b is None):
        other = ": the file is incomplete"
    return ConfigError(
        f"LoRA weights `{path}` do not fit the base model: layer {place} is {shape}. "
        f"Found B {_shape(b)} and A {_shape(a)}{other}."
    )


def _adapted(model: Any) -> dict[str, Any]:
    """Return the adapted layers by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, BaseTunerLayer)}


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)
