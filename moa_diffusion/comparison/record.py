"""A finished run as one small text file, from which tables can be made again elsewhere.

The folder of a run holds every held-out image's rewards and every metric, megabytes of them. A
table needs sums per prompt, and a plot the weights: ten kilobytes, which fit into a repository.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy

from moa_diffusion.assembly import flat
from moa_diffusion.comparison.plan import PlannedRun
from moa_diffusion.comparison.read import RunData
from moa_diffusion.config import Config
from moa_diffusion.files.json_values import without_nan
from moa_diffusion.files.writing import write_text
from moa_diffusion.types import ConfigError

DIGITS = 5  # of sums: gains in tables have two decimals
SHOWN = 3  # digits of metrics, which plots show
COLUMNS = ("step", "weight/", "share/", "seconds/total", "seconds/evaluate")  # of the metrics


def write_record(path: Path, run: PlannedRun, made_with: Mapping[str, str]) -> None:
    """Write what a finished run left.

    Args:
        path: The file, JSON.
        run: The run.
        made_with: Versions of libraries, by name, and whatever else a reader should know.

    Raises:
        ValueError: As ``read_run``.
    """
    data = dataclasses.asdict(run.read()) | {"folder": run.name}
    rows = data["metrics"]
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(COLUMNS))
    data["metrics"] = {key: [_rounded(row.get(key), SHOWN) for row in rows] for key in keys}
    sums = data["changes"].tolist()
    data["changes"] = [[[_rounded(x, DIGITS) for x in row] for row in table] for table in sums]
    data["counts"] = data["counts"].astype(int).tolist()
    data |= {"settings": chosen(run.settings), "made_with": dict(made_with)}
    lines = [f"{json.dumps(key)}: {json.dumps(without_nan(data[key]))}" for key in data]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def read_record(path: Path, run: PlannedRun) -> tuple[RunData, Mapping[str, str]]:
    """Return what a run left that a record was written of, and what it was made with.

    Raises:
        ConfigError: If the file is no record, or one of another run than the planned one.
    """
    data = _parsed(path)
    was, now = data.pop("settings"), chosen(run.settings)
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            raise ConfigError(
                f"{key}: should be {was.get(key)}, as in `{path}`, or its default if that is None. "
                f"Found {now.get(key)}. Without the file the run is made again."
            )
    made_with: Mapping[str, str] = data.pop("made_with")
    columns = data.pop("metrics")
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    known = [{key: value for key, value in row.items() if value is not None} for row in rows]
    data |= {key: numpy.array(data[key], dtype=float) for key in ("changes", "counts")}
    data |= {key: tuple(data[key]) for key in ("names", "steps", "prompts", "spread")}
    return RunData(**data, metrics=known), made_with


def _parsed(path: Path) -> dict[str, Any]:
    """Return what a record holds, by key.

    Raises:
        ConfigError: If the file is no record, such as one that git could not merge.
    """
    keys = {field.name for field in dataclasses.fields(RunData)} | {"settings", "made_with"}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"`{path}` should be a run's record, in JSON. Found {error}.") from None
    if not isinstance(data, dict) or data.keys() != keys:
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ConfigError(f"`{path}` should be a run's record, of {sorted(keys)}. Found {found}.")
    return data


def chosen(settings: Config) -> dict[str, Any]:
    """Return by dotted key what differs from the defaults, but for where the run goes."""
    usual = flat(Config())
    given = flat(settings)
    return {
        key: value
        for key, value in given.items()
        if key not in ("output_dir", "resume") and value != usual.get(key)
    }


def _rounded(value: float | None, digits: int) -> float | int | None:
    """Return a number with few digits, which JSON keeps short."""
    if value is None or value != value:
        return None
    return int(value) if value == int(value) else float(f"{value:.{digits}g}")
