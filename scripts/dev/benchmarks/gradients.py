"""On the CPU: what the gradients of K objectives cost, in ordinary backward passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
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
from moa_diffusion.training.gradients import CHUNK, ObjectiveGradients
from moa_diffusion.types import Request
from tiny_pipeline.tokenizers import MAX_LENGTH

COUNTS = (1, 2, 4, 8)  # K
TARGETS = {4: 1.2, 8: 1.4}  # ordinary backward passes
SEPARATE = 4  # K of the separate backward passes
SAMPLES, GUIDANCE, RANK = 2, 4.5, 32
LAYERS, HEADS = 2, 16  # a head is 64 wide, so the width is 1024
SIDE = 32  # the side of the latents: 256 image tokens
PROMPT = "a red circle"

Timed = tuple[float, float]  # CPU seconds of the forward pass, and of the backward passes


def measure_gradients(dtype: str, *, rounds: int) -> dict[str, Any]:
    """Measure an ordinary backward pass and each way to K gradients, interleaved, in CPU seconds.

    Every measurement has a forward pass of its own, which is timed apart.

    Args:
        dtype: Data type of a transformer with random weights: 'float32', or 'bfloat16' under
            autocast.
        rounds: Measured rounds, after one that warms up.

    Returns:
        A list ``ways`` with medians over the rounds (seconds of ``forward`` and ``backward``) and
        their ratio to the first, the bytes of its rows, and those of the largest temporary.
    """
    torch.set_num_threads(1)
    policy = _policy(dtype)
    policy.prepare([PROMPT])
    rollout = policy.sample([Request(prompt=PROMPT, seed=seed) for seed in range(SAMPLES)], step=0)
    parameters = policy.trainable()
    source = torch.Generator().manual_seed(0)
    coefficients = torch.randn(max(COUNTS), SAMPLES, 1, generator=source)
    rows = {
        count: ObjectiveGradients(parameters, policy.tapped(), count, copies=policy.row_copies)
        for count in COUNTS
    }

    def forward() -> Tensor:
        return policy.log_probs(rollout, slice(0, 1)).log_probs

    def ordinary(log_probs: Tensor) -> None:
        torch.autograd.backward((coefficients[0] * log_probs).sum())
        for parameter in parameters.values():
            parameter.grad = None

    def separate(log_probs: Tensor) -> None:
        for k in range(SEPARATE):
            loss, weights = (coefficients[k] * log_probs).sum(), list(parameters.values())
            again = k < SEPARATE - 1
            torch.autograd.grad(loss, weights, retain_graph=again, allow_unused=True)

    def together(count: int, log_probs: Tensor) -> None:
        rows[count].backward(log_probs, coefficients[:count])

    ways = [_timed(forward, ordinary)]
    ways += [_timed(forward, partial(together, count)) for count in COUNTS]
    ways.append(_timed(forward, separate))
    names = ["one ordinary backward", *(f"K = {count}, one backward" for count in COUNTS)]
    names.append(f"K = {SEPARATE}, {SEPARATE} backwards")
    counts = [1, *COUNTS, SEPARATE]
    targets = [None, *(TARGETS.get(count) for count in COUNTS), None]
    sizes = [parameter.numel() for parameter in parameters.values()]
    medians = _interleaved(ways, rounds)
    unit, batch = medians[0], 2 * SAMPLES  # guided
    return {
        "hidden": policy.transformer.inner_dim,
        "layers": LAYERS,
        "tokens": [(SIDE // 2) ** 2, len(policy.encode([PROMPT])[0][0])],  # image, text
        "rank": RANK,
        "rows": batch,
        "dtype": dtype,
        "rounds": rounds,
        "machine": machine(),
        "trained": sum(sizes),
        # The gradients of a chunk of rows; in half precision they are made in two bytes first.
        "temporary_bytes": min(batch, max(1, CHUNK // max(sizes)))
        * max(sizes)
        * (4 if dtype == "float32" else 6),
        "ways": [
            {
                "name": name,
                "forward": seconds[0],
                "backward": seconds[1],
                "ratio": seconds[1] / unit[1],
                "ratio_with_forward": sum(seconds) / sum(unit),
                "target": target,
                "bytes": 4 * count * sum(sizes),
            }
            for name, count, target, seconds in zip(names, counts, targets, medians, strict=True)
        ],
    }


def _policy(dtype: str) -> SD3Policy:
    """Make a policy with an adapter whose B is not zero: A has gradients too."""
    shape = {
        **SMALLEST.transformer,
        "sample_size": SIDE,
        "pos_embed_max_size": SIDE // 2,
        "num_layers": LAYERS,
        "num_attention_heads": HEADS,
        "caption_projection_dim": 64 * HEADS,
    }
    pipeline = random_pipeline(replace(SMALLEST, transformer=shape), dtype=DTYPES[dtype])
    policy = SD3Policy(
        pipeline,
        settings=PolicyConfig(max_sequence_length=MAX_LENGTH, lora=LoraConfig(rank=RANK)),
        sampling=SamplingConfig(
            resolution=SIDE * pipeline.vae_scale_factor, steps=2, guidance=GUIDANCE
        ),
        evaluation=EvaluationConfig(),
        loss=LossConfig(),
        device=torch.device("cpu"),
        seed=0,
    )
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.01)
    return policy


def _timed(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], None]
) -> Callable[[], Timed]:
    def measure() -> Timed:
        start = time.process_time()
        log_probs = forward()
        middle = time.process_time()
        backward(log_probs)
        return middle - start, time.process_time() - middle

    return measure


def _interleaved(ways: Sequence[Callable[[], Timed]], rounds: int) -> list[Timed]:
    """Return medians by way; time every way once per round, after a round that warms up."""
    turns = [[way() for way in ways] for _ in range(rounds + 1)][1:]
    return [
        (median(turn[i][0] for turn in turns), median(turn[i][1] for turn in turns))
        for i in range(len(ways))
    ]
