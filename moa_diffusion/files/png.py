"""Image batches to PNG files."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from moa_diffusion.files.writing import write_bytes


def grid(images: Tensor, *, columns: int, gap: int = 2) -> Tensor:
    """Lay ``[n, 3, H, W]`` out row by row on white: ``[3, rows (H + gap) - gap, ...]``.

    Args:
        images: Images ``[n, 3, H, W]`` in [0, 1].
        columns: Images in a row.
        gap: White pixels between two images.
    """
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.ones(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def to_image(pixels: Tensor) -> Image.Image:
    """Return ``[3, H, W]`` in [0, 1] as an image of eight bits."""
    eight_bits = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(eight_bits.cpu().numpy())


def save_png(pixels: Tensor, path: Path) -> None:
    """Write ``[3, H, W]`` in [0, 1] as a PNG; a reader never sees half a file."""
    file = io.BytesIO()  # PIL forgets why a file could not be written
    to_image(pixels).save(file, format="PNG")
    write_bytes(path, file.getbuffer())
