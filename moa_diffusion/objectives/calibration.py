"""What rewards look like before training: scale, noise, saturation, conflict, and who would win.

Pure statistics of rewards that samples got before training, and the file that keeps them. Within
and between prompts are the components of a one-way random-effects model ``r_gi = m + b_g + e_gi``
with unbiased estimates, so that they do not depend on the number of images per prompt. Training
normalises inside a group, so the spread *within* is what an objective has to say; the spread
*between* is how much prompts differ in difficulty.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa_diffusion.files.writing import write_text
from moa_diffusion.objectives.base import Normalizer, variance_share
from moa_diffusion.objectives.normalize import (
    GDPO,
    RESIDUE,
    DualStage,
    Raw,
    group_centred,
    group_moments,
    spread_within,
)
from moa_diffusion.types import ConfigError, RewardMatrix

VERSION = 1
HIJACK = 0.8  # share of the advantage's variance above which one objective decides alone


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveCalibration:
    """One objective before training. "Unit" is the reward's own; NaN is "not known"."""

    mean: float  # of the samples to which it applies; unit
    std_total: float  # of these samples; unit
    std_within: float  # within groups, pooled and unbiased: the unit of gains; unit
    std_between: float  # of prompts' expected rewards: group means less their noise; unit
    min: float  # unit
    max: float  # unit
    at_min: float  # share of the samples at exactly the minimum; large if saturated
    at_max: float  # likewise
    applies: float  # share of the prompts to which it applies
    zero_variance: float  # share of these prompts whose group has no spread (no signal)
    retest_std: float  # of the noise in one score: spread of two scorings' difference / sqrt 2
    milliseconds: float  # to score one sample
    share_static: float  # of the variance of the weighted sum of raw rewards
    share_gdpo: float  # the same after GDPO's stage 1, equal weights
    share_dual_stage: float  # the same after dual-stage's stage 1, equal weights
    base: float  # proposal for APEX: where progress starts; unit
    target: float  # proposal for APEX: base plus one spread within; unit
    bound: float  # proposal for MOPO: win rate against the base model; `mean` is it in the unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """K objectives on samples of the model that training starts from."""

    model: str  # folder or hub id, with the adapter if there is one
    prompts: int  # P
    images: int  # per prompt
    seed: int
    objectives: Mapping[str, ObjectiveCalibration]
    correlations: tuple[tuple[float, ...], ...]  # [K, K], of values centred within their group

    def hijacker(self) -> str | None:
        """The objective that alone decides a weighted sum of raw rewards, if there is one.

        None as well where fewer than two objectives apply: there is nothing to take over.
        """
        rivals = [name for name, found in self.objectives.items() if found.applies > 0]
        if len(rivals) < 2:
            return None
        first = max(rivals, key=lambda name: self.objectives[name].share_static)
        return first if self.objectives[first].share_static > HIJACK else None


def calibrate(
    rewards: RewardMatrix,
    *,
    retest: Tensor,
    weights: Sequence[float],
    milliseconds: Sequence[float],
    model: str,
    seed: int,
) -> Calibration:
    """Statistics of each objective, of each pair, and what three recipes would make of them.

    The proposals need no knowledge of a reward's scale, and are our choice: APEX's base is the
    mean, its target the mean plus one standard deviation within groups; MOPO's bound is a win
    rate of 0.5, "no worse than the base model".

    Args:
        rewards: raw rewards ``[K, N]`` of samples drawn before training.
        retest: ``[K, N]``, the same samples scored a second time.
        weights: K weights of the weighted sum of raw rewards.
        milliseconds: K durations of scoring one sample.
        model: folder or hub id, with the adapter that training starts from, if there is one.
        seed: of the samples.

    Raises:
        ValueError: if there is no sample, or a length or shape does not fit ``rewards``.
    """
    if not rewards.values.numel():
        raise ValueError("Parameter `rewards` should hold at least one sample. Found none.")
    if retest.shape != rewards.values.shape:
        raise ValueError(
            f"Parameter `retest` should have the shape {tuple(rewards.values.shape)} of the "
            f"rewards. Found {tuple(retest.shape)}."
        )
    for name, given in (("weights", weights), ("milliseconds", milliseconds)):
        if len(given) != len(rewards.names):
            raise ValueError(
                f"Parameter `{name}` should have one entry per objective {rewards.names}. "
                f"Found {len(given)} entries."
            )
    shares = advantage_shares(rewards, weights)
    objectives = {}
    for k, name in enumerate(rewards.names):
        found = describe(rewards.values[k], rewards.groups)
        difference = rewards.values[k] - retest[k].to(rewards.values)
        objectives[name] = ObjectiveCalibration(
            **found,
            **{f"share_{recipe}": float(share[k]) for recipe, share in shares.items()},
            retest_std=_std(difference[~difference.isnan()]) / math.sqrt(2),
            milliseconds=float(milliseconds[k]),
            base=found["mean"],
            target=found["mean"] + found["std_within"],
            bound=0.5,
        )
    _, siblings = torch.unique(rewards.groups, return_counts=True)  # [P]
    return Calibration(
        model=model,
        prompts=len(siblings),
        images=int(siblings.max()),
        seed=seed,
        objectives=objectives,
        correlations=tuple(tuple(row) for row in correlations(rewards).tolist()),
    )


def describe(values: Tensor, groups: Tensor) -> dict[str, float]:
    """Location, spread and saturation of one objective.

    With ``n_g`` samples in each of P groups, ``m_g`` their mean, ``std_within`` from
    ``spread_within``::

        std_between^2 = max(0, var_g(m_g) - std_within^2 mean_g(1 / n_g))

    Args:
        values: ``[N]`` float64, NaN where the objective does not apply.
        groups: ``[N]`` int64, any ids.

    Returns:
        the fields ``mean`` to ``zero_variance`` of ``ObjectiveCalibration``.
    """
    known = ~values.isnan()
    asked = len(groups.unique())
    values, groups = values[known], groups[known]
    if not len(values):
        names = ("mean", "std_total", "std_within", "std_between", "min", "max")
        unknown = (*names, "at_min", "at_max", "zero_variance")
        return dict.fromkeys(unknown, math.nan) | {"applies": 0.0}
    m, s, n = (moment[0] for moment in group_moments(values[None], groups))  # each [N]
    # A sum over samples of x / n is a sum over groups of x.
    count = float((1 / n).sum())  # P
    within = float(spread_within(values[None], groups))
    grand = (m / n).sum() / count
    spread = float(((m - grand).square() / n).sum() / (count - 1)) if count > 1 else math.nan
    if spread <= (RESIDUE * float(values.abs().max())) ** 2:
        spread = 0.0  # only rounding
    between = spread - within**2 * float((1 / n.square()).sum()) / count
    low, high = values.min(), values.max()
    return {
        "mean": float(values.mean()),
        "std_total": _std(values),
        "std_within": within,
        "std_between": between if math.isnan(between) else math.sqrt(max(0.0, between)),
        "min": float(low),
        "max": float(high),
        "at_min": float((values == low).double().mean()),
        "at_max": float((values == high).double().mean()),
        "applies": count / asked,
        "zero_variance": float(((s == 0) / n).sum() / count),
    }


def correlations(rewards: RewardMatrix) -> Tensor:
    """Pearson correlation of the values centred within their group: ``[K, K]``.

    Each pair is centred and compared on the samples to which both apply; NaN if one of the two
    does not vary there.
    """
    size = len(rewards.names)
    found = torch.full((size, size), torch.nan, dtype=torch.float64)
    for j in range(size):
        for k in range(j, size):
            pair = rewards.values[[j, k]]
            both = torch.where(pair.isnan().any(0), torch.nan, pair)  # [2, N]
            a, b = group_centred(_matrix(both, rewards))[0]
            scale = (a.square().sum() * b.square().sum()).sqrt()
            if scale > 0:
                found[j, k] = found[k, j] = ((a * b).sum() / scale).clamp(-1, 1)
    return found


def advantage_shares(rewards: RewardMatrix, weights: Sequence[float]) -> dict[str, Tensor]:
    """Each objective's share ``[K]`` of the variance that decides the gradient, by recipe.

    ``static`` is the weighted sum of raw rewards with ``weights``; ``gdpo`` and ``dual_stage`` have
    equal weights and their default options.
    """
    applies = ~rewards.values.isnan()
    given = torch.tensor(list(weights), dtype=torch.float64)
    equal = torch.ones_like(given)
    recipes: dict[str, tuple[Normalizer, Tensor]] = {
        "static": (Raw(rewards.names), given),
        "gdpo": (GDPO(rewards.names), equal),
        "dual_stage": (DualStage(rewards.names), equal),
    }
    return {
        name: variance_share(normalizer.per_objective(rewards), chosen, applies)
        for name, (normalizer, chosen) in recipes.items()
    }


def save(calibration: Calibration, path: str | Path) -> None:
    """Write JSON that ``load`` reads back, NaN as null; a reader never sees half a file."""
    path = Path(path)
    values = {
        "version": VERSION,
        "model": calibration.model,
        "prompts": calibration.prompts,
        "images": calibration.images,
        "seed": calibration.seed,
        "objectives": {
            name: {key: _nullable(value) for key, value in asdict(found).items()}
            for name, found in calibration.objectives.items()
        },
        "correlations": {
            "names": list(calibration.objectives),
            "values": [[_nullable(value) for value in row] for row in calibration.correlations],
        },
    }
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def load(path: str | Path, objectives: Iterable[str] = ()) -> Calibration:
    """Read a file that ``save`` wrote.

    Args:
        path: the JSON file.
        objectives: names that it has to hold.

    Raises:
        ConfigError: naming the file, the key, what was expected, and what was found.
    """
    path = Path(path)
    where = f"Calibration file `{path}`"
    if not path.is_file():
        raise ConfigError(
            f"{where} should be what scripts/calibrate.py wrote. "
            f"Found no such file (looked from {Path.cwd()})."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ConfigError(f"{where} should be JSON. Found: {error}.") from error
    if isinstance(values, dict) and values.get("version") != VERSION:
        found = repr(values["version"]) if "version" in values else "none"
        raise ConfigError(f"{where}: `version` should be {VERSION}. Found {found}.")
    keys = ("version", "model", "prompts", "images", "seed", "objectives", "correlations")
    values = _mapping(where, values, keys)
    for key, kind in {"model": str, "prompts": int, "images": int, "seed": int}.items():
        if type(values[key]) is not kind:
            raise ConfigError(
                f"{where}: `{key}` should be of type {kind.__name__}. Found {values[key]!r}."
            )
    rows = _mapping(f"{where}: `objectives`", values["objectives"])
    for name in objectives:
        if name not in rows:
            raise ConfigError(
                f"{where}: `objectives` should hold {name!r}, which this run has. "
                f"Found {', '.join(rows) or 'none'}. Calibrate again with the run's rewards."
            )
    fields_of = [field.name for field in fields(ObjectiveCalibration)]
    return Calibration(
        **{key: values[key] for key in ("model", "prompts", "images", "seed")},
        objectives={
            name: ObjectiveCalibration(
                **{
                    key: _number(f"{where}: `objectives.{name}.{key}`", value)
                    for key, value in _mapping(
                        f"{where}: `objectives.{name}`", row, fields_of
                    ).items()
                }
            )
            for name, row in rows.items()
        },
        correlations=_square(f"{where}: `correlations", values["correlations"], list(rows)),
    )


def _mapping(where: str, values: Any, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """The mapping itself, if it is one and has exactly these keys."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} should hold a mapping. Found {values!r}.")
    for key in keys or ():
        if key not in values:
            raise ConfigError(
                f"{where} should have the key `{key}`. Found {', '.join(values) or 'none'}."
            )
    for key in values:
        if keys is not None and key not in keys:
            raise ConfigError(f"{where} should have the keys {', '.join(keys)}. Found `{key}`.")
    return values


def _number(where: str, value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{where} should be a finite number or null. Found {value!r}.")
    return float(value)


def _square(where: str, values: Any, names: list[str]) -> tuple[tuple[float, ...], ...]:
    values = _mapping(f"{where}`", values, ("names", "values"))
    if values["names"] != names:
        raise ConfigError(
            f"{where}.names` should be the objectives {names}. Found {values['names']!r}."
        )
    rows, size = values["values"], len(names)
    if (
        not isinstance(rows, list)
        or [isinstance(r, list) and len(r) for r in rows] != [size] * size
    ):
        raise ConfigError(f"{where}.values` should be {size} rows of {size}. Found {rows!r}.")
    return tuple(tuple(_number(f"{where}.values`", value) for value in row) for row in rows)


def _nullable(value: float) -> float | None:
    return None if math.isnan(value) else value


def _std(values: Tensor) -> float:
    """Standard deviation of a sample ``[n]``, unbiased variance; exactly 0 if only rounding."""
    if len(values) < 2:
        return math.nan
    found = float(values.std())
    return 0.0 if found <= RESIDUE * float(values.abs().max()) else found


def _matrix(values: Tensor, like: RewardMatrix) -> RewardMatrix:
    """Other values ``[K', N]`` of the same samples."""
    return RewardMatrix(
        names=tuple(str(k) for k in range(len(values))),
        values=values,
        groups=like.groups,
        prompts=like.prompts,
    )
