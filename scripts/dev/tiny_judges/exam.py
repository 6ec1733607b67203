"""How well judges do on scenes that they have not learnt from, in numbers from 0 or -1 to 1.

Examined is what a run uses: the heads, with the files they load. All images have been through
the autoencoder, as those of the embedded pipeline have.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import torch
from scipy.stats import spearmanr
from torch import Generator, Tensor

from rewards import RewardBatch, RewardHead, create
from tiny_judges.data import HELD_OUT_SHAPES, confusable, vary
from tiny_judges.degradations import degradations, latent
from tiny_judges.rule import beauty
from tiny_pipeline.scenes import HELD_OUT_WORDS, Scene, Sign, all_shapes, all_signs
from tiny_pipeline.vae import draw_scenes

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_CANDIDATES = 12  # prompts that an image is to be told from, its own among them
_EVERY = 3  # images are scored once per candidate: every third one is asked for its prompt


def judges(folder: str, dtype: str = "float32") -> dict[str, RewardHead]:
    """Return the heads ``pickscore``, ``aesthetic`` and ``deqa`` on the judges in a folder.

    Args:
        folder: As ``rewards.pretrained.locate`` names a folder.
        dtype: Precision of their models.
    """
    return {
        "pickscore": create("pickscore", model=f"{folder}/clip", dtype=dtype),
        "aesthetic": create(
            "aesthetic",
            model=f"{folder}/clip",
            predictor=f"{folder}/aesthetic/model.safetensors",
            predictor_sha256=None,
            dtype=dtype,
        ),
        "deqa": create("deqa", model=f"{folder}/deqa", dtype=dtype),
    }


def examine(folder: str, vae: AutoencoderKL) -> dict[str, dict[str, float]]:
    """Return the marks of the judges in a folder, by head.

    A mark is what ``match``, ``taste`` or ``quality`` returns.
    """
    exams = {"pickscore": match, "aesthetic": taste, "deqa": quality}
    images = render(held_out_scenes(), vae, 0)
    with ExitStack() as stack:
        heads = {n: stack.enter_context(closing(head)) for n, head in judges(folder).items()}
        return {name: exams[name](head, vae, images) for name, head in heads.items()}


def held_out_scenes() -> list[Scene]:
    """Return signs of the held-out words in all colours, and the held-out shapes."""
    shapes = [scene for scene in all_shapes() if scene in HELD_OUT_SHAPES]
    return [*all_signs(HELD_OUT_WORDS), *shapes]


def render(scenes: list[Scene], vae: AutoencoderKL, seed: int) -> Tensor:
    """Render scenes as the autoencoder repeats them: images ``[N, 3, 64, 64]`` in [0, 1]."""
    images = draw_scenes(scenes, random.Random(seed)) / 255
    return latent(vae, images, torch.zeros(len(images)), torch.Generator().manual_seed(seed))


def match(head: RewardHead, vae: AutoencoderKL, images: Tensor, seed: int = 0) -> dict[str, float]:
    """Return how often a judge of the match finds the right image, and the right prompt.

    Args:
        head: The judge.
        vae: The autoencoder that the other images go through.
        images: The held-out scenes, as ``render`` returns them.
        seed: Seed of what they differ in.

    Returns:
        ``signs`` and ``shapes``: share of prompts for which the right image scores above that of
        a scene that differs in one thing. ``prompts``: share of every third image for which
        its own prompt scores highest of 12 held-out ones.
    """
    rng = random.Random(seed)
    scenes = held_out_scenes()
    prompts = [scene.prompt for scene in scenes]
    wrong = render([confusable(scene, rng) for scene in scenes], vae, seed + 1)
    won = _scores(head, images, prompts) > _scores(head, wrong, prompts)  # [N]
    signs = torch.tensor([isinstance(scene, Sign) for scene in scenes])
    candidates = [
        [prompt, *rng.sample([other for other in prompts if other != prompt], _CANDIDATES - 1)]
        for prompt in prompts[::_EVERY]
    ]
    asked = [prompt for group in candidates for prompt in group]
    scores = _scores(head, images[::_EVERY].repeat_interleave(_CANDIDATES, dim=0), asked)
    right_first = scores.view(-1, _CANDIDATES).argmax(dim=1) == 0
    return {
        "signs": won[signs].float().mean().item(),
        "shapes": won[~signs].float().mean().item(),
        "prompts": right_first.float().mean().item(),
    }


def taste(head: RewardHead, vae: AutoencoderKL, images: Tensor, seed: int = 0) -> dict[str, float]:
    """Return the rank correlation of a judge of beauty with the rule, on varied held-out scenes.

    Args:
        head: The judge.
        vae: Not used; all exams are called alike.
        images: The held-out scenes, as ``render`` returns them.
        seed: Seed of the variations.

    Returns:
        ``all``: over all images. ``siblings``: over four looks of each scene, less the scene's
        mean.
    """
    scenes = held_out_scenes()
    looks = 4
    images = images.repeat_interleave(looks, dim=0)
    images = vary(images, Generator().manual_seed(seed))
    scores = _scores(head, images, [scene.prompt for scene in scenes for _ in range(looks)])
    truth = beauty(images)
    among = [x.view(-1, looks) - x.view(-1, looks).mean(1, keepdim=True) for x in (scores, truth)]
    return {
        "all": float(spearmanr(scores, truth).statistic),
        "siblings": float(spearmanr(among[0].flatten(), among[1].flatten()).statistic),
    }


def quality(
    head: RewardHead, vae: AutoencoderKL, images: Tensor, seed: int = 0
) -> dict[str, float]:
    """Return the rank correlation of a judge of quality with minus a degradation's strength.

    Args:
        head: The judge.
        vae: The autoencoder whose latents one degradation spoils.
        images: The held-out scenes, as ``render`` returns them.
        seed: Seed of the strengths.

    Returns:
        By name of the degradation, over the held-out scenes spoilt to a random degree; ``all``:
        over all of these images together.
    """
    scenes = held_out_scenes()
    prompts = [scene.prompt for scene in scenes]
    generator = torch.Generator().manual_seed(seed)
    correlations: dict[str, float] = {}
    scores, truths = [], []
    for name, way in degradations(vae).items():
        strengths = torch.rand(len(images), generator=generator)
        scores.append(_scores(head, way(images, strengths, generator), prompts))
        truths.append(-strengths)
        correlations[name] = float(spearmanr(scores[-1], truths[-1]).statistic)
    everything = spearmanr(torch.cat(scores), torch.cat(truths))
    return correlations | {"all": float(everything.statistic)}


def _scores(head: RewardHead, images: Tensor, prompts: Sequence[str]) -> Tensor:
    return head(RewardBatch(prompts=prompts, images=images))
