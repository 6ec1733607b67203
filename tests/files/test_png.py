"""Sheets of images, and files that hold the pixels."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from PIL import Image

from moa_diffusion.files.png import grid, save_png


def test_images_lie_row_by_row_on_white():
    images = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 3, 4, 5) / 4
    sheet = grid(images, columns=2, gap=1)
    assert sheet.shape == (3, 9, 11)
    assert (sheet[:, :4, :5] == 0).all()
    assert (sheet[:, :4, 6:] == 0.25).all()
    assert (sheet[:, 5:, :5] == 0.5).all()
    assert (sheet[:, 4] == 1).all()
    assert (sheet[:, 5:, 6:] == 1).all(), "the last row is not full"


def test_a_file_holds_the_pixels_rounded_to_eight_bits(tmp_path: Path):
    image = torch.linspace(-0.1, 1.1, 3 * 4 * 5).reshape(3, 4, 5)
    save_png(image, tmp_path / "new" / "a.png")
    pixels = numpy.asarray(Image.open(tmp_path / "new" / "a.png"))
    expected = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert numpy.array_equal(pixels, expected)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
