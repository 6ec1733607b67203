"""On a GPU: seconds, memory and share of the matrix rate by phase, on random weights."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from benchmarks.phases import REST, Phases, machine
from benchmarks.pipelines import SIZES, parameter_count, random_pipeline, trainer_on
from moa_diffusion import assembly
from moa_diffusion.config import Config
from moa_diffusion.policies.sd3 import DTYPES, SD3Policy
from moa_diffusion.training.loop import Run
from moa_diffusion.training.stepper import TrainingError
from moa_diffusion.training.trainer import Trainer
from moa_diffusion.types import ConfigError, Rollout
from rewards.pretrained.base import ModelHead

BUILD, PREPARE = "build", "encode prompts"  # once
SAMPLE, DECODE, SCORE, UPDATE = "sample", "decode", "score", "update"


def measure_gpu(
    settings: Config, *, size: str = "medium", device: str = "cuda", groups: int, rollouts: int
) -> dict[str, Any]:
    """Measure training steps with the settings' objectives and batches, on random weights.

    Of the rewards those are kept that need no weights from a hub.

    Args:
        settings: The number of groups is reduced to ``groups``, the rest is kept; fewer samples
            than two of their batches are sampled in smaller ones, which the geometry shows.
        size: Size of the pipeline, a key of ``SIZES``.
        device: 'cuda', or 'cpu' to try the code.
        groups: Prompts per rollout.
        rollouts: Measured, after one that warms up.

    Returns:
        Seconds and peak bytes by phase, images per second, and shares of the device's measured
        bf16 matrix rate.

    Raises:
        ConfigError: If ``groups`` do not divide over the settings' updates, or no reward is left.
    """
    judges = [
        name for name, head in assembly.heads(settings).items() if isinstance(head, ModelHead)
    ]
    rewards = {name: options for name, options in settings.rewards.items() if name not in judges}
    if not rewards:
        raise ConfigError(
            f"rewards: should hold one that needs no pretrained model. Found {', '.join(judges)}."
        )
    rate, cuda = _matrix_rate(device), device == "cuda"
    phases = Phases(_synchronised if cuda else time.perf_counter, _peak_bytes if cuda else None)
    dtype, vae_dtype = DTYPES[settings.policy.dtype], DTYPES[settings.policy.vae_dtype]
    with phases.phase(BUILD):
        pipeline = random_pipeline(SIZES[size], device=device, dtype=dtype, vae_dtype=vae_dtype)
    parameters = parameter_count(pipeline)
    largest = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    scaled = replace(
        settings,
        sampling=replace(settings.sampling, resolution=min(settings.sampling.resolution, largest)),
        trainer=replace(settings.trainer, groups=groups),
    )
    with tempfile.TemporaryDirectory() as folder:
        run, trainer = trainer_on(pipeline, scaled, folder, rewards)
        with closing(run):
            measured = _measure(run, trainer, phases, rollouts)
            work = _work(trainer)
    seconds, images = measured["seconds"], measured["images"]
    flops = {
        SAMPLE: images * settings.sampling.steps * work["flops"]["forward"],
        UPDATE: images * work["trained_steps"] * work["flops"]["trained_decision"],
    }
    configured = ("groups", "group_size", "sample_batch", "micro_batch")
    return {
        "machine": machine() | {"device": torch.cuda.get_device_name() if cuda else "cpu"},
        "size": size,
        "parameters": parameters,
        "dtype": settings.policy.dtype,
        "geometry": trainer.geometry.describe(),
        "rewards": list(rewards),
        "left_out": judges,
        "configured": {name: getattr(settings.trainer, name) for name in configured},
        "rollouts": rollouts,
        "resolution": scaled.sampling.resolution,
        "matrix_rate": rate,
        "share": {name: count / seconds[name] / rate for name, count in flops.items()},
        **measured,
        **work,
    }


def _measure(run: Run, trainer: Trainer, phases: Phases, rollouts: int) -> dict[str, Any]:
    """Measure seconds (of rollouts: medians) and peak memory by phase."""
    policy = trainer.policy
    assert isinstance(policy, SD3Policy)
    plan = [trainer.sampler.requests(step) for step in range(rollouts + 1)]
    prompts = sorted({request.prompt for requests in plan for request in requests})
    strict = trainer.steps.settings  # `_work` reports on it; a mismatch should not end the run
    trainer.steps.settings = replace(strict, ratio_tolerance=1e9)
    with phases.watching(
        (policy, "prepare", PREPARE),
        (policy.vae, "decode", DECODE),
        (trainer, "sample", SAMPLE),
        (trainer, "score", SCORE),
        (trainer.update, "improve", UPDATE),
    ):
        policy.prepare(prompts)
        once = phases.take()
        rows = [_rollout(run, phases) for _ in plan][1:]
    trainer.steps.settings = strict
    seconds = {name: once[name] for name in (BUILD, PREPARE)}
    for name in (SAMPLE, DECODE, SCORE, UPDATE, REST):
        seconds[name] = median(row[name] for row in rows)
    images = trainer.geometry.samples
    return {
        "images": images,
        "images_per_second": images / median(sum(row.values()) for row in rows),
        "prompts_encoded": len(prompts) + 1,
        "seconds": seconds,
        "peak_bytes": dict(phases.peaks),
    }


def _rollout(run: Run, phases: Phases) -> dict[str, float]:
    """Measure one training step: seconds by phase."""
    phases.take()
    run.step()
    return phases.take()


def _work(trainer: Trainer) -> dict[str, Any]:
    """Return trained steps, operations, and the on-policy check's verdict, from a fresh rollout."""
    geometry = trainer.geometry
    batch = max(geometry.sample_batch, geometry.micro_batch)
    rollout = trainer.sample(trainer.sampler.requests(0)[:batch])
    try:
        trainer.steps.check_ratio(rollout)
        verdict = ""
    except TrainingError as error:
        verdict = str(error)
    forward, trained = count_flops(trainer, rollout)
    return {
        "trained_steps": rollout.log_probs.shape[1],
        "flops": {"forward": forward, "trained_decision": trained},
        "on_policy": verdict,  # empty if it passes
    }


def count_flops(trainer: Trainer, rollout: Rollout) -> tuple[int, int]:
    """Count floating-point operations of one sample: a denoising step, and a trained decision.

    With guidance a step is two forwards. A trained decision is forward and backward, what
    checkpointing recomputes, and the reference if there is a KL.
    """
    from torch.utils.flop_counter import FlopCounterMode

    part, first = rollout.select(torch.tensor([0])), slice(0, 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        trainer.policy.log_probs(part, first)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        with_kl = trainer.steps.settings.kl_weight > 0
        terms = trainer.policy.log_probs(part, first, with_kl=with_kl)
        torch.autograd.backward([term.sum() for term in terms if term is not None])
    trainer.stepper.optimizer.zero_grad(set_to_none=True)
    return forward, counter.get_total_flops()


def _matrix_rate(device: str) -> float:
    """Measure the FLOP/s of a large bf16 matrix product: the best of several."""
    side, times = (8192, 20) if device == "cuda" else (256, 2)
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    clock = _synchronised if device == "cuda" else time.perf_counter
    seconds = []
    for _ in range(5):  # the first warms up
        start = clock()
        for _ in range(times):
            a @ b
        seconds.append(clock() - start)
    return 2 * side**3 * times / min(seconds)


def _synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _peak_bytes() -> int:
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak
