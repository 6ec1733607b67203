"""What images in a batch must be."""

from __future__ import annotations

import torch
from torch import Tensor


def check_images(images: Tensor, size: int) -> None:
    """Check that images are ``[N, 3, H, W]`` float32 in [0, 1].

    Args:
        images: What is checked; anything else than such a tensor is refused.
        size: Number N of images that are expected.

    Raises:
        ValueError: If they have another shape, type or range.
    """
    if not isinstance(images, Tensor):
        raise ValueError(f"`images` should be a tensor. Found {type(images).__name__}.")
    if images.ndim != 4 or images.shape[0] != size or images.shape[1] != 3:
        raise ValueError(
            f"`images` should have shape [N, 3, H, W] with N = {size} prompts. "
            f"Found {list(images.shape)}."
        )
    if images.dtype != torch.float32:
        raise ValueError(f"`images` should be float32. Found {images.dtype}.")
    if images.numel() == 0:
        if size:
            raise ValueError(f"`images` should have pixels. Found shape {list(images.shape)}.")
        return
    flat = images.detach().flatten(1)
    low, high = flat.aminmax(dim=1)  # [N], [N]; NaN pixels make both NaN
    bad = ~((low >= 0.0) & (high <= 1.0))
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise ValueError(
            f"`images` should lie in [0, 1]. Found values from {float(low[index]):.4g} to "
            f"{float(high[index]):.4g} in sample {index}."
        )
