"""A reward that is easy to game: it pays for bright images, whatever they show."""

from __future__ import annotations

from torch import Tensor


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """Mean of all pixels.

    Args:
        images: ``[N, 3, H, W]`` in [0, 1].
        prompts: N.

    Returns:
        ``[N]`` in [0, 1].
    """
    return images.mean((1, 2, 3))
