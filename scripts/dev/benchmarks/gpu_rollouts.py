"""Training steps phase by phase: seconds, operations, memory; smaller batches where it runs out."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_report import Report, described, forget, out_of_memory
from benchmarks.phases import REST, Label, Phases
from moa_diffusion import assembly
from moa_diffusion.config import Config
from moa_diffusion.policies.sd3 import SD3Policy
from moa_diffusion.scoring import Scoring
from moa_diffusion.training.loop import Run
from moa_diffusion.training.trainer import Trainer
from moa_diffusion.training.update import PlainUpdate, Probe
from moa_diffusion.types import Request

BUILD, PREPARE, LOAD = "build", "encode prompts", "load judges"  # once
REFERENCES, SAMPLE, DECODE, SCORE = "references", "sample", "decode", "score"
CHECK, STATISTICS, PROBE, UPDATE = "check", "statistics", "probe", "update"
PHASES = (REFERENCES, SAMPLE, DECODE, SCORE, CHECK, STATISTICS, PROBE, UPDATE, REST)
TRAINING = (CHECK, PROBE, UPDATE)  # whose passes are micro-batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """Floating-point operations, as the planner counts them."""

    forward: float  # of a row: one latent at one denoising step, without gradient
    trained: float  # of a row, forward and backward, with what checkpointing computes again
    decode: float  # of an image


class Rollouts:
    """Takes the steps of a run and says what each cost.

    Heads score while nothing else is drawn, so that a second belongs to one phase.

    Args:
        run: The run, ready to step.
        trainer: What learns in it.
        settings: Its configuration.
        phases: The accounts, in which the run was built.
        report: Gets all that is measured, after every rollout.
        operations: Of the transformer and the VAE; None if they were not counted.
    """

    def __init__(
        self,
        run: Run,
        trainer: Trainer,
        settings: Config,
        phases: Phases,
        report: Report,
        operations: Operations | None,
    ) -> None:
        self.run, self.trainer, self.settings = run, trainer, settings
        self.phases, self.report, self.operations = phases, report, operations
        self.halved: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []

    def measure(self, count: int, *, until: float) -> None:
        """Take a step that warms up, and then some that count.

        Args:
            count: How many count, at most; one at least.
            until: When no further one begins, by ``time.monotonic``.
        """
        trainer = self.trainer
        trainer.scorer.overlap = False
        with self.phases.watching(*watched(trainer)):
            warm = self._step()
            self.report.add(warm_up_seconds=warm["seconds"])
            while not self.rows or (len(self.rows) < count and time.monotonic() < until):
                self.rows.append(self._step())
                self._add()
            if self.settings.scoring.overlap and time.monotonic() < until:
                trainer.scorer.overlap = True
                seconds = sum(self._step()["seconds"].values())
                rate = trainer.geometry.samples / seconds
                self.report.add(overlapped={"seconds": seconds, "images_per_second": rate})

    def _step(self) -> dict[str, Any]:
        """Take one step, with smaller batches if memory runs out; return what it cost."""
        trainer = self.trainer
        while True:
            self.phases.take()
            number = trainer.progress.completed
            try:
                metrics = self.run.step()
            except Exception as error:
                phase, cause = self.phases.interrupted or REST, described(error)
                if not out_of_memory(error):
                    self.report.add(interrupted={"phase": phase, "seconds": self.phases.take()})
                    raise
                forget(error)
            else:
                return {
                    "seconds": self.phases.take(),
                    "flops": self._flops(number),
                    "ratio_gap": metrics["policy/ratio_gap"],
                    "score_seconds": dict(trainer.scorer.seconds),
                }
            self._halve(phase, cause)

    def _halve(self, phase: str, cause: str) -> None:
        """Halve the batches of a phase in which memory ran out.

        Raises:
            RuntimeError: If they hold one sample.
        """
        trainer, old = self.trainer, self.trainer.geometry
        trainer.stepper.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        limits = {"sample_batch": old.sample_batch, "micro_batch": old.micro_batch}
        key = "micro_batch" if phase in TRAINING else "sample_batch"
        if limits[key] == 1:
            raise RuntimeError(f"No memory left in the phase {phase} for a batch of one: {cause}")
        smaller = replace(self.settings.trainer, **{**limits, key: limits[key] // 2})
        # In half precision both shrink: passes of sampling and training have equally many rows.
        new = assembly.solve_geometry(replace(self.settings, trainer=smaller), 1)
        trainer.geometry = trainer.steps.geometry = new
        entry = {"phase": phase, "error": cause, "from": limits}
        entry |= {"to": {"sample_batch": new.sample_batch, "micro_batch": new.micro_batch}}
        print(f"out of memory in {phase}: {entry['from']} -> {entry['to']}", flush=True)
        self.halved.append(entry)
        self.report.add(halved=self.halved)

    def _flops(self, number: int) -> dict[str, float]:
        """Return the operations of a rollout by phase, as far as they are counted."""
        if (operations := self.operations) is None:
            return {}
        trainer, cut = self.trainer, self.trainer.geometry
        policy = trainer.policy
        assert isinstance(policy, SD3Policy)
        drawn = denoised(policy, trainer.sampler.requests(number), cut.sample_batch, number)
        decisions = len(policy.trained_steps(number)) * policy.row_copies  # rows of a sample
        reference = operations.forward if trainer.steps.settings.kl_weight > 0 else 0.0
        flops = {
            SAMPLE: drawn * policy.row_copies * operations.forward,
            DECODE: cut.samples * operations.decode,
            UPDATE: cut.samples * decisions * (operations.trained + reference),
        }
        probe = trainer.update.probe if isinstance(trainer.update, PlainUpdate) else None
        if isinstance(probe, Probe) and number % probe.settings.every == 0:
            chosen = cut.probe(probe.settings.share, seed=trainer.seed, step=number, rank=0)
            flops[PROBE] = sum(map(len, chosen)) * decisions * operations.trained
        return flops

    def _add(self) -> None:
        """Add the medians over the rollouts so far, and what they say together."""
        trainer, images = self.trainer, self.trainer.geometry.samples
        seconds = {
            name: median(row["seconds"].get(name, 0.0) for row in self.rows) for name in PHASES
        }
        rate = self.report.values.get("matrix_rate")
        share = {
            name: median(row["flops"][name] / row["seconds"][name] for row in rows) / rate
            for name in PHASES
            if rate and (rows := [row for row in self.rows if name in row["flops"]])
        }
        strict = self.settings.loss.tolerance
        gap = max(row["ratio_gap"] for row in self.rows)
        self.report.add(
            geometry=trainer.geometry.describe(),
            images=images,
            rollouts=len(self.rows),
            images_per_second=images / median(sum(row["seconds"].values()) for row in self.rows),
            trained_steps=len(trainer.policy.trained_steps(0)),
            seconds=self.report.values.get("seconds", {}) | seconds,
            peak_bytes=self.phases.peaks,
            share=share,
            score_seconds={
                name: median(row["score_seconds"][name] for row in self.rows)
                for name in self.rows[0]["score_seconds"]
            },
            on_policy={"ratio_gap": gap, "tolerance": strict, "held": gap <= strict},
            rows=self.rows,
        )


def watched(trainer: Trainer) -> list[tuple[object, str, Label]]:
    """Return the calls that are timed, each with its phase."""
    policy = trainer.policy
    assert isinstance(policy, SD3Policy)
    targets: list[tuple[object, str, Label]] = [
        (policy.vae, "decode", DECODE),
        (trainer, "draw_references", REFERENCES),
        (trainer, "sample", SAMPLE),
        (Scoring, "add", SCORE),  # waits for the heads, which work in between
        (trainer, "score", SCORE),
        (trainer.steps, "check_ratio", CHECK),
        (trainer, "statistics", STATISTICS),
        (trainer.update, "improve", UPDATE),
    ]
    if isinstance(trainer.update, PlainUpdate) and isinstance(trainer.update.probe, Probe):
        targets.append((trainer.update.probe, "measure", PROBE))
    return targets


def denoised(policy: SD3Policy, requests: Sequence[Request], size: int, step: int) -> int:
    """Return how many latents a rollout denoises by a step, over all of its steps.

    Samples of a prompt that start from the same noise are one until the trained window, as far as
    they stand in one batch.

    Args:
        policy: Draws the rollout.
        requests: Its requests.
        size: Samples of a batch.
        step: Number of the rollout, which decides the window.
    """
    first, steps = policy.trained_steps(step)[0], policy.sampling.steps
    total = 0
    for start in range(0, len(requests), size):
        batch = requests[start : start + size]
        starts = {
            row if request.start_seed is None else (request.prompt, request.start_seed)
            for row, request in enumerate(batch)
        }
        total += first * len(starts) + (steps - first) * len(batch)
    return total
