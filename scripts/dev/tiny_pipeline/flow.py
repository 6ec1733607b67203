"""Pre-training: transformer and text encoders learn together by flow matching on cached latents.

Flow matching as in Stable Diffusion 3 (Esser et al., 2024, https://arxiv.org/abs/2403.03206): for
data x, noise e and a logit-normal level s in (0, 1), the transformer sees (1 - s) x + s e and
learns the velocity e - x. A tenth of the prompts is dropped, so that guidance works. Nothing in SD3
masks the padding of a prompt, and how much there is depends on the call (``max_sequence_length``,
256 unless told): so some updates see far more of it, and the model learns to look past it.
"""

import copy
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from rewards.progress_bar import progress_bar
from tiny_pipeline import parallel
from tiny_pipeline.models import new_clip, new_scheduler, new_t5, new_transformer
from tiny_pipeline.muon import MuonWithAdamW
from tiny_pipeline.scenes import TRAIN_WORDS, Scene, all_shapes, all_signs
from tiny_pipeline.tokenizers import END, MAX_LENGTH, clip_tokenizer, t5_tokenizer
from tiny_pipeline.vae import draw_scenes, to_model

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline
    from transformers import PreTrainedTokenizerBase

SIGNS = 0.65  # share of signs among the scenes
SCRIBBLED = 0.4  # share of signs with strokes in the place of letters
_HIDDEN = (".attn", ".ff", ".layers.", ".block.")  # parts of the names of hidden matrices
LONG_EVERY, LONG = 10, 96  # every tenth update pads T5's prompts to this length


class TinySD3(torch.nn.Module):
    """All that learns in this stage; encodes prompts as the SD3 pipeline does, with gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizers: list[PreTrainedTokenizerBase] = [
            clip_tokenizer(END),
            clip_tokenizer("!"),
            t5_tokenizer(),
        ]
        self.transformer = new_transformer()
        self.clip_1 = new_clip(self.tokenizers[0])
        self.clip_2 = new_clip(self.tokenizers[1])
        self.t5 = new_t5(len(self.tokenizers[2]))

    def tokenize(self, prompts: list[str]) -> torch.Tensor:
        """Return token ids for the three encoders: ``[3, P, MAX_LENGTH]``."""
        options = {"padding": "max_length", "max_length": MAX_LENGTH, "return_tensors": "pt"}
        return torch.stack([t(prompts, **options).input_ids for t in self.tokenizers])

    def encode(self, ids: torch.Tensor, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed prompts: ``[N, 2 * MAX_LENGTH + padding, WIDTH]``, and pooled ``[N, 128]``."""
        clips = [
            clip(input_ids=i, output_hidden_states=True)
            for clip, i in zip((self.clip_1, self.clip_2), ids, strict=False)
        ]
        from_clip = torch.cat([c.hidden_states[-2] for c in clips], dim=-1)
        from_t5 = self.t5(input_ids=F.pad(ids[2], (0, padding)))[0]  # T5 pads with 0
        from_clip = F.pad(from_clip, (0, from_t5.shape[-1] - from_clip.shape[-1]))
        pooled = torch.cat([c.text_embeds for c in clips], dim=-1)
        return torch.cat([from_clip, from_t5], dim=-2), pooled

    def forward(
        self, noisy: torch.Tensor, level: torch.Tensor, ids: torch.Tensor, padding: int = 0
    ) -> torch.Tensor:
        """Return the velocity at ``noisy [N, 16, 8, 8]``, of levels ``[N]``, ids ``[3, N, L]``."""
        context, pooled = self.encode(ids, padding)
        return self.transformer(noisy, context, pooled, timestep=1000 * level, return_dict=False)[0]

    def pipeline(self, vae: torch.nn.Module) -> "StableDiffusion3Pipeline":
        """Return the parts, put together as diffusers loads them."""
        from diffusers import StableDiffusion3Pipeline

        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=new_scheduler(),
            vae=vae,
            text_encoder=self.clip_1,
            tokenizer=self.tokenizers[0],
            text_encoder_2=self.clip_2,
            tokenizer_2=self.tokenizers[1],
            text_encoder_3=self.t5,
            tokenizer_3=self.tokenizers[2],
        )


@torch.no_grad()
def latent_stock(
    vae: "AutoencoderKL", count: int, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor, list[Scene]]:
    """Draw ``count`` scenes of the pre-training vocabulary and encode them.

    Returns:
        Latents ``[count, 16, 8, 8]``, centred and scaled; the index of each one's scene
        ``[count]``; the scenes.
    """
    signs, shapes = all_signs(TRAIN_WORDS), all_shapes()
    scenes: list[Scene] = [*signs, *shapes]
    odds = [SIGNS / len(signs)] * len(signs) + [(1 - SIGNS) / len(shapes)] * len(shapes)
    chosen = rng.choices(range(len(scenes)), odds, k=count)
    latents = []
    for start in range(0, count, 64):
        images = draw_scenes([scenes[i] for i in chosen[start : start + 64]], rng, SCRIBBLED)
        latents.append(vae.encode(to_model(images)).latent_dist.mean)
    scaled = (torch.cat(latents) - vae.config.shift_factor) * vae.config.scaling_factor
    return scaled, torch.tensor(chosen), scenes


def train_transformer(
    rank: int, world: int, folder: Path, seed: int, steps: int, batch: int, lr: float = 0.02
) -> None:
    """Train transformer and text encoders on the autoencoder in ``folder/vae``.

    Args:
        rank: Rank of this process.
        world: Number of processes.
        folder: Where ``from_pretrained`` will find the whole pipeline, in float16.
        seed: Seed of weights, scenes and noise.
        steps: Number of optimizer steps.
        batch: Scenes per update, over all processes.
        lr: Peak rate of Muon.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)  # equal weights in every process
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    vae.register_to_config(_name_or_path="")  # or the builder's path would be shipped
    model = TinySD3()
    average = copy.deepcopy(model).requires_grad_(False)
    torch.manual_seed(1000 * seed + rank)
    share = batch // world
    rng = random.Random(f"flow {seed} {rank}")
    latents, chosen, scenes = latent_stock(vae, min(12288 // world, share * steps), rng)
    ids = model.tokenize([scene.prompt for scene in scenes] + [""])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = MuonWithAdamW(
        model.named_parameters(),
        lambda name: "relative" not in name and any(part in name for part in _HIDDEN),
        lr=lr,
        adam_lr=2e-3,
        steps=steps,
    )
    for step in (bar := progress_bar(range(steps), title="transformer", shown=rank == 0)):
        at = torch.randint(len(latents), (share,))
        data, prompt = latents[at], chosen[at]
        prompt = torch.where(torch.rand(share) < 0.1, len(scenes), prompt)  # the empty prompt
        level = torch.sigmoid(torch.randn(share))
        s = level.view(-1, 1, 1, 1)
        noise = torch.randn_like(data)
        padding = LONG - MAX_LENGTH if step % LONG_EVERY == 0 else 0
        velocity = model((1 - s) * data + s * noise, level, ids[:, prompt], padding)
        loss = F.mse_loss(velocity, noise - data)
        optimizer.zero_grad()
        loss.backward()
        parallel.average_gradients(parameters)
        optimizer.step()
        _follow(average, model, min(0.995, (step + 1) / (step + 10)))
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    if rank == 0:
        save_pipeline(average.pipeline(vae), folder)


@torch.no_grad()
def _follow(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Move the exponential moving average of the weights one step."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def save_pipeline(pipeline: "StableDiffusion3Pipeline", folder: Path) -> None:
    """Save float16 weights that load as float32 unless another type is asked for.

    diffusers loads its own models so. transformers follows the config instead, and would mix the
    types.
    """
    pipeline.to(torch.float16).save_pretrained(folder)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        path = folder / name / "config.json"
        config = json.loads(path.read_text()) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
