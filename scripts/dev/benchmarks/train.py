"""On the CPU: the cost of training one batch, in plain pipeline calls."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.phases import REST, Label, Phases, machine
from benchmarks.pipelines import BASE, parameter_count, random_pipeline, trainer_on
from moa_diffusion import tiny
from moa_diffusion.config import Config, LossConfig, SamplingConfig, TrainerConfig
from moa_diffusion.policies.sd3 import SD3Policy, load_pipeline
from moa_diffusion.training.loop import Run
from moa_diffusion.training.trainer import Trainer
from moa_diffusion.training.update import PlainUpdate
from tiny_pipeline.tokenizers import MAX_LENGTH

BATCH, STEPS, GUIDANCE = 4, 10, 4.5  # the plain call that is the unit
LENGTH_OF_PATH = 128  # T5 tokens where the pipeline is neither `tiny` nor `base`

ENCODE, SAMPLING, DECODE = "encode", "sampling", "decode"
FORWARD, BACKWARD, REFERENCE = "forward", "backward", "reference"  # the passes of training
OPTIMIZER, IMPROVE = "optimizer", "improve"
COLUMNS = (ENCODE, SAMPLING, DECODE, FORWARD, BACKWARD, REFERENCE, OPTIMIZER, REST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to train; costs are in units of one plain pipeline call."""

    name: str
    target: float | None = None  # at most this
    window: int = 0  # trained steps; 0 for all but the last
    guidance: float = GUIDANCE
    batch: int = BATCH  # samples per forward while sampling, and per optimizer step
    shared_start: bool = False  # all samples of the batch are one group, of one start
    kl_weight: float = 0.0
    step_batch: int = 1  # trained steps per forward
    trained: bool = True  # False: only sampled


def cases() -> list[Case]:
    """Return what is measured: each trained way with one and with two steps per forward.

    Without guidance a forward pass of the plain call's size, two halves of ``BATCH``, holds twice
    as many samples; that way is measured with both. The window of the n-th round lies at the n-th
    place, modulo all of them: what a shared start saves depends on it, and nothing else does.
    """
    ways = [
        Case(name="9 trained steps", target=2.8),
        Case(name="9 trained steps, KL", target=3.5, kl_weight=0.04),
        Case(name="window of 2", target=1.35, window=2),
        Case(name="window of 2, no CFG", window=2, guidance=1.0),
        Case(
            name=f"window of 2, no CFG, batch {2 * BATCH}",
            target=0.75,
            window=2,
            guidance=1.0,
            batch=2 * BATCH,
        ),
        Case(
            name=f"window of 2, no CFG, batch {2 * BATCH}, shared start",
            window=2,
            guidance=1.0,
            batch=2 * BATCH,
            shared_start=True,
        ),
    ]
    both = [replace(way, step_batch=steps) for way in ways for steps in (1, 2)]
    return [Case(name="sampling alone", trained=False), *both]


def case_settings(case: Case, *, resolution: int, length: int) -> Config:
    """Return the configuration of a case: one batch of samples, one optimizer step."""
    group_size = case.batch if case.shared_start else 2
    settings = Config(
        sampling=SamplingConfig(
            resolution=resolution,
            steps=STEPS,
            guidance=case.guidance,
            shared_start=case.shared_start,
            window=case.window,
            window_mode="slide",
            window_stay=1,
        ),
        loss=LossConfig(kl_weight=case.kl_weight),
        trainer=TrainerConfig(
            groups=case.batch // group_size,
            group_size=group_size,
            updates=1,
            sample_batch=case.batch,
            micro_batch=case.batch,
        ),
    )
    settings.policy.step_batch = case.step_batch
    settings.policy.max_sequence_length = length
    return settings


def measure_training(name: str, *, rounds: int) -> dict[str, Any]:
    """Measure a plain pipeline call and every case, interleaved, in CPU seconds per image.

    The text encoders run once per distinct prompt of a whole run, so a case pays for looking the
    embeddings up, and the plain call for computing them.

    Args:
        name: 'tiny', 'base', or the folder of a pipeline.
        rounds: Measured rounds, after one that warms up.

    Returns:
        ``plain`` and a list ``cases``, each with medians over the rounds: ``seconds`` per image
        and ``phases`` (seconds by name).
    """
    torch.set_num_threads(1)
    length = MAX_LENGTH if name in ("tiny", "base") else LENGTH_OF_PATH
    path = str(tiny.PIPELINE_PATH) if name == "tiny" else name
    load = partial(random_pipeline, BASE) if name == "base" else partial(load_pipeline, path)
    plain, phases = load(), Phases(time.process_time)
    resolution = plain.transformer.config.sample_size * plain.vae_scale_factor
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        trainers = []
        for number, case in enumerate(cases()):
            settings = case_settings(case, resolution=resolution, length=length)
            run, trainer = _prepared(load(), settings, f"{folder}/{number}")
            trainers.append(trainer)
            stack.callback(run.close)
        call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
        call |= {"height": resolution, "width": resolution, "max_sequence_length": length}
        prompts = [request.prompt for request in trainers[0].sampler.requests(0)]
        runs = [partial(plain, prompts, **call)]
        for case, trainer in zip(cases(), trainers, strict=True):
            runs.append(partial(_batch, trainer, trained=case.trained))
        stack.enter_context(phases.watching(*_watched(plain, trainers, phases)))
        batches = [BATCH, *(case.batch for case in cases())]
        first, *others = _interleaved(runs, batches, phases, rounds)
    return {
        "pipeline": name,
        "parameters": parameter_count(plain),
        "batch": BATCH,
        "resolution": resolution,
        "tokens": length,
        "rounds": rounds,
        "machine": machine(),
        "plain": first,
        "cases": [
            asdict(case) | row | {"ratio": row["seconds"] / first["seconds"]}
            for case, row in zip(cases(), others, strict=True)
        ],
    }


def _prepared(pipeline: Any, settings: Config, folder: str) -> tuple[Run, Trainer]:
    """Return a run whose trainer has encoded the prompts of its first rollout."""
    with redirect_stdout(io.StringIO()):  # build reports the geometry
        run, trainer = trainer_on(pipeline, settings, folder)
    trainer.policy.prepare([request.prompt for request in trainer.sampler.requests(0)])
    return run, trainer


def _batch(trainer: Trainer, *, trained: bool) -> None:
    rollout = trainer.sample(trainer.sampler.requests(0))
    if trained:
        assert isinstance(trainer.update, PlainUpdate)
        trainer.update.descend(rollout, torch.tensor([1.0, -1.0]).repeat(len(rollout) // 2))
    trainer.progress.completed += 1


def _watched(
    plain: Any, trainers: Sequence[Trainer], phases: Phases
) -> list[tuple[object, str, Label]]:
    """Return the calls that are timed, each with its phase.

    The remaining time of ``descend`` is counted as the rest.
    """

    def forward() -> str:
        if torch.is_grad_enabled():
            return FORWARD
        return REFERENCE if phases.inside(IMPROVE) else SAMPLING

    targets: list[tuple[object, str, Label]] = [
        (plain, "encode_prompt", ENCODE),
        (plain.transformer, "forward", SAMPLING),
        (plain.vae, "decode", DECODE),
        (torch.autograd, "backward", BACKWARD),
    ]
    for trainer in trainers:
        policy = trainer.policy
        assert isinstance(policy, SD3Policy)
        targets += [
            (policy, "encode", ENCODE),
            (policy.transformer, "forward", forward),
            (policy.vae, "decode", DECODE),
            (trainer.update, "descend", IMPROVE),
            (trainer.stepper, "optimizer_step", OPTIMIZER),
        ]
    return targets


def _interleaved(
    runs: Sequence[Callable[[], object]], batches: Sequence[int], phases: Phases, rounds: int
) -> list[dict[str, Any]]:
    """Run every case once per round, after a warm-up round; return medians per image by run."""
    measured: list[list[dict[str, float]]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for run, batch, rows in zip(runs, batches, measured, strict=True):
            phases.take()
            run()
            seconds = phases.take()
            if turn:
                rows.append({column: spent / batch for column, spent in seconds.items()})
    return [_medians(rows) for rows in measured]


def _medians(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the medians of the sums and of every phase."""
    merged = [
        {column: row.get(column, 0.0) for column in COLUMNS}
        | {REST: row.get(REST, 0.0) + row.get(IMPROVE, 0.0)}
        for row in rows
    ]
    return {
        "seconds": median(sum(row.values()) for row in merged),
        "phases": {column: median(row[column] for row in merged) for column in COLUMNS},
    }
