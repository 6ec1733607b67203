"""On the CPU: what each method costs, a whole step and its objective layer; and each loss."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from functools import partial
from statistics import median
from typing import Any

import torch
from pydantic import TypeAdapter

from benchmarks.phases import machine
from benchmarks.pipelines import SIZES, random_pipeline, trainer_on
from moa_diffusion import assembly, tiny
from moa_diffusion.config import Config, LossConfig, SamplingConfig, TrainerConfig
from moa_diffusion.objectives.base import combine
from moa_diffusion.policies.sd3 import load_pipeline
from moa_diffusion.training.loop import Run
from moa_diffusion.training.trainer import Trainer
from moa_diffusion.types import ConfigError, ObjectiveStats, RewardMatrix
from tiny_pipeline.tokenizers import MAX_LENGTH

HEADS: dict[str, dict[str, Any]] = {
    name: {} for name in ("prompt_colour", "jpeg_compressibility", "colourfulness", "sharpness")
}
METHODS = ("static", "gdpo", "dual_stage", "apex", "pama", "mopo", "chebyshev", "upgrad", "mgda")
COMPARED = ("static", "upgrad")
# What a guard is compared with comes first: the loss without it.
GUARDS: dict[str, dict[str, Any]] = {
    "no guard": {},
    "clip: divergence": {"clip": "divergence"},
    "clip: normalized": {"clip": "normalized"},
    "steps: equal": {"steps": "equal"},
    "steps: noise": {"steps": "noise"},
    "KL": {"kl_weight": 0.01},
    "KL with a target": {"kl_weight": 0.01, "kl_target": 0.1},
    "KL and norm": {"kl_weight": 0.01, "norm_weight": 1.0},
    "norm": {"norm_weight": 1.0},
    # Other losses, of two noisy versions of each image in the place of three steps.
    "ram": {"kind": "forward", "kl_weight": 0.1, "forward": {"preset": "ram", "draws": 2}},
    "nft": {"kind": "forward", "forward": {"preset": "nft", "draws": 2}},
    "awm": {"kind": "forward", "forward": {"preset": "awm", "draws": 2}},
}
TARGET = 1.15  # what a step with UPGrad may cost, in steps with static weights
GROUPS, GROUP_SIZE = 2, 4  # those of the training step
LARGE = (48, 24)  # groups and group size of the objective layer: N = 1152
REPEATS = 20  # repetitions of the objective layer


def measure_methods(
    name: str, *, rounds: int, methods: Sequence[str] | None = None
) -> dict[str, Any]:
    """Measure a step with each method, interleaved, and its objective layer, in CPU seconds.

    A step is a rollout with four cheap rewards, its scores and its optimizer steps; the reference
    pool that MOPO draws once per prompt is there before.

    Args:
        name: 'tiny', or a key of ``SIZES`` for random weights.
        rounds: Measured rounds, after one that warms up.
        methods: Names, ``static`` among them; by default all of ``METHODS``, or those of
            ``COMPARED`` for 'wide', whose steps take long.

    Raises:
        ConfigError: If a method is not known, or ``static`` is missing.

    Returns:
        A list ``methods`` of medians: ``step`` and ``update`` in seconds with their ratios to
        ``static``, and ``layer`` in seconds for K = 4, N = 1152.
    """
    if methods is None:
        methods = COMPARED if name == "wide" else METHODS
    if unknown := sorted(set(methods) - set(assembly.METHODS)):
        known = ", ".join(assembly.METHODS)
        raise ConfigError(f"methods: should be among {known}. Found {', '.join(unknown)}.")
    if METHODS[0] not in methods:
        raise ConfigError(f"methods: should hold `{METHODS[0]}`, the unit. Found {methods}.")
    report = _measured(
        name, {method: (method, {}) for method in methods}, unit=METHODS[0], rounds=rounds
    )
    for row in report["methods"]:
        row["layer"] = _layer(row["name"])
        row["target"] = TARGET if row["name"] == "upgrad" else None
    return report


def measure_guards(name: str, *, rounds: int) -> dict[str, Any]:
    """Measure a step with each of ``GUARDS``, interleaved, as ``measure_methods`` does.

    Args:
        name: 'tiny', or a key of ``SIZES`` for random weights.
        rounds: Measured rounds, after one that warms up.

    Returns:
        As ``measure_methods``, in steps without a guard; there is no ``layer``.
    """
    ways = {guard: ("dual_stage", loss) for guard, loss in GUARDS.items()}
    return _measured(name, ways, unit=next(iter(GUARDS)), rounds=rounds)


def _measured(
    name: str, ways: Mapping[str, tuple[str, dict[str, Any]]], *, unit: str, rounds: int
) -> dict[str, Any]:
    """Measure steps in turns: of methods, each with settings of the section ``loss``."""
    torch.set_num_threads(1)
    load: Callable[[], Any] = partial(load_pipeline, str(tiny.PIPELINE_PATH))
    if name != "tiny":
        load = partial(random_pipeline, SIZES[name])
    steps: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        runs = {}
        for number, (way, (method, loss)) in enumerate(ways.items()):
            runs[way] = _prepared(load(), method, loss, f"{folder}/{number}", rounds)
            stack.callback(runs[way][0].close)
        for turn in range(rounds + 1):
            for way, (run, trainer) in runs.items():
                seconds = _step(run, trainer)
                if turn:
                    steps[way].append(seconds)
    rows: list[dict[str, Any]] = [
        {
            "name": way,
            "step": median(step for step, _ in taken),
            "update": median(update for _, update in taken),
        }
        for way, taken in steps.items()
    ]
    one = next(row for row in rows if row["name"] == unit)
    for row in rows:
        row |= {f"{part}_ratio": row[part] / one[part] for part in ("step", "update")}
    return {
        "pipeline": name,
        "samples": GROUPS * GROUP_SIZE,
        "rounds": rounds,
        "machine": machine(),
        "unit": unit,
        "methods": rows,
    }


def _prepared(
    pipeline: Any, method: str, loss: dict[str, Any], folder: str, rounds: int
) -> tuple[Run, Trainer]:
    settings = Config(
        sampling=SamplingConfig(
            resolution=pipeline.transformer.config.sample_size * pipeline.vae_scale_factor,
            steps=6,
            guidance=1.0,
            window=0 if loss.get("kind") == "forward" else 3,
        ),
        loss=TypeAdapter(LossConfig).validate_python(loss),
        trainer=TrainerConfig(
            groups=GROUPS, group_size=GROUP_SIZE, updates=1, sample_batch=4, micro_batch=4
        ),
    )
    settings.objectives.method = method
    settings.policy.max_sequence_length = MAX_LENGTH
    with redirect_stdout(io.StringIO()):  # build reports the geometry
        run, trainer = trainer_on(pipeline, settings, folder, HEADS)
    prompts = [prompt.text for prompt in trainer.sampler.prompts]
    trainer.policy.prepare(prompts)
    for step in range(rounds + 1):
        trainer.draw_references(trainer.sampler.requests(step))
    return run, trainer


def _step(run: Run, trainer: Trainer) -> tuple[float, float]:
    """Measure a whole step, and its optimizer steps, in CPU seconds."""
    take, spent = trainer.steps.take, [0.0]

    def timed(*arguments: Any) -> Any:
        start = time.process_time()
        metrics = take(*arguments)
        spent[0] = time.process_time() - start
        return metrics

    vars(trainer.steps)["take"] = timed
    start = time.process_time()
    run.step()
    seconds = time.process_time() - start
    del vars(trainer.steps)["take"]
    return seconds, spent[0]


def _layer(method: str) -> float:
    """Measure normalise, weigh and combine for K = 4, N = 1152, in CPU seconds."""
    groups, size = LARGE
    settings = Config(rewards=HEADS)
    settings.objectives.method = method
    normalizer, weighting = assembly.objectives(settings)
    source = torch.Generator().manual_seed(0)
    values = torch.randn(len(HEADS), groups * size, generator=source, dtype=torch.float64)
    index = torch.arange(groups * size) // size
    rewards = RewardMatrix(
        names=tuple(HEADS),
        values=values,
        groups=index,
        prompts=tuple(f"p{group}" for group in index.tolist()),
    )
    if new := normalizer.unknown(rewards.prompts):
        count = normalizer.reference_samples
        pool = torch.randn(len(new), len(HEADS), count, generator=source, dtype=torch.float64)
        normalizer.remember(new, pool)
    gramian = values @ values.T if weighting.needs_gramian else None
    seconds = []
    for step in range(REPEATS + 1):
        start = time.process_time()
        advantages = normalizer.per_objective(rewards)
        stats = ObjectiveStats(
            step=step,
            rewards=rewards,
            advantages=advantages,
            gramian=gramian,
            win_rates=normalizer.win_rates(rewards),
        )
        applies = torch.ones_like(values, dtype=torch.bool)
        normalizer.combined(combine(advantages, weighting(stats), applies), rewards)
        seconds.append(time.process_time() - start)
    return median(seconds[1:])
