"""The calibration file: its records, and how they are written and read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moa_diffusion.files.writing import write_text
from moa_diffusion.types import ConfigError

VERSION = 1
HIJACK = 0.8  # share of the advantage's variance above which one objective decides alone


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveCalibration:
    """One objective before training. "Unit" is the reward's own; NaN is "not known"."""

    mean: float  # over the samples to which it applies; unit
    std_total: float  # over these samples; unit
    std_within: float  # within groups, pooled and unbiased: the unit of gains; unit
    std_between: float  # between prompts' expected rewards: group means less their noise; unit
    min: float  # unit
    max: float  # unit
    at_min: float  # share of the samples at exactly the minimum; large if saturated
    at_max: float  # likewise
    applies: float  # share of the prompts to which it applies
    zero_variance: float  # share of these prompts whose group has no spread (no signal)
    # The noise in one score: the standard deviation of two scorings' difference over sqrt 2; unit.
    retest_std: float
    milliseconds: float  # to score one sample
    share_static: float  # its part of the variance of the weighted sum of raw rewards
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
        """Return the objective that alone decides a weighted sum of raw rewards, if there is one.

        None as well where fewer than two objectives apply: there is nothing to take over.
        """
        rivals = [name for name, calibrated in self.objectives.items() if calibrated.applies > 0]
        if len(rivals) < 2:
            return None
        first = max(rivals, key=lambda name: self.objectives[name].share_static)
        return first if self.objectives[first].share_static > HIJACK else None


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
            name: {key: _nullable(value) for key, value in asdict(calibrated).items()}
            for name, calibrated in calibration.objectives.items()
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
        path: The JSON file.
        objectives: Names that it has to hold.

    Raises:
        ConfigError: Naming the file, the key, what was expected, and what was found.
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
        version = repr(values["version"]) if "version" in values else "none"
        raise ConfigError(f"{where}: `version` should be {VERSION}. Found {version}.")
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
    """Return the mapping itself, if it is one and has exactly these keys."""
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
