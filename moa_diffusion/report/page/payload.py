"""What the page's script shows, as JSON: the table, its summary, the curves of the runs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moa_diffusion.report.page.runs import Training
from moa_diffusion.report.pareto_plot import COLOURS
from moa_diffusion.report.summary import Summary
from moa_diffusion.report.table import Table
from moa_diffusion.statistics.bootstrap import Estimate

DIGITS = 6  # significant ones


def page_data(
    table: Table,
    summary: Summary,
    runs: Mapping[str, Training],
    pictures: Sequence[Path],
    *,
    folder: Path,
    first: int,
) -> dict[str, Any]:
    """Return everything but the thumbnails; what is not a number is None.

    Args:
        table: The table of E models, P prompts, S seeds, K rewards.
        summary: The summary of the table.
        runs: Training runs by series.
        pictures: The different files among the table's images.
        folder: The folder that links to them start from.
        first: The model that is selected at first.
    """
    series = list(dict.fromkeys([*(one.series for one in table.models if one.series), *runs]))
    place = {path: i for i, path in enumerate(pictures)}
    return {
        "models": [
            {
                "label": column.label,
                "series": column.series,
                "step": column.step,
                "short": _short(column.label, column.series),
                "nondominated": one.nondominated,
                "mean": [_estimate(one.rewards[name].mean) for name in table.rewards],
                "stds": [_estimate(one.rewards[name].gain_in_stds) for name in table.rewards],
            }
            for column, one in zip(table.models, summary.models, strict=True)
        ],
        "first": first,
        "series": [
            {"name": name, "colour": COLOURS[i % len(COLOURS)]} for i, name in enumerate(series)
        ],
        "prompts": table.prompts,
        "seeds": table.seeds,
        "rewards": [{"name": name, "unit": table.units[name]} for name in table.rewards],
        "values": _rounded(table.values.tolist()),
        "images": None
        if table.images is None
        else [[[place[path] for path in seeds] for seeds in rows] for rows in table.images],
        "originals": [quote(Path(os.path.relpath(path, folder)).as_posix()) for path in pictures],
        "texts": table.texts,
        "runs": [_run(run) for run in runs.values()],
    }


def distinct(table: Table) -> list[Path]:
    """Return the different picture files of a table, in its order."""
    if table.images is None:
        return []
    return list(dict.fromkeys(path for rows in table.images for row in rows for path in row))


def _run(run: Training) -> dict[str, Any]:
    return {
        "name": run.name,
        "objectives": run.objectives,
        "heldout": run.heldout,
        "pooled": run.pooled,
        "alarms": [_rounded(dict(alarm)) for alarm in run.alarms],
        "curves": {
            group: {
                name: {"x": _rounded(curve.steps), "y": _rounded(curve.values)}
                for name, curve in members.items()
            }
            for group, members in run.curves.items()
        },
    }


def _short(label: str, series: str) -> str:
    """Return a model's name beside others of its series."""
    return label.removeprefix(f"{series}/").rsplit(" ", 1)[-1] if series else label


def _estimate(one: Estimate) -> list[float | None]:
    return [_number(end) for end in (one.value, one.low, one.high)]


def _number(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return _number(value) if isinstance(value, float) else value
