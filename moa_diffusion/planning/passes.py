"""What the passes of the transformer, the VAE and the text encoders cost.

The policy itself runs, with its LoRA, its autocast and its log-probabilities, on a transformer of a
few blocks without data. All blocks of a kind cost the same, so that a block more tells what a block
costs, and the whole follows. So no model is too large, and a plan takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moa_diffusion.config.schema import (
    EvaluationConfig,
    LossConfig,
    PolicyConfig,
    SamplingConfig,
)
from moa_diffusion.planning.counting import Counts
from moa_diffusion.planning.shapes import Shape, make_encoder, make_transformer, make_vae
from moa_diffusion.policies.sd3 import DTYPES, SD3Policy
from moa_diffusion.policies.sd3.prompt_encoder import ENCODERS
from moa_diffusion.types import Request, Rollout

# Two sizes of pass tell what a row costs. A pass of a single row is spared some copies.
ROWS = 2, 4
PROMPTS = 8  # encoded in one batch
# What all blocks add up to; of the rest the largest counts, and one block of each kind shows it.
ADDED = (
    "frozen",
    "blocks",
    "trained",
    "adapted",
    "flops",
    "all_flops",
    "moved",
    "all_moved",
    "saved",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A number that grows with a pass: ``fixed + each rows``."""

    fixed: float
    each: float

    def at(self, rows: int) -> float:
        """Return the number for a pass of so many rows."""
        return self.fixed + self.each * rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerCost:
    """Costs of a transformer with LoRA; a row is one latent at one noise level."""

    frozen_bytes: int  # frozen weights
    blocks_bytes: int  # the frozen weights in blocks, which `policy.shard` splits
    block_bytes: int  # the largest block
    trained: int  # trained parameters
    adapted: int  # layers with a LoRA
    forward_flops: float  # per row, without gradient
    training_flops: float  # per row, forward and backward, with what is computed again
    forward_moved: Linear  # bytes that are read and written
    training_moved: Linear
    forward_peak: Linear  # bytes, at most, beside the weights
    saved: Linear  # bytes that the graph holds for the backward pass
    temporary: Linear  # bytes beyond it, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCost:
    """Costs of the VAE's decoder by image, or of the text encoders by prompt."""

    weights: int  # bytes
    flops: float  # per image or prompt
    moved: Linear  # bytes that are read and written
    peak: Linear  # bytes, at most, beside the weights


def transformer_cost(
    shape: Shape, policy: PolicyConfig, *, resolution: int, tapped: bool = False
) -> TransformerCost:
    """Count the passes of a transformer.

    Args:
        shape: Sizes of the pipeline.
        policy: The section ``policy``: precision, LoRA, checkpointing, tokens of a prompt.
        resolution: Side of the images, in pixels.
        tapped: Whether the layers hand over the objectives' own gradients.

    Raises:
        ConfigError: If the transformer cannot draw images of this size.
        ValueError: If the LoRA's target modules name no layer.
    """
    count = int(shape.transformer["num_layers"])
    second = set(shape.transformer.get("dual_attention_layers") or ())
    *inner, last = (i in second for i in range(count))
    # One block of each kind. The first one stays the first, since the backward pass ends in it, and
    # the last one, which drops the text, is a kind of its own.
    kinds = list(dict.fromkeys(inner))

    def counted(blocks: Sequence[bool], rows: int, *, forward: bool = False) -> dict[str, float]:
        return _counted(shape, policy, resolution, blocks, rows, tapped=tapped, forward=forward)

    few = counted([*kinds, last], ROWS[0], forward=True)
    many = counted([*kinds, last], ROWS[1])
    whole = dict(few)
    for kind in kinds:
        more = counted([*kinds, kind, last], ROWS[0])
        for name in ADDED:
            whole[name] += (inner.count(kind) - 1) * (more[name] - few[name])
        whole["temporary"] = max(whole["temporary"], more["temporary"])
    # What a pass has once, whatever its rows: casts of the LoRA, and reading the weights.
    grown = {"saved": whole["trained"] / few["trained"]}
    grown |= dict.fromkeys(("moved", "all_moved"), whole["frozen"] / few["frozen"])

    def linear(name: str) -> Linear:
        each = (many[name] - few[name]) / (ROWS[1] - ROWS[0])
        fixed = (few[name] - ROWS[0] * each) * grown.get(name, 1.0)
        return Linear(fixed=fixed, each=(whole[name] - fixed) / ROWS[0])

    size = DTYPES[policy.dtype].itemsize
    return TransformerCost(
        frozen_bytes=int(whole["frozen"]) * size,
        blocks_bytes=int(whole["blocks"]) * size,
        block_bytes=int(whole["block"]) * size,
        trained=int(whole["trained"]),
        adapted=int(whole["adapted"]),
        forward_flops=whole["flops"] / ROWS[0],
        training_flops=whole["all_flops"] / ROWS[0],
        forward_moved=linear("moved"),
        training_moved=linear("all_moved"),
        forward_peak=Linear(fixed=0, each=few["forward_peak"] / ROWS[0]),
        saved=linear("saved"),
        temporary=linear("temporary"),
    )


def decoder_cost(shape: Shape, dtype: str, resolution: int) -> PartCost:
    """Count the decoding of images.

    Args:
        shape: Sizes of the pipeline.
        dtype: Data type of the VAE.
        resolution: Side of the images, in pixels.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    side, kind = resolution // shape.pixels_per_latent, DTYPES[dtype]
    with FakeTensorMode(), torch.no_grad():
        vae = make_vae(shape, kind)
        one, two = Counts(state := _state(vae)), Counts(state)
        for images, counts in enumerate((one, two), start=1):
            latents = torch.empty(images, shape.vae["latent_channels"], side, side, dtype=kind)
            with counts:
                vae.decode(latents, return_dict=False)
    return PartCost(
        weights=sum(tensor.nbytes for tensor in state),
        flops=one.flops,
        moved=Linear(fixed=2 * one.moved - two.moved, each=two.moved - one.moved),
        peak=Linear(fixed=2 * one.peak - two.peak, each=two.peak - one.peak),
    )


def encoder_cost(shape: Shape, dtype: str, length: int) -> PartCost:
    """Count the encoding of prompts by all text encoders, one after the other.

    Args:
        shape: Sizes of the pipeline.
        dtype: Data type of the encoders.
        length: Number of T5's tokens.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    weights = flops = moved = peak = 0
    with FakeTensorMode(), torch.no_grad():
        for name, sizes in shape.encoders.items():
            encoder = make_encoder(name, sizes, DTYPES[dtype])
            state = _state(encoder)
            tokens = length if name == ENCODERS[2] else shape.clip_tokens
            counts = Counts(state)
            with counts:
                encoder(torch.zeros(PROMPTS, tokens, dtype=torch.long))
            weights += sum(tensor.nbytes for tensor in state)
            flops, moved = flops + counts.flops, moved + counts.moved
            peak = max(peak, counts.peak)
    return PartCost(
        weights=weights,
        flops=flops / PROMPTS,
        moved=Linear(fixed=0, each=moved / PROMPTS),
        peak=Linear(fixed=0, each=peak / PROMPTS),
    )


def _counted(
    shape: Shape,
    settings: PolicyConfig,
    resolution: int,
    blocks: Sequence[bool],
    rows: int,
    *,
    tapped: bool,
    forward: bool,
) -> dict[str, float]:
    """Count the passes of a transformer with these blocks on a batch of so many rows."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        policy = _policy(shape, settings, resolution, blocks)
        if tapped:
            policy.tapped()
        rollout = _rollout(policy, rows)
        state = _state(policy.transformer)
        training, sampling = Counts(state), Counts(state)
        with training:
            log_probs = policy.log_probs(rollout, slice(0, 1)).log_probs
            saved, flops, moved = training.live, training.flops, training.moved
            torch.autograd.backward(log_probs.sum())
        del log_probs
        if forward:
            with torch.no_grad(), sampling:
                policy.log_probs(rollout, slice(0, 1))
        trained = sum(p.numel() for p in policy.trainable().values())
        sizes = [
            sum(p.numel() for p in block.parameters() if not p.requires_grad)
            for block in policy.transformer.transformer_blocks
        ]
        return {
            "frozen": sum(tensor.numel() for tensor in state) - trained,
            "blocks": sum(sizes),
            "block": max(sizes),
            "trained": trained,
            "adapted": len(policy.trainable()) / 2,  # A and B
            "flops": flops,
            "all_flops": training.flops,
            "moved": moved,
            "all_moved": training.moved,
            "saved": saved,
            "temporary": training.peak - saved,
            "forward_peak": sampling.peak,
            "largest": training.largest,
        }


def _policy(
    shape: Shape, settings: PolicyConfig, resolution: int, blocks: Sequence[bool]
) -> SD3Policy:
    """Return the policy on fake tensors of the CPU, which compute like those of a GPU.

    A real device is not needed for what the shapes say. The autocast of GPUs runs layer
    normalization in float32, the CPU's does not: here it does.
    """
    from diffusers.configuration_utils import FrozenDict

    transformer = make_transformer(shape.transformer, DTYPES[settings.dtype], blocks)
    pipeline = SimpleNamespace(
        transformer=transformer,
        vae=nn.Identity(),
        vae_scale_factor=shape.pixels_per_latent,
        # Costs do not depend on the noise levels.
        scheduler=SimpleNamespace(
            config=FrozenDict({"num_train_timesteps": 1000}),
            sigmas=np.linspace(1, 0, 3),
            set_timesteps=lambda *arguments, **options: None,
        ),
    )
    with _nothing_moves():
        policy = SD3Policy(
            pipeline,
            # Operations are seen as they are called; no compiler takes what only counts them.
            settings=replace(settings, embeds_dir=None, shard=False, compile="off"),
            sampling=SamplingConfig(resolution=resolution, steps=2, guidance=1.0),
            evaluation=EvaluationConfig(steps=2),
            loss=LossConfig(),
            device=torch.device("cpu"),
            seed=0,
        )
    if policy.dtype != torch.float32:
        for module in transformer.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    length = shape.clip_tokens + settings.max_sequence_length
    width = shape.transformer["joint_attention_dim"], shape.transformer["pooled_projection_dim"]

    def encode(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        embeds = torch.empty(len(prompts), length, width[0], dtype=policy.dtype)
        return embeds, torch.empty(len(prompts), width[1], dtype=policy.dtype)

    policy.encode = encode  # type: ignore[assignment]
    return policy


def _rollout(policy: SD3Policy, rows: int) -> Rollout:
    """Return samples of one trained step each."""
    first: Any = np.zeros(rows, dtype=np.int64)  # a number is read, and fake tensors have none
    requests = tuple(Request(prompt=str(row), seed=row) for row in range(rows))
    return Rollout(
        requests=requests,
        log_probs=torch.empty(rows, 1),
        mask=torch.ones(rows, 1, dtype=torch.bool),
        trace={"latents": torch.empty(rows, 2, *policy.latent_shape), "first_step": first},
        bare=True,
    )


def _state(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextmanager
def _nothing_moves() -> Iterator[None]:
    """Have modules stay where they are within the block: ``to`` cannot replace fake parameters."""
    move = nn.Module.to
    nn.Module.to = lambda self, *arguments, **options: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.to = move  # type: ignore[method-assign]
