"""Stable Diffusion 3 pipelines of any size with random weights, and trainers on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from moa_diffusion import assembly
from moa_diffusion.config import Config
from moa_diffusion.planning.shapes import published_shape
from moa_diffusion.training.loop import Run
from moa_diffusion.training.trainer import Trainer
from tiny_pipeline.tokenizers import MAX_LENGTH, clip_tokenizer, t5_tokenizer

CHEAP_HEAD: dict[str, Any] = {"colourfulness": {"weight": 1.0}}  # scores, and costs next to nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Arguments of a pipeline's parts."""

    transformer: Mapping[str, Any]
    clip: Mapping[str, Any]  # CLIP-L
    clip_2: Mapping[str, Any]  # OpenCLIP bigG
    t5: Mapping[str, Any]
    vae: Mapping[str, Any]
    vocabularies: tuple[int, int] | None = None  # sizes for CLIP and T5; None fits the tokenizers
    clip_tokens: int = MAX_LENGTH


# 2.24 B parameters (and a position table of 0.23 B numbers), encoders of 0.12, 0.69 and 4.76 B, VAE
# of 0.08 B.
_SHAPE = published_shape("stabilityai/stable-diffusion-3.5-medium")
_CLIP, _CLIP_2, _T5 = _SHAPE.encoders.values()
MEDIUM = Sizes(
    transformer=_SHAPE.transformer,
    clip=_CLIP,
    clip_2=_CLIP_2,
    t5=_T5,
    vae=_SHAPE.vae,
    vocabularies=(49408, 32128),
    clip_tokens=77,
)


def _small(*, layers: int, heads: int, side: int, channels: tuple[int, ...]) -> Sizes:
    """Return the architecture with ``heads`` heads of 64 over latents of ``side`` x ``side``."""
    width = 64 * heads
    clip = {**_CLIP, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip |= {"hidden_size": width // 2, "intermediate_size": 2 * width}
    clip |= {"projection_dim": width // 2}
    t5 = {"d_model": width, "d_kv": 64, "d_ff": 2 * width, "num_layers": 2, "num_heads": heads}
    blocks = len(channels)
    return Sizes(
        transformer={
            **_SHAPE.transformer,
            "sample_size": side,
            "num_layers": layers,
            "num_attention_heads": heads,
            "joint_attention_dim": width,
            "caption_projection_dim": width,
            "pooled_projection_dim": width,
            "pos_embed_max_size": side // 2,
            "dual_attention_layers": tuple(range(layers // 2)),
        },
        clip=clip,
        clip_2=clip,
        t5={**_T5, **t5},
        vae={
            **_SHAPE.vae,
            "down_block_types": ("DownEncoderBlock2D",) * blocks,
            "up_block_types": ("UpDecoderBlock2D",) * blocks,
            "block_out_channels": channels,
            "layers_per_block": 1,
            "norm_num_groups": 8,
        },
    )


BASE = _small(layers=5, heads=3, side=16, channels=(16, 32, 32, 32))
SMALLEST = _small(layers=2, heads=1, side=4, channels=(8, 8))
WIDE = _small(layers=2, heads=16, side=32, channels=(16, 32, 32, 32))  # width 1024
SIZES = {"medium": MEDIUM, "base": BASE, "wide": WIDE, "tiny": SMALLEST}


def random_pipeline(
    sizes: Sizes,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    encoders: bool = True,
) -> Any:
    """Return a ``StableDiffusion3Pipeline`` with untrained weights, made where and as it is used.

    The tokenizers are those of ``moa_diffusion.tiny``: nothing is downloaded.

    Args:
        sizes: Sizes of its parts.
        device: Device of all parts.
        dtype: Data type of the transformer and the text encoders.
        vae_dtype: Data type of the VAE.
        seed: Seed of the weights; the global generators are left alone.
        encoders: Whether it has text encoders; the other parts are the same without.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    tokenizers = clip_tokenizer(), clip_tokenizer(pad_token="!"), t5_tokenizer()
    for tokenizer in tokenizers[:2]:
        tokenizer.model_max_length = sizes.clip_tokens
    with made_as(device, dtype, seed):
        transformer = SD3Transformer2DModel(**sizes.transformer)
        clip, clip_2, t5 = _encoders(sizes, tokenizers) if encoders else (None, None, None)
    transformer.pos_embed.to(dtype)  # its table is made in float32, and loaded as the rest
    with made_as(device, vae_dtype, seed):
        vae = AutoencoderKL(**sizes.vae)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizers[0],
        text_encoder_2=clip_2,
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5,
        tokenizer_3=tokenizers[2],
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def parameter_count(pipeline: Any) -> int:
    """Count the parameters of the transformer and the text encoders."""
    parts = (
        pipeline.transformer,
        pipeline.text_encoder,
        pipeline.text_encoder_2,
        pipeline.text_encoder_3,
    )
    return sum(p.numel() for part in parts if part is not None for p in part.parameters())


def trainer_on(
    pipeline: Any, settings: Config, folder: str, rewards: Mapping[str, Any] = CHEAP_HEAD
) -> tuple[Run, Trainer]:
    """Return the run that ``assembly`` makes on this pipeline, and what learns in it.

    Args:
        pipeline: The pipeline, which is taken over by the policy.
        settings: Its prompts, rewards and log are replaced: a benchmark needs no files.
        folder: Folder of the run.
        rewards: As in a configuration.
    """
    quiet = replace(
        settings,
        output_dir=folder,
        resume=None,
        rewards=dict(rewards),
        policy=replace(settings.policy, name="sd3", embeds_dir=None),
        prompts=replace(settings.prompts, train="tiny", heldout=None),
        evaluation=replace(settings.evaluation, every=0),
        log=replace(settings.log, trackers=[], scores=False),
    )
    run = assembly.trainer(quiet, pipeline)
    run.progress.bars = False
    assert isinstance(run.learner, Trainer)
    return run, run.learner


@contextmanager
def made_as(device: str, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Make parameters in the block on this device and in this dtype: no copy in main memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(before)


def _encoders(sizes: Sizes, tokenizers: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Make CLIP-L, OpenCLIP bigG and T5."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clip_words, t5_words = sizes.vocabularies or (len(tokenizers[0]), len(tokenizers[2]))
    marks = {
        "vocab_size": clip_words,
        "max_position_embeddings": sizes.clip_tokens,
        "bos_token_id": tokenizers[0].bos_token_id,
        "eos_token_id": tokenizers[0].eos_token_id,
        "pad_token_id": tokenizers[0].pad_token_id,
    }
    clip = CLIPTextModelWithProjection(CLIPTextConfig(**{**sizes.clip, **marks}))
    clip_2 = CLIPTextModelWithProjection(CLIPTextConfig(**{**sizes.clip_2, **marks}))
    t5 = T5EncoderModel(T5Config(**{**sizes.t5, "vocab_size": t5_words}))
    return clip.eval(), clip_2.eval(), t5.eval()
