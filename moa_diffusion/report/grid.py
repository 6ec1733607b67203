"""``grid.png``: rows prompts, columns models, one seed, scores under each image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from moa_diffusion.files import png
from moa_diffusion.files.captions import (
    LINE,
    MARGIN,
    SIDE,
    score_text,
    shortened,
    text_width,
    wrap,
    written,
)
from moa_diffusion.files.writing import replaced
from moa_diffusion.report.table import Table


def write_grid(table: Table, target: Path, *, shown: int = 12, seed: int | None = None) -> None:
    """Write a PNG.

    Args:
        table: The table of E models and P prompts, with images.
        target: The PNG file that is written.
        shown: At most this many prompts, see ``shown_prompts``.
        seed: One of the table's seeds; by default the first.
    """
    assert table.images is not None
    s = 0 if seed is None else table.seeds.index(seed)
    prompts = shown_prompts(len(table.prompts), shown)
    width = max(SIDE, *(text_width(f"{name} -0.0000") + 2 * MARGIN for name in table.rewards))
    height = SIDE + LINE * len(table.rewards) + 2 * MARGIN
    # A column for the prompts, then one per model.
    head = [_words([f"seed {table.seeds[s]}"], width, 2 * LINE + MARGIN)]
    head += [_words(wrap(model.label, width), width, 2 * LINE + MARGIN) for model in table.models]
    cells = []
    for p in prompts:
        cells.append(_words(wrap(table.prompts[p], width), width, height))
        for e in range(len(table.models)):
            scores = table.values[e, :, p, s].tolist()
            lines = [
                f"{name} {score_text(score)}"
                for name, score in zip(table.rewards, scores, strict=True)
            ]
            cells.append(_cell(table.images[e][p][s], lines, width, height))
    columns = len(table.models) + 1
    sheet = torch.cat(
        [
            png.grid(torch.stack(head), columns=columns),
            png.grid(torch.stack(cells), columns=columns),
        ],
        dim=1,
    )
    pixels = (sheet * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    with replaced(target) as partial:
        Image.fromarray(pixels).save(partial, format="PNG", optimize=True)


def shown_prompts(prompts: int, shown: int) -> list[int]:
    """Choose prompts to show, at even distances in the list: none is picked by hand."""
    count = min(shown, prompts)
    return [i * prompts // count for i in range(count)]


def _cell(file: Path, lines: Sequence[str], width: int, height: int) -> Tensor:
    canvas = Image.new("RGB", (width, height), "white")
    with Image.open(file) as image:
        # Pixels of small images stay sharp squares.
        nearest = image.width < SIDE and SIDE % image.width == 0
        way = Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
        canvas.paste(image.convert("RGB").resize((SIDE, SIDE), way), ((width - SIDE) // 2, 0))
    return written(canvas, lines, SIDE + MARGIN)


def _words(lines: Sequence[str], width: int, height: int) -> Tensor:
    fitting = shortened(lines, (height - MARGIN) // LINE)
    return written(Image.new("RGB", (width, height), "white"), fitting, MARGIN)
