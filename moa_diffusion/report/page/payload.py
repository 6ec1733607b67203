"""What the page's script shows, as JSON: the table, and the views of the front."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moa_diffusion.report.page.figures import INK, template
from moa_diffusion.report.page.front_chart import FrontChart
from moa_diffusion.report.palette import PLUS, Mark
from moa_diffusion.report.table import Table

DIGITS = 6  # significant ones


def page_data(
    table: Table,
    front: FrontChart,
    marks: Mapping[str, Mark],
    files: Sequence[Path],
    *,
    noise: Mapping[str, float],
    folder: Path,
    first: int,
) -> dict[str, Any]:
    """Return everything but the thumbnails and the figures.

    Args:
        table: The table of E models, P prompts, S seeds, K rewards.
        front: The chart of the front.
        marks: Marks by series.
        files: The different files among the table's images.
        noise: The base model's standard deviation within a prompt by reward; NaN: unknown.
        folder: The folder that links to them start from.
        first: The model that is selected at first.
    """
    place = {path: i for i, path in enumerate(files)}
    return {
        "models": [
            {
                "label": model.label,
                "colour": marks[model.series].colour if model.series else INK,
                "outline": marks[model.series].outline if model.series else PLUS,
            }
            for model in table.models
        ],
        "first": first,
        "prompts": table.prompts,
        "seeds": table.seeds,
        # Noise is the base model's standard deviation within a prompt; None with one seed.
        "rewards": [
            {"name": name, "unit": table.units[name], "noise": noise[name]}
            for name in table.rewards
        ],
        "values": table.values.tolist(),
        "images": None
        if table.images is None
        else [[[place[path] for path in seeds] for seeds in rows] for rows in table.images],
        "originals": [quote(Path(os.path.relpath(path, folder)).as_posix()) for path in files],
        "texts": table.texts,
        "template": template(),
        "views": [[asdict(view) for view in row] for row in front.views],
    }


def distinct(table: Table) -> list[Path]:
    """Return the different image files of a table, in its order."""
    if table.images is None:
        return []
    return list(dict.fromkeys(path for rows in table.images for row in rows for path in row))


def rounded(value: Any) -> Any:
    """Return a value as the page has it: ``DIGITS`` digits, and None for what is not a number.

    Args:
        value: Nested mappings, lists and tuples of values that JSON knows otherwise.
    """
    if isinstance(value, Mapping):
        return {str(key): rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
