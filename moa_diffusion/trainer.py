"""The training loop: sample, score, normalise, weigh, improve. No algorithm lives here.

What is optimised, and how rewards become advantages, are the policy's, the normalizer's and the
weighting's business; how a rollout is cut over processes and forward passes is the geometry's.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

from moa_diffusion import checkpoint
from moa_diffusion.data import Geometry, GroupSampler, derive_seed
from moa_diffusion.distributed import Comm, local_slice
from moa_diffusion.ema import EMA
from moa_diffusion.heldout import HeldOut
from moa_diffusion.loss import clip_fraction, clipped_surrogate
from moa_diffusion.metrics import RunLog, reward_metrics
from moa_diffusion.objectives.base import Normalizer, Weighting, combine
from moa_diffusion.policies.base import Policy
from moa_diffusion.scoring import RewardError, Scorer
from moa_diffusion.types import (
    ConfigError,
    ObjectiveStats,
    Request,
    RewardMatrix,
    Rollout,
    concatenate,
)

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long, and what happens when. Counts are rollouts; 0 switches an occasion off."""

    steps: int  # rollouts of the whole run
    checkpoint_every: int
    checkpoint_keep: int  # newest checkpoints kept; 0 keeps all
    evaluate_every: int  # held-out rewards and pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """Settings of the policy-gradient loss."""

    clip_range: float  # of the ratio
    advantage_clip: float  # advantages are cut at +- this
    kl_weight: float  # beta; 0 leaves the reference out altogether
    max_grad_norm: float
    ratio_tolerance: float  # largest |log ratio| of the on-policy check
    max_skipped: int  # consecutive updates with non-finite gradients before giving up


class Trainer:
    """Improves a policy on K rewards.

    Args:
        policy: samples, and gives log-probabilities.
        scorer: the K reward heads.
        normalizer: stage 1 and stage 2 of reward normalisation.
        weighting: weights from statistics.
        sampler: which prompts and seeds at which step.
        geometry: how a rollout is cut.
        comm: collectives over the processes.
        optimizer: over ``policy.trainable()``.
        lr: learning rate after so many optimizer steps.
        scaler: loss scaler; disabled except in float16.
        ema: average of the trained parameters.
        surrogate: settings of the loss.
        schedule: how long, and what happens when.
        heldout: the evaluation; None for none.
        log: metrics and scores.
        folder: of the run.
        seed: of the run.
        progress: whether this process shows progress bars.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        scorer: Scorer,
        normalizer: Normalizer,
        weighting: Weighting,
        sampler: GroupSampler,
        geometry: Geometry,
        comm: Comm,
        optimizer: torch.optim.Optimizer,
        lr: Callable[[int], float],
        scaler: torch.amp.GradScaler,
        ema: EMA,
        surrogate: Surrogate,
        schedule: Schedule,
        heldout: HeldOut | None,
        log: RunLog,
        folder: Path,
        seed: int,
        progress: bool = True,
    ) -> None:
        self.policy, self.scorer = policy, scorer
        self.normalizer, self.weighting = normalizer, weighting
        self.sampler, self.geometry, self.comm = sampler, geometry, comm
        self.optimizer, self.lr, self.scaler = optimizer, lr, scaler
        self.ema, self.surrogate, self.schedule = ema, surrogate, schedule
        self.heldout = heldout
        self.log, self.folder, self.seed, self.progress = log, folder, seed, progress

        if weighting.needs_gramian:
            raise ValueError(
                "Parameter `weighting` should not need the Gramian of the objectives' gradients: "
                f"nothing measures it yet. Found {type(weighting).__name__}."
            )

        self.completed = 0  # rollouts finished
        self.updates = 0  # optimizer steps taken
        self._parameters = list(policy.trainable().values())
        self._device = self._parameters[0].device
        self._stop = False  # set by SIGTERM
        self._ratio_checked = False
        self._skipped_in_a_row = 0
        self._seconds: dict[str, float] = {}

    # ------------------------------------------------------------------ the paragraph

    def step(self) -> dict[str, float]:
        """One rollout and its optimizer steps; returns the step's metrics."""
        requests = self.sampler.requests(self.completed)
        rollout = self.sample(local_slice(requests, self.comm))
        self.check_ratio(rollout)
        rewards = self.score(rollout, requests)  # [K, N]

        advantages = self.normalizer.per_objective(rewards)  # [K, N]
        weights = self.weigh(rewards, advantages)  # [K] or [K, N]
        applies = ~torch.isnan(rewards.values)  # [K, N]
        scores = combine(advantages, weights, applies)  # [N]
        limit = self.surrogate.advantage_clip
        advantage = self.normalizer.combined(scores, rewards).clamp(-limit, limit)  # [N]

        update = self.improve(rollout, local_slice(advantage, self.comm))
        self.completed += 1
        self.log.write_scores(self.completed, requests, rewards, advantage)
        return reward_metrics(rewards, advantages, weights) | update

    # ------------------------------------------------------------------ its verbs

    def sample(self, requests: Sequence[Request]) -> Rollout:
        """Draw this process's share, batch by batch; a stop request is honoured in between."""
        size = self.geometry.sample_batch
        parts = []
        with self._timed("sample"):
            for start in self._bar(range(0, len(requests), size), "sample"):
                self._leave_if_stopped()
                batch = requests[start : start + size]
                parts.append(self.policy.sample(batch, step=self.completed))
        return concatenate(parts)

    def score(self, rollout: Rollout, requests: Sequence[Request]) -> RewardMatrix:
        """Raw rewards of all N samples, on every process."""
        with self._timed("score"):
            rewards = self.scorer(rollout, requests)
        self._seconds |= {f"score_{name}": s for name, s in self.scorer.seconds.items()}
        return rewards

    def weigh(self, rewards: RewardMatrix, advantages: Tensor) -> Tensor:
        """Ask the weighting; rank 0's answer counts for all."""
        stats = ObjectiveStats(step=self.completed, rewards=rewards, advantages=advantages)
        weights: Tensor = self.weighting(stats).clone()
        self.comm.broadcast_(weights)
        return weights

    def improve(self, rollout: Rollout, advantage: Tensor) -> dict[str, float]:
        """The rollout's optimizer steps on the clipped surrogate plus KL.

        Args:
            rollout: this process's n samples.
            advantage: ``[n]``.

        Returns:
            metrics, averaged over all processes and optimizer steps.
        """
        advantage = advantage.to(self._device, torch.float32)
        minibatches = self.geometry.minibatches(
            seed=self.seed, step=self.completed, rank=self.comm.rank
        )
        decisions = torch.stack([rollout.mask[index.flatten()].sum() for index in minibatches])
        self.comm.sum_([decisions])  # [updates], over all processes
        sums = torch.zeros(3, dtype=torch.float64)  # decisions, clipped, KL
        norms, skipped = [], 0
        passes = self.geometry.updates * self.geometry.accumulation
        with self._timed("update"), self._bar(range(passes), "update") as bar:
            for index, total in zip(minibatches, decisions.tolist(), strict=True):
                for micro in index:
                    sums += self._backward(rollout.select(micro), advantage[micro], total)
                    bar.update()
                norm = self._optimizer_step()
                norms.append(norm)
                skipped += not math.isfinite(norm)
        self.comm.sum_([sums])
        finite = [norm for norm in norms if math.isfinite(norm)]
        return {
            "policy/clip_fraction": float(sums[1] / sums[0]),
            **({"policy/kl": float(sums[2] / sums[0])} if self.surrogate.kl_weight else {}),
            "policy/grad_norm": sum(finite) / len(finite) if finite else math.nan,
            "policy/skipped_updates": float(skipped),
            "policy/lr": self.optimizer.param_groups[0]["lr"],
        }

    def _backward(self, part: Rollout, advantage: Tensor, total: int) -> Tensor:
        """Add the gradients of one micro-batch; returns its decisions, clipped and KL sums."""
        settings = self.surrogate
        sums = torch.zeros(3, dtype=torch.float64)
        for steps in self.policy.step_chunks(part.log_probs.shape[1]):
            mask, old = part.mask[:, steps], part.log_probs[:, steps]
            new, kl = self.policy.log_probs(part, steps, with_kl=settings.kl_weight > 0)
            losses = clipped_surrogate(new, old, advantage, settings.clip_range)  # [m, t]
            if kl is not None:
                losses = losses + settings.kl_weight * kl
                sums[2] += float((kl.detach() * mask).sum())
            torch.autograd.backward(self.scaler.scale(torch.where(mask, losses, 0).sum() / total))
            clipped = clip_fraction(new.detach(), old, advantage, settings.clip_range)
            sums[0] += float(mask.sum())
            sums[1] += float((clipped & mask).sum())
        return sums

    def _optimizer_step(self) -> float:
        """Sum gradients over the processes, clip, step; returns the gradient norm.

        A non-finite gradient skips the update and is counted.
        """
        self.comm.sum_([p.grad for p in self._parameters if p.grad is not None])
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self.surrogate.max_grad_norm))
        if math.isfinite(norm):
            self._skipped_in_a_row = 0
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr(self.updates)
            self.scaler.step(self.optimizer)
            self.updates += 1
            self.ema.update()
        else:
            self._skipped_in_a_row += 1
            logger.warning("Update skipped: the gradient norm is %s.", norm)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def check_ratio(self, rollout: Rollout) -> None:
        """Once per run: log-probs as trained must equal those of sampling.

        Raises:
            TrainingError: with a diagnosis, if they differ by more than the tolerance.
        """
        if self._ratio_checked:
            return
        part = rollout.select(torch.arange(self.geometry.micro_batch))
        chunks = self.policy.step_chunks(part.log_probs.shape[1])
        new = torch.cat([self.policy.log_probs(part, steps)[0] for steps in chunks], dim=1)
        gap = ((new - part.log_probs).abs() * part.mask).amax(0)  # [T]
        worst = float(gap.max()) if gap.isfinite().all() else math.inf
        worst = float(self.comm.gather(torch.tensor([worst])).max())
        if worst > self.surrogate.ratio_tolerance:
            raise TrainingError(
                "The policy is not on-policy at the start: log-probs recomputed for training "
                f"differ from those of sampling by up to {worst:.2e} (tolerance "
                f"{self.surrogate.ratio_tolerance:.0e}, `loss.ratio_tolerance`). Likely causes: "
                "a half-precision kernel that depends on the batch size (make "
                "`trainer.sample_batch` equal `trainer.micro_batch`), dropout that is active, or "
                "latents rounded between sampling and training. By decision, on this process: "
                f"{[f'{value:.1e}' for value in gap.tolist()]}."
            )
        self._ratio_checked = True

    def evaluate(self) -> dict[str, float]:
        """Held-out rewards of the averaged weights, and a sheet of pictures."""
        if self.heldout is None:
            return {}
        with self._timed("evaluate"), self.ema.applied():
            return self.heldout(self.completed, before_batch=self._leave_if_stopped)

    # ------------------------------------------------------------------ the run

    def run(self) -> None:
        """Train until ``schedule.steps`` rollouts are done.

        Raises:
            Interrupted: after SIGTERM, once the state is saved.
            RewardError, TrainingError: after the state is saved.
        """
        bar = tqdm(
            total=self.schedule.steps,
            initial=self.completed,
            desc="rollouts",
            disable=not self.progress,
        )
        asked = self.heldout.requests if self.heldout else ()
        with self._sigterm(), bar:
            try:
                self.policy.prepare(
                    [prompt.text for prompt in self.sampler.prompts]
                    + [request.prompt for request in asked]
                )
                self._leave_if_stopped()
                if self.heldout and self.completed == 0:
                    self.log.write(0, self.evaluate() | self._take_seconds())
                while self.completed < self.schedule.steps:
                    self._leave_if_stopped()
                    self._round(bar)
            except (RewardError, TrainingError, Interrupted) as error:
                folder = self.save()
                logger.warning("Stopped after %d rollouts; saved %s", self.completed, folder)
                error.add_note(f"The state after {self.completed} rollouts is in {folder}.")
                raise

    def _round(self, bar: tqdm[Any]) -> None:
        """One step with what belongs to it: metrics, evaluation, checkpoint."""
        # For heads and libraries that use the global generators; nothing here does.
        set_seed(derive_seed(self.seed, "global", self.completed) % 2**32)
        start = time.perf_counter()
        metrics = self.step()
        last = self.completed == self.schedule.steps
        try:
            if self.heldout and (last or self._due(self.schedule.evaluate_every)):
                metrics |= self.evaluate()
        finally:  # an evaluation that fails or is cut short loses nothing but itself
            metrics |= self._take_seconds() | {"seconds/total": time.perf_counter() - start}
            self.log.write(self.completed, metrics)
        bar.update()
        bar.set_postfix_str(
            " ".join(f"{name} {metrics[f'reward_mean/{name}']:.3g}" for name in self.scorer.names)
        )
        if self._skipped_in_a_row >= self.surrogate.max_skipped:
            raise TrainingError(
                f"The last {self._skipped_in_a_row} updates had non-finite gradients. "
                "A smaller `optimizer.lr` or `policy.dtype: bfloat16` may help."
            )
        if last or self._due(self.schedule.checkpoint_every):
            self.save()

    def _due(self, every: int) -> bool:
        return every > 0 and self.completed % every == 0

    def save(self) -> Path:
        """Write a checkpoint of the state after the last completed rollout."""
        folder = checkpoint.step_folder(self.folder, self.completed)
        if self.comm.rank == 0 and not (folder / checkpoint.STATE).is_file():
            with checkpoint.atomic_folder(folder) as partial:
                self.policy.save(partial)
                (partial / "ema").mkdir()
                with self.ema.applied():
                    self.policy.save(partial / "ema")
                checkpoint.save_state(partial, self.state_dict())
            checkpoint.prune(self.folder, self.schedule.checkpoint_keep)
        self.comm.barrier()
        return folder

    def close(self) -> None:
        """Release worker processes, trackers and the process group."""
        self.scorer.close()
        self.comm.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything the next rollout depends on, equal on every process."""
        return {
            "step": self.completed,
            "seed": self.seed,
            "objectives": list(self.scorer.names),
            "method": self._method(),
            "trainable": {n: p.detach().cpu() for n, p in self.policy.trainable().items()},
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict(),
            "normalizer": self.normalizer.state_dict(),
            "weighting": self.weighting.state_dict(),
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state.

        Raises:
            ConfigError: if the run's objectives, seed or adapter differ from the checkpoint's.
        """
        facts = {
            "objectives": list(self.scorer.names),
            "method": self._method(),
            "seed": self.seed,
        }
        for key, mine in facts.items():
            if state[key] != mine:
                raise ConfigError(
                    f"resume: the checkpoint has {key} {state[key]}. Found {mine} in this run."
                )
        trainable = self.policy.trainable()
        checkpoint.check_adapter(state["trainable"], trainable)
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(state["trainable"][name])
        # The moments come from the checkpoint; rates and decays from this run's configuration.
        options = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, options, strict=True):
            group.update(values)
        self.updates = state["updates"]
        if state["scaler"]:  # empty unless the run was in float16
            self.scaler.load_state_dict(state["scaler"])
        self.ema.load_state_dict(state["ema"])
        self.normalizer.load_state_dict(state["normalizer"])
        self.weighting.load_state_dict(state["weighting"])
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self.completed = state["step"]
        self.log.rewind(self.completed)
        if self.comm.rank == 0:
            checkpoint.forget_after(self.folder, self.completed)

    # ------------------------------------------------------------------ small parts

    def _method(self) -> list[str]:
        return [type(self.normalizer).__name__, type(self.weighting).__name__]

    def _leave_if_stopped(self) -> None:
        if self.comm.any(self._stop):
            raise Interrupted("Stopped by SIGTERM.")

    @contextmanager
    def _sigterm(self) -> Iterator[None]:
        """Within the block SIGTERM asks for a stop at the next safe point."""

        def ask(number: int, frame: FrameType | None) -> None:
            self._stop = True

        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._seconds[phase] = self._seconds.get(phase, 0.0) + elapsed

    def _take_seconds(self) -> dict[str, float]:
        seconds = {f"seconds/{phase}": value for phase, value in self._seconds.items()}
        self._seconds = {}
        return seconds

    def _bar(self, steps: range, phase: str) -> tqdm[int]:
        return tqdm(steps, desc=phase, leave=False, disable=not self.progress or len(steps) < 2)
