"""A small CLIP for the scenes and, on its image embedding, a small aesthetic head.

Contrastive as CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020), with two prompts beside
each right one that are wrong in one thing (colour, shape, letter): what picks among siblings of one
prompt are details, and other scenes in a batch rarely differ in one alone.

The aesthetic head has the layers of the LAION predictor (linear ones, nothing in between) and is
taught ``rule.beauty`` at the same time. Otherwise the embedding would forget all that prompts leave
open, and the head could not see it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.pretrained.preprocessing import CLIP_MEAN, CLIP_STD, normalise
from rewards.progress_bar import progress_bar
from tiny_judges.data import confusable, load_vae, make_stock, quantise, vary
from tiny_judges.rule import beauty
from tiny_pipeline.muon import MuonWithAdamW
from tiny_pipeline.scenes import SIZE, Scene
from tiny_pipeline.tokenizers import MAX_LENGTH, clip_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

DIMENSION = 64  # numbers in an embedding
_HEAD_WIDTHS = (64, 85, 11, 5, 2, 1)  # 768, 1024, 128, 64, 16, 1 over 12, at least 2
_MIDDLE = 5.0  # an ordinary rating
_WRONG = 2  # confusable prompts per image
_STOCK = 6144  # images, each varied anew whenever it is drawn


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return an untrained CLIP: patches of 8 pixels, 3 + 2 layers, 0.4 M parameters."""
    from transformers import CLIPConfig, CLIPModel

    common = {"hidden_act": "quick_gelu", "projection_dim": DIMENSION}
    return CLIPModel(
        CLIPConfig(
            projection_dim=DIMENSION,
            vision_config={
                "hidden_size": 96,
                "intermediate_size": 288,
                "num_hidden_layers": 3,
                "num_attention_heads": 3,
                "image_size": SIZE,
                "patch_size": 8,
            }
            | common,
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 64,
                "intermediate_size": 192,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": MAX_LENGTH,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            }
            | common,
        )
    )


class AestheticLayers(nn.Module):
    """The layers of the LAION aesthetic predictor, named as in its file, over 12."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                name: nn.Linear(wide, narrow)
                for name, wide, narrow in zip(
                    ("0", "2", "4", "6", "7"), _HEAD_WIDTHS, _HEAD_WIDTHS[1:], strict=False
                )
            }
        )

        with torch.no_grad():
            self.get_parameter("layers.7.bias").fill_(_MIDDLE)  # or it is all that is learnt first

    def forward(self, embedding: Tensor) -> Tensor:
        """Return ratings ``[N]`` of normalised embeddings ``[N, DIMENSION]``."""
        for layer in self.layers.values():
            embedding = layer(embedding)
        return embedding.squeeze(1)


def contrastive_loss(scaled: Tensor, same: Tensor) -> Tensor:
    """Return the cross-entropy of the right prompt among all, and of the right image among all.

    Args:
        scaled: Logits ``[B, T]`` of B images and T prompts, of which the first B belong to them.
        same: Whether the prompt is right for the image, ``[B, T]`` bool. Right ones beside the
            own one are left out of the sum.

    Returns:
        A scalar, the mean of both.
    """
    count = len(scaled)
    own = torch.arange(count)
    others = same.clone()
    others[own, own] = False
    kept = scaled.masked_fill(others, -torch.inf)
    return (F.cross_entropy(kept, own) + F.cross_entropy(kept[:, :count].T, own)) / 2


def train_clip(folder: Path, seed: int, steps: int, batch: int, lr: float = 0.02) -> None:
    """Train both and save them to ``folder/clip`` and ``folder/aesthetic``, in float16.

    Args:
        folder: Made if missing.
        seed: Seed of weights, scenes and their variation.
        steps: Number of optimizer steps.
        batch: Images per update.
        lr: Peak rate of Muon.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"clip {seed}")
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    tokenizer = clip_tokenizer()
    model, head = new_clip(tokenizer), AestheticLayers()
    stock = make_stock(min(_STOCK, steps * batch), rng, load_vae())
    optimizer = MuonWithAdamW(
        [*model.named_parameters(), *head.named_parameters(prefix="aesthetic")],
        lambda name: ".self_attn." in name or ".mlp." in name,
        lr=lr,
        adam_lr=2e-3,
        steps=steps,
    )
    for _ in (bar := progress_bar(range(steps), title="clip", position=0)):
        chosen = torch.randint(len(stock.scenes), (batch,), generator=generator).tolist()
        images = quantise(vary(stock.images[chosen] / 255, generator))  # as a head receives them
        scenes = [stock.scenes[index] for index in chosen]
        texts = [*scenes, *(confusable(scene, rng) for scene in scenes * _WRONG)]
        seen = F.normalize(model.get_image_features(normalise(images)).pooler_output, dim=-1)
        read = F.normalize(_text_features(model, tokenizer, texts), dim=-1)
        scaled = model.logit_scale.exp() * seen @ read.T  # [B, (1 + _WRONG) B]
        match = contrastive_loss(scaled, _same(scenes, texts))
        rating = F.mse_loss(head(seen), beauty(images / 255))
        optimizer.zero_grad()
        (match + rating).backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6)  # exp(4.6) = 100, as CLIP does
        bar.set_postfix(match=f"{match.item():.3f}", rating=f"{rating.item():.3f}", refresh=False)
    _save(model, head, tokenizer, folder)


def _text_features(model: CLIPModel, tokenizer: CLIPTokenizer, scenes: list[Scene]) -> Tensor:
    prompts = [scene.prompt for scene in scenes]
    tokens = tokenizer(prompts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")
    features: Tensor = model.get_text_features(**tokens).pooler_output
    return features


def _same(scenes: list[Scene], texts: list[Scene]) -> Tensor:
    numbers = {scene: index for index, scene in enumerate(dict.fromkeys(texts))}
    rows, columns = ([numbers[scene] for scene in each] for each in (scenes, texts))
    return torch.tensor(rows)[:, None] == torch.tensor(columns)


def _save(model: CLIPModel, head: AestheticLayers, tokenizer: CLIPTokenizer, folder: Path) -> None:
    from safetensors.torch import save_file

    model.half().save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": SIZE},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    text = json.dumps(preprocessing, indent=2) + "\n"
    (folder / "clip" / "preprocessor_config.json").write_text(text)
    (folder / "aesthetic").mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in head.half().state_dict().items()}
    save_file(tensors, folder / "aesthetic" / "model.safetensors")
