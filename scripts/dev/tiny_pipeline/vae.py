"""The autoencoder: 64 x 64 pixels to 16 x 8 x 8 latents, by factor 8 as in Stable Diffusion 3.

Nearly all of the cost of a convolution lies at full resolution, nearly all of its parameters at the
lowest: so channels are few above and many below.
"""

import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from rewards.progress_bar import progress_bar
from tiny_pipeline import parallel
from tiny_pipeline.muon import MuonWithAdamW
from tiny_pipeline.scenes import COLOURS, SHAPES, SIZE, TRAIN_WORDS, Scene, Shape, Sign, draw

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

LETTERS = sorted(set("".join(TRAIN_WORDS)))


def new_vae() -> "AutoencoderKL":
    """Return an untrained autoencoder of 1.5 M parameters."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        block_out_channels=(16, 16, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=SIZE,
    )
    bias = vae.encoder.conv_out.bias
    assert bias is not None
    with torch.no_grad():
        bias[16:] = -4.0  # log variance: start with little noise, or nothing is learnt for long
    return vae


def random_scene(rng: random.Random) -> Scene:
    """Return a scene to learn to compress.

    It is a shape, a sign of a training word, or one of random letters.

    Only the autoencoder sees random letters, and it sees no prompts: it learns strokes, not
    spelling.
    """
    colour, background = rng.sample(list(COLOURS), 2)
    if rng.random() < 0.35:
        return Shape(colour=colour, shape=rng.choice(SHAPES), background=background)
    if rng.random() < 0.5:
        return Sign(colour=colour, word=rng.choice(TRAIN_WORDS))
    return Sign(colour=colour, word="".join(rng.choices(LETTERS, k=rng.choice((2, 3, 3, 4, 4)))))


def draw_scenes(scenes: list[Scene], rng: random.Random, scribbled: float = 0.0) -> torch.Tensor:
    """Draw scenes as ``draw`` does: ``[N, 3, SIZE, SIZE]``, uint8."""
    images = [bytearray(draw(scene, rng, scribbled).tobytes()) for scene in scenes]
    drawn = torch.stack([torch.frombuffer(image, dtype=torch.uint8) for image in images])
    return drawn.view(-1, SIZE, SIZE, 3).permute(0, 3, 1, 2).contiguous()


def to_model(images: torch.Tensor) -> torch.Tensor:
    """Turn uint8 in 0 to 255 into float32 in -1 to 1."""
    return images.float() / 127.5 - 1


def reconstruction_loss(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return L1 and MSE, L1 at half and quarter size, and L1 of differences between neighbours.

    Args:
        made: Decoded images, ``[N, 3, H, W]``, in -1 to 1.
        wanted: Originals of the same shape.

    Returns:
        A scalar. The differences make edges sharp, so that letters keep their shape.
    """
    error = made - wanted
    loss = error.abs().mean() + 2 * error.square().mean()
    for factor in (2, 4):
        loss = loss + 0.5 * F.avg_pool2d(error, factor).abs().mean()
    for axis in (-1, -2):
        loss = loss + 0.5 * error.diff(dim=axis).abs().mean()
    return loss


def train_vae(
    rank: int, world: int, folder: Path, seed: int, steps: int, batch: int, lr: float = 0.02
) -> None:
    """Train the autoencoder and save it to ``folder`` (one process of ``parallel.run``).

    Args:
        rank: Rank of this process.
        world: Number of processes.
        folder: Where ``from_pretrained`` will find it.
        seed: Seed of weights and scenes.
        steps: Number of optimizer steps.
        batch: Images per update, over all processes.
        lr: Peak rate of Muon.
    """
    torch.manual_seed(seed)  # equal weights in every process
    vae = new_vae()
    torch.manual_seed(1000 * seed + rank)
    rng = random.Random(f"vae {seed} {rank}")
    share = batch // world
    stock = draw_scenes([random_scene(rng) for _ in range(min(8192 // world, share * steps))], rng)
    optimizer = MuonWithAdamW(
        vae.named_parameters(),
        lambda name: "conv_in" not in name and "conv_out" not in name,
        lr=lr,
        adam_lr=2e-3,
        steps=steps,
    )
    for _ in (bar := progress_bar(range(steps), title="vae", shown=rank == 0)):
        images = to_model(stock[torch.randint(len(stock), (share,))])
        posterior = vae.encode(images).latent_dist
        made = vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(made, images) + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        parallel.average_gradients(vae.parameters())
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    if rank == 0:
        _record_latent_scale(vae, to_model(stock[:512]))
        vae.save_pretrained(folder)


@torch.no_grad()
def _record_latent_scale(vae: "AutoencoderKL", images: torch.Tensor) -> None:
    """Write to the config what maps latents to zero mean and unit variance."""
    latents = vae.encode(images).latent_dist.mean
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4),
        shift_factor=round(latents.mean().item(), 4),
    )


@torch.no_grad()
def psnr(vae: "AutoencoderKL", images: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio of encoding (to the mean) and decoding, in dB."""
    made = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    return float(-10 * ((made - images) / 2).square().mean().log10())
