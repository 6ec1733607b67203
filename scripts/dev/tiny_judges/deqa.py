"""A small DeQA that rates what was done to a scene, in the five words of the real one.

Trained as DeQA-Score (You et al. 2025, https://arxiv.org/abs/2501.11561, section 3): cross-entropy
of the five level words against a soft label, so that the mean of the levels is the true rating.

Deviations: the soft label is not a Gaussian's share of each level, corrected to the right mean, but
the two neighbouring levels in the proportion that gives the mean: ratings here are known exactly.
The words of the question are one token each, of a vocabulary that holds nothing else.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from rewards.pretrained.preprocessing import normalise
from rewards.progress_bar import progress_bar
from tiny_judges.data import load_vae, make_stock, quantise, vary
from tiny_judges.degradations import degradations, spoil
from tiny_pipeline.muon import MuonWithAdamW
from tiny_pipeline.scenes import SIZE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from rewards.heads.deqa.model import Deqa

_STOCK = 4096  # scenes
_AT_ONCE = 256  # scenes whose images are in memory as floats
_PER_SCENE = 4  # images of each scene: one unspoilt, the others spoilt in ways of their own
_TWICE = 0.3  # share of the spoilt ones that are spoilt in a second way
_BEST, _WORST = 5.0, 1.0

# "rate this image" + image + "quality is" + the level; as in the published `config.json`, sizes
# over 16 or so.
CONFIG: dict[str, Any] = {
    "model_type": "mplug_owl2",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 10,
    "rms_norm_eps": 1e-5,
    "prompt_ids": [[0, 1, 2], [3, 4]],
    "level_ids": [5, 6, 7, 8, 9],
    "visual_config": {
        "visual_model": {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": SIZE,
            "patch_size": 8,
            "layer_norm_eps": 1e-6,
        },
        "visual_abstractor": {
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_learnable_queries": 8,
            "layer_norm_eps": 1e-6,
            "grid_size": SIZE // 8,
        },
    },
}


def new_deqa() -> Deqa:
    """Return an untrained DeQA of 0.4 M parameters.

    Faults show in fine detail, which is far weaker than plain colour: the first normalisation would
    leave nothing of it. So three quarters of the patch filters start blind to plain colour, and
    four times as strong.
    """
    from rewards.heads.deqa.config import DeqaConfig
    from rewards.heads.deqa.model import Deqa

    model = Deqa(DeqaConfig.from_dict(CONFIG))
    for table in (model.model.embed_tokens, model.lm_head):
        nn.init.normal_(table.weight, std=0.02)
    filters = model.model.vision_model.embeddings.patch_embed.weight  # [D, 3, patch, patch]
    fine = filters.detach()[: 3 * len(filters) // 4]
    fine.sub_(fine.mean(dim=(2, 3), keepdim=True)).mul_(4)
    return model


def soft_labels(ratings: Tensor) -> Tensor:
    """Return probabilities of the five levels, best first, whose mean is the rating.

    Args:
        ratings: Ratings ``[N]``, 1 to 5.

    Returns:
        ``[N, 5]``; of at most two neighbouring levels.
    """
    worth = torch.arange(5, 0, -1)
    return (1 - (ratings[:, None] - worth).abs()).clamp(min=0)


def spoilt_stock(count: int, rng: random.Random, vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """Draw scenes in varied looks, spoilt to known degrees.

    A look leaves the rating alone: what prompts leave open is no fault. Two faults leave the
    product of what each alone leaves.

    Args:
        count: Scenes; there are ``_PER_SCENE`` images of each.
        rng: Source of what is random.
        vae: The embedded pipeline's autoencoder.

    Returns:
        Images ``[M, 3, 64, 64]`` uint8, and their ratings ``[M]`` from 1 to 5.
    """
    pieces = [_spoilt(min(_AT_ONCE, count - at), rng, vae) for at in range(0, count, _AT_ONCE)]
    images, ratings = zip(*pieces, strict=True)
    return torch.cat(images), torch.cat(ratings)


def train_deqa(folder: Path, seed: int, steps: int, batch: int, lr: float = 0.02) -> None:
    """Train the judge and save it to ``folder/deqa`` in float16.

    Args:
        folder: Made if missing.
        seed: Seed of weights, scenes and what is done to them.
        steps: Number of optimizer steps.
        batch: Images per update.
        lr: Peak rate of Muon.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"deqa {seed}")
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    model = new_deqa()
    images, ratings = spoilt_stock(min(_STOCK, steps * batch), rng, load_vae())
    optimizer = MuonWithAdamW(
        model.named_parameters(),
        lambda name: "layers." in name,
        lr=lr,
        adam_lr=2e-3,
        steps=steps,
    )
    for _ in (bar := progress_bar(range(steps), title="deqa", position=1)):
        rows = torch.randint(len(images), (batch,), generator=generator)
        logits = model(normalise(_flip(images[rows], generator)))  # [B, 5]
        loss = F.cross_entropy(logits, soft_labels(ratings[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    _save(model, folder / "deqa")


def _spoilt(count: int, rng: random.Random, vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    ways = list(degradations(vae).values())
    images = make_stock(count, rng, vae).images.repeat(_PER_SCENE, 1, 1, 1) / 255
    images = vary(images, generator, shift=4, tint=0.0, grain=0.0)
    left = torch.ones(len(images))  # share of quality that is left
    spoilt = torch.arange(count, len(images))
    for rows in (spoilt, _some(spoilt, generator)):
        strengths = torch.rand(len(rows), generator=generator)
        kinds = [rng.randrange(len(ways)) for _ in range(len(rows))]
        images[rows] = spoil(images[rows], strengths, kinds, ways, generator)
        left[rows] *= 1 - strengths
    return quantise(images), _WORST + (_BEST - _WORST) * left


def _some(rows: Tensor, generator: Generator) -> Tensor:
    return rows[torch.rand(len(rows), generator=generator) < _TWICE]


def _flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror half of the images: a fault is one in the mirror too."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def _save(model: Deqa, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    save_file(model.half().state_dict(), folder / "model.safetensors")
