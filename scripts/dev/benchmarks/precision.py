"""How far gradients in half precision are from those in float32, by loss scale.

The loss divides by the decisions of a minibatch, and a log-probability is a mean over the numbers
of a latent: what the backward pass starts from is about ``1e-3 / 65,536`` at 512 pixels. Without a
loss scale that fits, parts of it are below the smallest number of float16 (6e-8) and vanish; more
of them in a deeper and wider model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.phases import machine
from benchmarks.pipelines import SMALLEST, random_pipeline
from moa_diffusion.config.schema import (
    EvaluationConfig,
    LoraConfig,
    LossConfig,
    PolicyConfig,
    SamplingConfig,
)
from moa_diffusion.policies.sd3 import DTYPES, SD3Policy
from moa_diffusion.training.stepper import first_scale
from moa_diffusion.types import Request

STEPS = 10  # nine of them are trained
SAMPLES = 576  # samples in a minibatch: 48 prompts, 24 siblings, 2 updates
PAMA = 0.18  # typical size of its advantages; other methods' are about 1
PROMPT, RANK = "a red circle", 32


def measure_precision(
    *,
    layers: int,
    heads: int,
    side: int,
    steps: Sequence[int] = range(STEPS - 1),
    scales: Sequence[float] = (),
    dtype: str = "float16",
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure relative errors of the LoRA gradient of a decision, as a minibatch weighs it.

    Args:
        layers: Layers of a transformer with random weights.
        heads: Heads of 64, the transformer's width.
        side: Side of the latents, which have 16 channels.
        steps: Denoising steps, from 0 to 8; all nine make the row "nine together" as well.
        scales: Loss scales; by default the one that GradScaler starts from and the one that
            training starts from.
        dtype: The half precision: 'float16' or 'bfloat16'.
        device: Where both are computed.

    Returns:
        A list ``rows``: trained steps per rollout, size of the advantages, scale, step (None: the
        sum over the nine), relative ``error`` and ``cosine``; NaN where the gradient overflows.
    """
    torch.set_num_threads(1)
    exact, half = _policies(layers, heads, side, DTYPES[dtype], torch.device(device))
    dimensions = half.dimensions
    scales = tuple(scales) or (2.0**16, first_scale(dimensions))
    rollout = exact.sample([Request(prompt=PROMPT, seed=0)], step=0)
    cases = [(w, size, scale) for w in (2, STEPS - 1) for size in (1.0, PAMA) for scale in scales]
    found: dict[tuple[int, float, float], list[Any]] = {}  # step, gradient, expected
    for step in steps:
        expected = _gradient(exact, rollout, step, [1.0])[0]
        seeds = [size * scale / (SAMPLES * window) for window, size, scale in cases]
        for case, gradient in zip(cases, _gradient(half, rollout, step, seeds), strict=True):
            found.setdefault(case, []).append((step, gradient, expected))
    rows = []
    for (window, size, scale), entries in found.items():
        if len(entries) == STEPS - 1:
            sums = (torch.stack([entry[i] for entry in entries]).sum(0) for i in (1, 2))
            entries.append((None, *sums))
        for step_, gradient, expected in entries:
            row: dict[str, Any] = {"window": window, "advantages": size, "scale": scale}
            rows.append(row | {"step": step_} | _compared(gradient, expected))
    return {
        "layers": layers,
        "hidden": half.transformer.inner_dim,
        "dimensions": dimensions,
        "samples": SAMPLES,
        "dtype": dtype,
        "machine": machine(),
        "rows": rows,
    }


def _policies(
    layers: int, heads: int, side: int, dtype: torch.dtype, device: torch.device
) -> tuple[SD3Policy, SD3Policy]:
    """Return the same numbers in float32 and in a half, with an adapter whose B is not zero."""
    shape = {
        **SMALLEST.transformer,
        "sample_size": side,
        "pos_embed_max_size": side // 2,
        "num_layers": layers,
        "num_attention_heads": heads,
        "caption_projection_dim": 64 * heads,
        "dual_attention_layers": tuple(range(layers // 2)),
    }
    pipeline, other = (random_pipeline(replace(SMALLEST, transformer=shape)) for _ in range(2))
    pipeline.transformer.type(dtype).float()  # numbers that both types have
    other.transformer.type(dtype)
    made = []
    for part in (pipeline, other):
        policy = SD3Policy(
            part,
            settings=PolicyConfig(
                max_sequence_length=32, lora=LoraConfig(rank=RANK, alpha=2 * RANK)
            ),
            sampling=SamplingConfig(
                resolution=side * part.vae_scale_factor, steps=STEPS, guidance=1.0
            ),
            evaluation=EvaluationConfig(),
            loss=LossConfig(),
            device=device,
            seed=0,
        )
        policy.prepare([PROMPT])
        source = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in policy.trainable().values():
                noise = torch.randn(parameter.shape, generator=source)
                parameter.add_(0.01 * noise.to(device))
        made.append(policy)
    made[1].encode = made[0].encode  # the same embeddings
    return made[0], made[1]


def _gradient(policy: SD3Policy, rollout: Any, step: int, seeds: Sequence[float]) -> list[Tensor]:
    """Return flat gradients of ``seed * log p`` in float32, over the seed; one for each seed."""
    log_probs = policy.log_probs(rollout, slice(step, step + 1)).log_probs
    parameters = list(policy.trainable().values())
    found = []
    for number, seed in enumerate(seeds):
        again = number < len(seeds) - 1
        parts = torch.autograd.grad(
            seed * log_probs.sum(), parameters, retain_graph=again, materialize_grads=True
        )
        found.append(torch.cat([part.flatten() for part in parts]).double().cpu() / seed)
    return found


def _compared(gradient: Tensor, expected: Tensor) -> dict[str, float]:
    product = float(gradient @ expected)
    return {
        "error": float((gradient - expected).norm() / expected.norm()),
        "cosine": product / float(gradient.norm() * expected.norm()),
    }
