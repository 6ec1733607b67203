"""The grid of images: every model has its column."""

from __future__ import annotations

from pathlib import Path

import numpy
from PIL import Image

from moa_diffusion.evaluation.records import ScoredSamples


def test_the_images_show_every_model(evaluated: tuple[Path, ScoredSamples]):
    output, found = evaluated
    with Image.open(output / "grid.png") as grid:
        pixels = numpy.array(grid.convert("RGB"), dtype=float)
    key = next(p.key for p in found.samples if (p.candidate, p.prompt, p.seed) == (2, 0, 0))
    with Image.open(output / "images" / f"{key}.png") as image:
        cell = numpy.array(image.resize((192, 192), Image.Resampling.NEAREST), dtype=float)
    width = (pixels.shape[1] + 2) // 7 - 2  # a column of prompts, six models, gaps of 2
    left, top = 3 * (width + 2) + (width - 192) // 2, 38
    assert numpy.array_equal(pixels[top : top + 192, left : left + 192], cell)
