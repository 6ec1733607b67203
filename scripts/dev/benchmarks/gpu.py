"""On a GPU, once and for ten minutes: what training costs, on random weights of full size.

Every phase of training steps by seconds, operations and memory, with four rewards whose models are
as large as those of the recipe; how far rounding is from on-policy; and updates with other
micro-batches, checkpointing, attention and compilation. All goes into one JSON file as it is
measured.
"""

from __future__ import annotations

import gc
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import random_judges
from benchmarks.gpu_report import Report, clock_of, described, matrix_rate, peak_bytes, versions
from benchmarks.gpu_rollouts import BUILD, LOAD, PREPARE, Operations, Rollouts
from benchmarks.gpu_summary import summary
from benchmarks.gpu_sweep import Embeddings, Sweep
from benchmarks.phases import Phases
from benchmarks.pipelines import SIZES, Sizes, parameter_count, random_pipeline, trainer_on
from benchmarks.precision import measure_precision
from moa_diffusion import assembly
from moa_diffusion.config import Config
from moa_diffusion.planning.passes import decoder_cost, transformer_cost
from moa_diffusion.planning.shapes import Shape
from moa_diffusion.policies.sd3 import DTYPES, SD3Policy
from moa_diffusion.training.trainer import Trainer

ROOT = Path(__file__).parents[3]
ROLLOUTS_SHARE = 0.5  # of the time, after which no further rollout begins


def measure_gpu(
    settings: Config,
    file: Path,
    *,
    size: str = "medium",
    device: str = "cuda",
    groups: int,
    rollouts: int,
    minutes: float,
) -> int:
    """Measure training with the settings' objectives, batches and judges, on random weights.

    Args:
        settings: The number of groups is reduced to ``groups``, the rest is kept; fewer samples
            than two of their batches are sampled in smaller ones, which the geometry shows.
        file: Where the report is written, again after each part.
        size: Size of the pipeline, a key of ``SIZES``.
        device: 'cuda', or 'cpu' to try the code.
        groups: Prompts per rollout.
        rollouts: How many are measured, after one that warms up.
        minutes: How long all may take; what has begun is finished.

    Returns:
        The exit status: 1 if a part failed, which the report names.

    Raises:
        ConfigError: If ``groups`` do not divide over the settings' updates, or anything else is
            wrong with the configuration.
    """
    began = time.monotonic()
    report = Report(file)
    sizes, dtype = SIZES[size], settings.policy.dtype
    largest = int(sizes.transformer["sample_size"]) * 2 ** (
        len(sizes.vae["block_out_channels"]) - 1
    )
    settings = replace(
        settings,
        policy=replace(settings.policy, shard=False, adapter=None),  # one process, no files
        sampling=replace(settings.sampling, resolution=min(settings.sampling.resolution, largest)),
        trainer=replace(settings.trainer, groups=groups),
    )
    configured = ("groups", "group_size", "updates", "sample_batch", "micro_batch")
    report.add(
        machine=versions(ROOT, device),
        size=size,
        dtype=dtype,
        vae_dtype=settings.policy.vae_dtype,
        resolution=settings.sampling.resolution,
        method=settings.objectives.method,
        policy=vars(settings.policy) | {"lora": vars(settings.policy.lora)},
        sampling=vars(settings.sampling),
        configured={name: getattr(settings.trainer, name) for name in configured},
    )
    with tempfile.TemporaryDirectory() as folder:
        chosen = random_judges.judges(settings, Path(folder), device=device, full=size == "medium")
        report.add(judges=[{"name": j.name, "kind": j.kind, "note": j.note} for j in chosen])
        settings = replace(settings, rewards={judge.name: dict(judge.options) for judge in chosen})
        with report.stage("matrix rate"):
            rates = {
                name: matrix_rate(device, DTYPES[name])
                for name in dict.fromkeys((dtype, "bfloat16"))
            }
            report.add(matrix_rates=rates, matrix_rate=rates[dtype])
        operations = None
        with report.stage("count operations"):
            operations = count_operations(settings, sizes)
            report.add(
                flops={
                    "forward": operations.forward,
                    "trained": operations.trained,
                    "decode": operations.decode,
                }
            )
        sweep = None
        with report.stage("rollouts"):
            until = began + ROLLOUTS_SHARE * 60 * minutes
            sweep = _rollouts(settings, sizes, report, operations, folder, device, rollouts, until)
        _free(device)
        with report.stage("gradients in half precision"):
            report.add(gradients=_precision(settings, size, device))
        _free(device)
        if sweep is not None:
            with report.stage("sweep"):
                sweep.measure(report, until=began + 60 * minutes)
    report.add(finished=True, stage="", seconds_of_all=time.monotonic() - began)
    print(summary(report.values, report.file))
    return 1 if report.values["problems"] else 0


def count_operations(settings: Config, sizes: Sizes) -> Operations:
    """Count the operations of the passes, on tensors without data, as the planner does.

    Args:
        settings: Says resolution, precision, LoRA, checkpointing, and whether layers hand over the
            objectives' own gradients.
        sizes: Sizes of the pipeline.
    """
    _, weighting = assembly.objectives(settings)
    shape = Shape(
        source="benchmark",
        transformer=sizes.transformer,
        vae=sizes.vae,
        encoders={"text_encoder": {**sizes.clip, "max_position_embeddings": sizes.clip_tokens}},
    )
    side = settings.sampling.resolution
    tapped = weighting.needs_gramian or assembly.is_fused(settings, weighting)
    model = transformer_cost(shape, settings.policy, resolution=side, tapped=tapped)
    decoder = decoder_cost(shape, settings.policy.vae_dtype, side)
    return Operations(
        forward=model.forward_flops, trained=model.training_flops, decode=decoder.flops
    )


def _rollouts(
    settings: Config,
    sizes: Sizes,
    report: Report,
    operations: Operations | None,
    folder: str,
    device: str,
    rollouts: int,
    until: float,
) -> Sweep:
    """Measure what runs once and the rollouts; return the sweep that can follow."""
    policy = settings.policy
    phases = Phases(clock_of(device), peak_bytes if device == "cuda" else None)
    report.begin(BUILD)
    with phases.phase(BUILD):
        pipeline = random_pipeline(
            sizes, device=device, dtype=DTYPES[policy.dtype], vae_dtype=DTYPES[policy.vae_dtype]
        )
    report.add(parameters=parameter_count(pipeline))
    # A gap beyond the recipe's tolerance is reported, and does not end the benchmark.
    tolerant = replace(settings, loss=replace(settings.loss, ratio_tolerance=1e9))
    with ExitStack() as stack:
        with phases.phase(BUILD):
            run, trainer = trainer_on(pipeline, tolerant, f"{folder}/run", settings.rewards)
        stack.callback(run.close)
        assert isinstance(trainer.policy, SD3Policy)
        prompts = [prompt.text for prompt in trainer.sampler.prompts]
        report.begin(PREPARE)
        with phases.phase(PREPARE):
            trainer.policy.prepare(prompts)
        report.add(prompts_encoded=len(prompts) + 1)
        report.begin(LOAD)
        with phases.phase(LOAD):
            _load(trainer, settings, report, device)
        report.add(seconds=phases.take(), peak_bytes=phases.peaks)
        measuring = Rollouts(run, trainer, settings, phases, report, operations)
        with report.stage("training steps"):
            measuring.measure(rollouts, until=until)
        drawn = [request.prompt for request in trainer.sampler.requests(0)]
        return Sweep(
            settings,
            sizes,
            device=device,
            encode=Embeddings(trainer.policy.encode, ["", *drawn], device),
            rewards=random_judges.cheap({name: {} for name in settings.rewards}),
            geometry=trainer.geometry,  # of batches that fit
        )


def _load(trainer: Trainer, settings: Config, report: Report, device: str) -> None:
    """Load the judges; what cannot be loaded, of lack of memory perhaps, gets a stand-in."""
    table: list[dict[str, Any]] = report.values["judges"]
    clock = clock_of(device)
    for row in table:
        head = trainer.scorer.heads[row["name"]]
        before, start = _allocated(device), clock()
        try:
            head.load()
        except Exception as error:  # a judge less should not cost the rest
            report.problem(f"{LOAD}: {row['name']}", error)
            head.close()
            cheap = random_judges.cheap({row["name"]: settings.rewards[row["name"]]})
            trainer.scorer.heads |= assembly.heads(replace(settings, rewards=cheap))
            row |= {"kind": "stand-in", "note": f"it could not be loaded: {described(error)}"}
            continue
        row |= {"seconds": clock() - start, "bytes": _allocated(device) - before}
        if settings.scoring.offload:
            head.offload()
    report.add(judges=table)


def _precision(settings: Config, size: str, device: str) -> dict[str, Any]:
    """Measure gradients in half precision against float32, on a few blocks of full width."""
    dtype = settings.policy.dtype if settings.policy.dtype != "float32" else "float16"
    layers, heads, side = (4, 24, 64) if size == "medium" else (2, 1, 4)
    return measure_precision(
        layers=layers, heads=heads, side=side, steps=(0, 8), dtype=dtype, device=device
    )


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
