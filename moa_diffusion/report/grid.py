"""``grid.png``: rows prompts, columns models, one seed, scores under each image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from moa_diffusion.files import png
from moa_diffusion.files.writing import replaced
from moa_diffusion.report.table import Table

SIDE = 192  # a thumbnail's side in pixels
SIZE = 13  # the letters' size in pixels
LINE = 17  # from one line of text to the next
MARGIN = 4


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
    width = max(SIDE, *(_width(f"{name} -0.0000") + 2 * MARGIN for name in table.rewards))
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


def score_text(score: float) -> str:
    """Return a score in few characters; a dash where the reward does not apply."""
    if math.isnan(score):
        return "-"
    return f"{score:.3f}" if abs(score) < 10 else f"{score:.4g}"


def wrap(text: str, width: int) -> list[str]:
    """Cut a text into lines of at most so many pixels; a longer word is cut inside."""
    lines, room = [""], width - 2 * MARGIN
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if _width(joined) <= room:
            lines[-1] = joined
            continue
        lines.append("")
        for letter in word:
            if _width(lines[-1] + letter) > room:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]


def _cell(file: Path, lines: Sequence[str], width: int, height: int) -> Tensor:
    canvas = Image.new("RGB", (width, height), "white")
    with Image.open(file) as image:
        # Pixels of small images stay sharp squares.
        nearest = image.width < SIDE and SIDE % image.width == 0
        way = Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
        canvas.paste(image.convert("RGB").resize((SIDE, SIDE), way), ((width - SIDE) // 2, 0))
    return _written(canvas, lines, SIDE + MARGIN)


def _words(lines: Sequence[str], width: int, height: int) -> Tensor:
    fitting = list(lines[: (height - MARGIN) // LINE])
    if len(fitting) < len(lines):
        fitting[-1] = f"{fitting[-1][:-1]}…"
    return _written(Image.new("RGB", (width, height), "white"), fitting, MARGIN)


def _written(canvas: Image.Image, lines: Sequence[str], top: int) -> Tensor:
    drawing = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        drawing.text((MARGIN, top + i * LINE), line, "black", _font())
    return torch.from_numpy(numpy.array(canvas)).permute(2, 0, 1).float() / 255


def _width(text: str) -> int:
    return math.ceil(_font().getlength(text))


def _font() -> ImageFont.FreeTypeFont:
    """Return the font that comes with matplotlib: it knows more scripts than Pillow's own."""
    import matplotlib

    return ImageFont.truetype(
        Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", SIZE
    )
