"""Ways to spoil an image by degrees, for a judge of quality to learn and to be tested on.

Five happen to any image; ``latent`` is what a latent diffusion model does wrong: it adds noise to
the latents, and the autoencoder makes of it the artefacts that a bad sample has.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Generator, Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# Images [N, 3, H, W] in [0, 1], strengths [N] from 0 (nothing) to 1 (ruined): images.
Degradation = Callable[[Tensor, Tensor, Generator], Tensor]

_DECODED_AT_ONCE = 64


def degradations(vae: AutoencoderKL) -> dict[str, Degradation]:
    """Return all ways by name.

    Args:
        vae: The embedded pipeline's autoencoder.
    """
    return {
        "blur": blur,
        "noise": noise,
        "jpeg": jpeg,
        "colours": colours,
        "strokes": strokes,
        "latent": partial(latent, vae),
    }


def blur(images: Tensor, strengths: Tensor, generator: Generator) -> Tensor:
    """Return a Gaussian of up to 3 pixels."""
    reach = 8
    offsets = torch.arange(-reach, reach + 1)
    sigma = (3 * strengths).clamp(min=0.05).view(-1, 1)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())  # [N, 2 reach + 1]
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    count, channels, height, width = images.shape
    planes = count * channels
    column = kernel.repeat_interleave(channels, dim=0).view(planes, 1, -1, 1)
    flat = F.pad(images.reshape(1, planes, height, width), (reach,) * 4, mode="replicate")
    flat = F.conv2d(flat, column, groups=planes)
    flat = F.conv2d(flat, column.transpose(2, 3), groups=planes)
    return flat.view_as(images)


def noise(images: Tensor, strengths: Tensor, generator: Generator) -> Tensor:
    """Add white noise, standard deviation up to 0.25."""
    drawn = torch.randn(images.shape, generator=generator)
    return (images + 0.25 * _column(strengths) * drawn).clamp(0, 1)


def jpeg(images: Tensor, strengths: Tensor, generator: Generator) -> Tensor:
    """Compress as JPEG, from quality 40, which plain scenes survive unharmed, down to 2."""
    spoilt = torch.empty_like(images)
    for index, (image, strength) in enumerate(zip(images, strengths.tolist(), strict=True)):
        file = io.BytesIO()
        _to_pil(image).save(file, format="JPEG", quality=round(40 * (2 / 40) ** strength))
        spoilt[index] = _from_pil(Image.open(file))
    return spoilt


def colours(images: Tensor, strengths: Tensor, generator: Generator) -> Tensor:
    """Add blotches of wrong colour: a smooth random field of up to 0.25 on each channel."""
    coarse = torch.randn(len(images), 3, 5, 5, generator=generator)
    field = F.interpolate(coarse, images.shape[-2:], mode="bicubic", align_corners=True)
    return (images + 0.25 * _column(strengths) * field).clamp(0, 1)


def strokes(images: Tensor, strengths: Tensor, generator: Generator) -> Tensor:
    """Take pieces of the figure away: three lines in the ground's colour, up to 9 pixels wide."""
    spoilt = torch.empty_like(images)
    high, wide = images.shape[-2:]
    for index, (image, strength) in enumerate(zip(images, strengths.tolist(), strict=True)):
        large = _to_pil(image).resize((4 * wide, 4 * high), Image.Resampling.NEAREST)
        ground = large.getpixel((4, 4))
        pen = ImageDraw.Draw(large)
        # From the upper or left half to the opposite one, so that it crosses the figure.
        ends = torch.rand(3, 4, generator=generator) * 0.5 + torch.tensor([0.1, 0.1, 0.4, 0.4])
        for x, y, u, v in (ends * torch.tensor([wide, high, wide, high]) * 4).tolist():
            pen.line((x, y, u, v), fill=ground, width=max(1, round(4 * 9 * strength)))
        spoilt[index] = _from_pil(large.resize((wide, high), Image.Resampling.BOX))
    return spoilt


@torch.no_grad()
def latent(vae: AutoencoderKL, images: Tensor, strengths: Tensor, generator: Generator) -> Tensor:
    """Add noise to the latents, up to 2.5 of their standard deviations; 0 only compresses."""
    made = []
    for start in range(0, len(images), _DECODED_AT_ONCE):
        part = slice(start, start + _DECODED_AT_ONCE)
        latents = vae.encode(images[part] * 2 - 1).latent_dist.mean
        drawn = torch.randn(latents.shape, generator=generator) / vae.config.scaling_factor
        decoded = vae.decode(latents + 2.5 * _column(strengths[part]) * drawn).sample
        made.append((decoded / 2 + 0.5).clamp(0, 1))
    return torch.cat(made)


def spoil(
    images: Tensor,
    strengths: Tensor,
    kinds: Sequence[int],
    ways: Sequence[Degradation],
    generator: Generator,
) -> Tensor:
    """Degrade each image in its own way.

    Args:
        images: Images ``[N, 3, H, W]`` in [0, 1].
        strengths: Strengths of the degradation ``[N]``, 0 to 1.
        kinds: Kinds of each image, an index of ``ways``.
        ways: What to choose from.
        generator: Source of what is random.

    Returns:
        ``[N, 3, H, W]`` in [0, 1].
    """
    spoilt = images.clone()
    which = torch.tensor(kinds)
    for index, way in enumerate(ways):
        rows = (which == index).nonzero().flatten()
        if len(rows):
            spoilt[rows] = way(images[rows], strengths[rows], generator)
    return spoilt


def _column(strengths: Tensor) -> Tensor:
    return strengths.view(-1, 1, 1, 1)


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def _from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
