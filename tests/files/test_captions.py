"""Words under images."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from moa_diffusion.files import captions
from moa_diffusion.files.captions import LINE, SIDE, captioned, shortened, text_width, wrap


def test_lines_fit_and_lose_nothing():
    text = "a red sign that says " + 80 * "W"
    lines = wrap(text, SIDE)
    assert all(text_width(line) <= SIDE for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert shortened(lines, 2) == [lines[0], f"{lines[1][:-1]}…"]
    assert shortened(lines, len(lines)) == lines


def test_small_images_are_enlarged_to_whole_squares_above_the_words():
    image = Image.new("RGB", (64, 32), (255, 0, 0))
    image.putpixel((0, 0), (0, 0, 255))
    cell = captioned(image, "a prompt", ["ocr 0.500", "sharpness -"])
    assert cell.shape[2] == SIDE
    assert cell[:, :96].shape == (3, 96, SIDE)
    assert (cell[2, :3, :3] == 1).all(), "a pixel is a square of 3"
    assert (cell[0, 3:96, 3:] == 1).all()
    words = cell[:, 96:]
    assert words.min() < 0.5
    assert (words[:, -LINE // 4 :] == 1).all()
    large = captioned(Image.new("RGB", (4 * SIDE, 8), "white"), "words", [])
    assert large.shape[1] - 8 > 1.8 * (captioned(image, "words", []).shape[1] - 96)
    other = captioned(image, "another " * 40, ["ocr 0.500", "sharpness -"])
    assert other.shape == cell.shape, "cells of a sheet are of one size"


@pytest.mark.parametrize("installed", [True, False])
def test_letters_are_drawn_with_and_without_matplotlib(installed, monkeypatch):
    if not installed:
        monkeypatch.setattr(captions, "find_spec", lambda name: None)
    captions._font.cache_clear()
    try:
        cell = captioned(Image.new("RGB", (SIDE, 8), "white"), "words", [])
        assert cell.min() < 0.5
        assert cell.dtype == torch.float32
    finally:
        captions._font.cache_clear()
