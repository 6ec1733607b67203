"""Scenes for judges to learn from: rendered, as the autoencoder repeats them, and varied in look.

Words of ``HELD_OUT_WORDS`` and every sixteenth shape scene never occur: the judges are examined on
these, and shall not have learnt them by heart. The words of alignment are among those that occur.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from tiny_judges.degradations import latent
from tiny_pipeline.scenes import (
    COLOURS,
    HELD_OUT_WORDS,
    SHAPES,
    TRAIN_WORDS,
    Scene,
    Shape,
    Sign,
    all_shapes,
)
from tiny_pipeline.vae import LETTERS, draw_scenes

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

HELD_OUT_SHAPES = frozenset(all_shapes()[::16])


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """Images to learn from."""

    images: Tensor  # [N, 3, 64, 64] uint8
    scenes: list[Scene]  # N


def load_vae() -> AutoencoderKL:
    """Return the embedded pipeline's autoencoder."""
    from diffusers import AutoencoderKL

    from moa_diffusion.tiny import PIPELINE_PATH

    return AutoencoderKL.from_pretrained(PIPELINE_PATH / "vae", local_files_only=True).eval()


def training_scene(rng: random.Random) -> Scene:
    """Return a shape, or a sign with a training word or random letters; never a held-out scene."""
    while True:
        colour, background = rng.sample(list(COLOURS), 2)
        if rng.random() < 0.35:
            scene: Scene = Shape(colour=colour, shape=rng.choice(SHAPES), background=background)
        elif rng.random() < 0.25:
            scene = Sign(colour=colour, word=rng.choice(TRAIN_WORDS))
        else:
            letters = rng.choices(LETTERS, k=rng.choice((2, 3, 3, 4, 4)))
            scene = Sign(colour=colour, word="".join(letters))
        if not is_held_out(scene):
            return scene


def is_held_out(scene: Scene) -> bool:
    """Return whether judges must not learn from the scene."""
    if isinstance(scene, Shape):
        return scene in HELD_OUT_SHAPES
    return scene.word in HELD_OUT_WORDS


def make_stock(count: int, rng: random.Random, vae: AutoencoderKL) -> Stock:
    """Draw training scenes; every other image has been through the autoencoder."""
    scenes = [training_scene(rng) for _ in range(count)]
    images = draw_scenes(scenes, rng)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    some = images[::2] / 255
    images[::2] = quantise(latent(vae, some, torch.zeros(len(some)), generator))
    return Stock(images=images, scenes=scenes)


def quantise(images: Tensor) -> Tensor:
    """Turn [0, 1] into uint8, as the heads do."""
    return images.mul(255).round().to(torch.uint8)


def vary(
    images: Tensor,
    generator: Generator,
    *,
    shift: int = 6,
    tint: float = 0.12,
    grain: float = 0.06,
) -> Tensor:
    """Change what a prompt leaves open: place, saturation, contrast, light, a tint, some noise.

    Args:
        images: Images ``[N, 3, H, W]`` in [0, 1].
        generator: Source of what is random.
        shift: Most pixels across and down; the edge is repeated.
        tint: Most standard deviation of a smooth field of colour.
        grain: Most standard deviation of the noise.

    Returns:
        ``[N, 3, H, W]`` in [0, 1].
    """
    count, _, height, width = images.shape

    def uniform(low: float, high: float) -> Tensor:
        drawn = torch.rand(count, 1, 1, 1, generator=generator)
        return low + (high - low) * drawn

    images = _shift(images, shift, generator)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + uniform(0.5, 1.4) * (images - grey)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + uniform(0.6, 1.3) * (images - mean) + uniform(-0.1, 0.1)
    coarse = torch.randn(count, 3, 3, 3, generator=generator) * uniform(0, tint)
    field = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    noise = torch.randn(images.shape, generator=generator) * uniform(0, grain)
    return (images + field + noise).clamp(0, 1)


def _shift(images: Tensor, most: int, generator: Generator) -> Tensor:
    count, _, height, width = images.shape
    by = torch.randint(-most, most + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + by[0]).clamp(0, height - 1)  # [N, H]
    columns = (torch.arange(width) + by[1]).clamp(0, width - 1)  # [N, W]
    index = torch.arange(count)
    moved = images[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [N, H, W, 3]
    return moved.permute(0, 3, 1, 2).contiguous()


def confusable(scene: Scene, rng: random.Random) -> Scene:
    """Return a scene that differs in one thing.

    That is a colour, the shape, the order of two colours, or a letter.
    """
    if isinstance(scene, Sign):
        if rng.random() < 0.25:
            return replace(scene, colour=_another(scene.colour, list(COLOURS), rng))
        at = rng.randrange(len(scene.word))
        letter = _another(scene.word[at], LETTERS, rng)
        return replace(scene, word=scene.word[:at] + letter + scene.word[at + 1 :])
    match rng.randrange(4):
        case 0:
            return replace(scene, shape=_another(scene.shape, list(SHAPES), rng))
        case 1:
            return replace(scene, colour=scene.background, background=scene.colour)
        case 2:
            others = [name for name in COLOURS if name != scene.background]
            return replace(scene, colour=_another(scene.colour, others, rng))
        case _:
            others = [name for name in COLOURS if name != scene.colour]
            return replace(scene, background=_another(scene.background, others, rng))


def _another(value: str, values: list[str], rng: random.Random) -> str:
    return rng.choice([other for other in values if other != value])
