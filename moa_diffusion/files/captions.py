"""Words under images: prompts and scores in a sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE = 192  # the least width of an image with words, in pixels
SIZE = 13  # the letters' size in pixels, beside larger images than these more
LINE = 17  # from one line of text to the next, of letters of that size
MARGIN = 4
PROMPT_LINES = 3  # a longer prompt ends in an ellipsis


def captioned(image: Image.Image, prompt: str, scores: Sequence[str]) -> Tensor:
    """Return an image above its prompt and its scores: ``[3, H', W']`` in [0, 1].

    Args:
        image: The image; a smaller one is enlarged by a whole number, so that pixels stay squares.
        prompt: The prompt, cut into lines of the image's width.
        scores: A line for each reward.
    """
    times = max(1, -(-SIDE // image.width))
    size = (times * image.width, times * image.height)
    letters = max(SIZE, SIZE * size[0] // (2 * SIDE))
    words = shortened(wrap(prompt, size[0], letters), PROMPT_LINES)
    words += [""] * (PROMPT_LINES - len(words))  # scores of neighbours stand in one row
    lines = [*words, *(line for score in scores for line in wrap(score, size[0], letters))]
    height = size[1] + _line(letters) * len(lines) + 2 * MARGIN
    canvas = Image.new("RGB", (size[0], height), "white")
    canvas.paste(image.convert("RGB").resize(size, Image.Resampling.NEAREST))
    return written(canvas, lines, size[1] + MARGIN, letters)


def written(canvas: Image.Image, lines: Sequence[str], top: int, letters: int = SIZE) -> Tensor:
    """Write lines on a canvas, from a height in pixels downwards: ``[3, H, W]`` in [0, 1]."""
    drawing = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        drawing.text((MARGIN, top + i * _line(letters)), line, "black", _font(letters))
    return torch.from_numpy(numpy.array(canvas)).permute(2, 0, 1).float() / 255


def score_text(score: float) -> str:
    """Return a score in few characters; a dash where the reward does not apply."""
    if math.isnan(score):
        return "-"
    return f"{score:.3f}" if abs(score) < 10 else f"{score:.4g}"


def wrap(text: str, width: int, letters: int = SIZE) -> list[str]:
    """Cut a text into lines of at most so many pixels; a longer word is cut inside."""
    lines, room = [""], width - 2 * MARGIN
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if text_width(joined, letters) <= room:
            lines[-1] = joined
            continue
        lines.append("")
        for letter in word:
            if text_width(lines[-1] + letter, letters) > room:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]


def shortened(lines: Sequence[str], most: int) -> list[str]:
    """Return at most so many lines; where some are left out, the last one says so."""
    fitting = list(lines[:most])
    if len(fitting) < len(lines):
        fitting[-1] = f"{fitting[-1][:-1]}…"
    return fitting


def text_width(text: str, letters: int = SIZE) -> int:
    """Return the width of a line in pixels."""
    return math.ceil(_font(letters).getlength(text))


def _line(letters: int) -> int:
    return letters * LINE // SIZE


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the font that comes with matplotlib, which knows more scripts, or else Pillow's."""
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        return ImageFont.load_default(size)
    fonts = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(fonts / "DejaVuSans.ttf", size)
