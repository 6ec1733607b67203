"""The training loop: sample, score, normalise, weigh, improve. No algorithm lives here.

How rewards become advantages is the normalizer's and the weighting's business, how advantages
improve the policy the updater's, how a rollout is cut over processes the geometry's.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

from moa_diffusion import checkpoint, drift, front
from moa_diffusion.alarm import Alarm, Watch
from moa_diffusion.data import Geometry, GroupSampler, derive_seed
from moa_diffusion.distributed import Comm, local_slice
from moa_diffusion.heldout import HeldOut
from moa_diffusion.metrics import RunLog, cosine_metrics, reward_metrics
from moa_diffusion.objectives.base import Normalizer, Weighting, combine
from moa_diffusion.policies.base import Policy
from moa_diffusion.scoring import RewardError, Scorer, Scoring
from moa_diffusion.types import (
    ConfigError,
    ObjectiveStats,
    Outputs,
    Request,
    RewardMatrix,
    Rollout,
    concatenate,
)
from moa_diffusion.update import TrainingError, Updater

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long, and what happens when. Counts are rollouts; 0 switches an occasion off."""

    steps: int  # rollouts of the whole run
    minutes: float  # after which it ends earlier, evaluations apart
    checkpoint_every: int
    checkpoint_keep: int  # newest checkpoints kept; 0 keeps all
    checkpoint_front: int  # and at most so many that no other dominates in the held-out rewards
    evaluate_every: int  # held-out rewards and pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """When the gradients of the objectives are measured, if the weighting needs their Gramian."""

    fused: bool = False  # at every optimizer step, inside its backward pass
    every: int = 1  # else by a probe: rollouts between two
    share: float = 0.25  # of the rollout's samples in a probe, in (0, 1]


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
        updater: takes the optimizer steps.
        gradients: when the objectives' gradients are measured, for weightings that want them.
        schedule: how long, and what happens when.
        heldout: the evaluation; None for none.
        watch: looks at the evaluations for a reward that is being gamed.
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
        updater: Updater,
        gradients: Gradients,
        schedule: Schedule,
        heldout: HeldOut | None,
        watch: Watch,
        log: RunLog,
        folder: Path,
        seed: int,
        progress: bool = True,
    ) -> None:
        self.policy, self.scorer = policy, scorer
        self.normalizer, self.weighting = normalizer, weighting
        self.sampler, self.geometry, self.comm = sampler, geometry, comm
        self.updater, self.gradients = updater, gradients
        self.schedule, self.heldout, self.watch = schedule, heldout, watch
        self.log, self.folder, self.seed, self.progress = log, folder, seed, progress

        if gradients.fused and not weighting.from_gramian_alone:
            raise ValueError(
                "Parameter `gradients.fused` should be False for a weighting that depends on more "
                f"than the Gramian. Found True for {type(weighting).__name__}."
            )

        self.completed = 0  # rollouts finished
        self.seconds = 0.0  # that they took
        self._gramian: Tensor | None = None  # [K, K], the last one probed
        self._measured: Tensor | None = None  # [K, K], of this rollout's gradients, if they were
        self._row: dict[str, float] | None = None  # metrics of a rollout not yet written
        self._stop = False  # set by SIGTERM
        self._ratio_checked = False
        self._seconds: dict[str, float] = {}

    # ------------------------------------------------------------------ the paragraph

    def step(self) -> dict[str, float]:
        """One rollout and its optimizer steps; returns the step's metrics."""
        requests = self.sampler.requests(self.completed)
        self.meet(requests)
        with self.scorer.begin() as scoring:
            rollout = self.sample(local_slice(requests, self.comm), scoring)
            if not self._ratio_checked:
                self.updater.check_ratio(rollout)
                self._ratio_checked = True
            rewards = self.score(scoring, requests)  # [K, N]

        self._report_silence(rewards)
        advantages = self.normalizer.per_objective(rewards)  # [K, N]
        if self.gradients.fused:
            update, weights = self.improve_jointly(rollout, rewards, advantages)  # [K]
            advantage = self.combine(rewards, advantages, weights)
        else:
            weights = self.weigh(rollout, rewards, advantages)  # [K] or [K, N]
            advantage = self.combine(rewards, advantages, weights)  # [N]
            update = self.improve(rollout, local_slice(advantage, self.comm))

        self.completed += 1
        self.log.write_scores(self.completed, requests, rewards, advantage)
        found = reward_metrics(rewards, advantages, weights) | self.statistics(rollout)
        if self._measured is not None:
            found |= cosine_metrics(rewards.names, self._measured)
        return found | self.weighting.report() | update

    # ------------------------------------------------------------------ its verbs

    def meet(self, requests: Sequence[Request]) -> None:
        """Show the normalizer what the reference draws for prompts it meets for the first time."""
        prompts = self.normalizer.unknown([request.prompt for request in requests])
        if not prompts:
            return
        metadata = {request.prompt: request.metadata for request in requests}
        asked = [
            Request(
                prompt=prompt,
                metadata=metadata[prompt],
                group=group,
                sibling=sibling,
                seed=derive_seed(self.seed, "reference", prompt, sibling),
            )
            for group, prompt in enumerate(prompts)
            for sibling in range(self.normalizer.reference_samples)
        ]

        def draw(batch: Sequence[Request]) -> Outputs:
            return self.policy.sample(batch, step=self.completed).outputs

        with self._timed("reference"), self.policy.reference():
            found = self.scorer.survey(
                asked,
                draw,
                batch=self.geometry.sample_batch,
                title="reference",
                before_batch=self._leave_if_stopped,
                progress=self.progress,
            )
        pools = found.values.unflatten(0, (len(prompts), -1)).transpose(1, 2)  # [P, K, samples]
        self.normalizer.remember(prompts, pools)

    def sample(self, requests: Sequence[Request], scoring: Scoring | None = None) -> Rollout:
        """Draw this process's share, batch by batch; a stop request is honoured in between.

        Args:
            requests: n, of this process.
            scoring: what each batch is handed to as soon as it is drawn.
        """
        size = self.geometry.sample_batch
        parts = []
        with self._timed("sample"):
            for start in self._bar(range(0, len(requests), size), "sample"):
                self._leave_if_stopped()
                batch = requests[start : start + size]
                parts.append(part := self.policy.sample(batch, step=self.completed))
                if scoring is not None:
                    scoring.add(part.requests, images=part.images, texts=part.texts)
        return concatenate(parts)

    def score(self, scoring: Scoring, requests: Sequence[Request]) -> RewardMatrix:
        """Raw rewards of all N samples, on every process; waits for what is not scored yet."""
        with self._timed("score"):
            rewards = self.scorer.collect(scoring, requests, while_waiting=self._leave_if_stopped)
        self._seconds |= {f"score_{name}": s for name, s in self.scorer.seconds.items()}
        return rewards

    def weigh(self, rollout: Rollout, rewards: RewardMatrix, advantages: Tensor) -> Tensor:
        """Weights of this rollout, from a probe of the gradients if the weighting wants one."""
        self._measured = None
        stale = self._gramian is None or self.completed % self.gradients.every == 0
        if self.weighting.needs_gramian and stale:
            with self._timed("probe"):
                local = local_slice(advantages.T, self.comm).T
                found = self.updater.measure(rollout, local, share=self.gradients.share)
            if found.isfinite().all():
                self._gramian = self._measured = found
            else:  # the loss scale of float16 was too high, say: the update will lower it
                logger.warning("The probe's gradients are not finite; it does not count.")
                if self._gramian is None:
                    self._gramian = torch.eye(len(advantages), dtype=torch.float64)
        return self._ask(rewards, advantages, self._gramian)

    def combine(self, rewards: RewardMatrix, advantages: Tensor, weights: Tensor) -> Tensor:
        """One advantage per sample: ``[N]``."""
        applies = ~torch.isnan(rewards.values)  # [K, N]
        scores = combine(advantages, weights, applies)  # [N]
        limit = self.updater.surrogate.advantage_clip
        return self.normalizer.combined(scores, rewards).clamp(-limit, limit)

    def improve_jointly(
        self, rollout: Rollout, rewards: RewardMatrix, advantages: Tensor
    ) -> tuple[dict[str, float], Tensor]:
        """The rollout's optimizer steps with weights solved at each on its own gradients.

        What stage 2 of the normalizer divides by becomes a factor of the weights. Two things differ
        from weighing advantages: the clip of advantages acts on each objective's, and a sample to
        which few objectives apply counts less, since weights cannot be renormalised for it alone.

        Returns:
            metrics, and the mean weights ``[K]``.
        """
        limit = self.updater.surrogate.advantage_clip
        applies = ~torch.isnan(rewards.values)

        def solve(gramian: Tensor) -> Tensor:
            self._measured = gramian
            weights = self._ask(rewards, advantages, gramian)  # [K]
            weights = weights / weights.abs().sum()
            scores = combine(advantages, weights, applies)
            total = scores.square().sum()
            whitened = self.normalizer.combined(scores, rewards)
            return weights * (whitened @ scores / total) if total > 0 else weights

        with self._timed("update"):
            return self.updater.fused(
                rollout,
                local_slice(advantages.T, self.comm).T.clamp(-limit, limit),
                solve,
                step=self.completed,
                kl_scale=self.watch.kl_scale,
                before_batch=self._leave_if_stopped,
            )

    def improve(self, rollout: Rollout, advantage: Tensor) -> dict[str, float]:
        """The rollout's optimizer steps.

        Args:
            rollout: this process's n samples.
            advantage: ``[n]``.

        Returns:
            metrics, averaged over all processes and optimizer steps.
        """
        with self._timed("update"):
            return self.updater(
                rollout,
                advantage,
                step=self.completed,
                kl_scale=self.weighting.kl_scale() * self.watch.kl_scale,
                before_batch=self._leave_if_stopped,
            )

    def statistics(self, rollout: Rollout) -> dict[str, float]:
        """Means over all N outputs of what shows a reward being gamed, and siblings' diversity."""
        outputs = rollout.outputs
        columns = drift.statistics(outputs) | dict(rollout.statistics)
        means = {
            name: float(self.comm.gather(values.double()).mean())
            for name, values in columns.items()
        }
        kept = drift.fingerprints(outputs)
        groups = torch.tensor([request.group for request in rollout.requests])
        if isinstance(kept, Tensor):
            everyone: Tensor | list[list[str]] = self.comm.gather(kept)
        else:
            everyone = self.comm.gather_objects(kept)
        means["diversity"] = drift.diversity(everyone, self.comm.gather(groups))
        return drift.prefixed("", outputs, means)

    def evaluate(self) -> dict[str, float]:
        """Held-out rewards of the averaged weights, what they set off, and a sheet of outputs."""
        if self.heldout is None:
            return {}
        with self._timed("evaluate"), self.updater.ema.applied():
            found = self.heldout(self.completed, before_batch=self._leave_if_stopped)
        seconds = self.heldout.scorer.seconds.items()
        self._seconds |= {f"evaluate_{name}": spent for name, spent in seconds}
        alarms = self.watch.look(found)
        for alarm in alarms:
            self.log.write_alarm(alarm.row())
        self._act(next((alarm for alarm in alarms if alarm.to_step is not None), None))
        return {**found.metrics, **self.watch.report()}

    def _act(self, alarm: Alarm | None) -> None:
        """Go back to the checkpoint that an alarm names."""
        if alarm is None:
            return
        assert alarm.to_step is not None
        try:
            state = checkpoint.load_state(checkpoint.step_folder(self.folder, alarm.to_step))
        except ConfigError as error:  # somebody deleted or damaged it
            raise TrainingError(f"alarm: cannot go back: {error}") from error
        self._restore(state)

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
                scorer = self.heldout.scorer if self.heldout else self.scorer
                self.log.write_heads(self.completed, scorer.load())
                self.policy.prepare(
                    [prompt.text for prompt in self.sampler.prompts]
                    + [request.prompt for request in asked]
                )
                self._leave_if_stopped()
                if self._row is not None:
                    self._finish_round(bar)
                elif self.heldout and self.completed == 0:
                    self.log.write(0, self.evaluate() | self._take_seconds())
                    if self._may_be_wanted():
                        self.save()
                if self.watch.over and self.completed < self.schedule.steps:
                    logger.warning(
                        "An alarm ended this run after %d rollouts. It goes on with another "
                        "alarm.action or a higher alarm.limit.",
                        self.completed,
                    )
                while not self._last():
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
        before = checkpoint.to_cpu(self._state())
        try:
            metrics = self.step()
        except (Interrupted, RewardError, TrainingError):  # perhaps between two optimizer steps
            self._restore(before)  # what is saved is the state before this rollout
            raise
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self._row = metrics | self._take_seconds() | {"seconds/total": seconds}
        self._finish_round(bar)

    def _finish_round(self, bar: tqdm[Any]) -> None:
        """Evaluate if it is due, write the row, save. Cut short, it is made up after a resume."""
        assert self._row is not None
        if self.heldout and (self._last() or self._due(self.schedule.evaluate_every)):
            start = time.perf_counter()
            self._row |= self.evaluate() | self._take_seconds()
            self._row["seconds/total"] += time.perf_counter() - start
        metrics, self._row = self._row, None
        self.log.write(self.completed, metrics)
        bar.update()
        means = [f"{name} {metrics[f'reward_mean/{name}']:.3g}" for name in self.scorer.names]
        bar.set_postfix_str(" ".join([*means, self.weighting.headline()]).rstrip())
        if (skipped := self.updater.skipped_in_a_row) >= self.updater.surrogate.max_skipped:
            raise TrainingError(
                f"The last {skipped} updates had non-finite gradients. "
                "A smaller `optimizer.lr` or `policy.dtype: bfloat16` may help."
            )
        due = self._due(self.schedule.checkpoint_every) or self._may_be_wanted()
        if self._last() or due:
            self.save()

    def _last(self) -> bool:
        """Whether the run is at its end; the same on every process."""
        over = 0 < 60 * self.schedule.minutes <= self.seconds
        done = self.completed >= self.schedule.steps or self.watch.over
        return done or self.comm.any(over)

    def _may_be_wanted(self) -> bool:
        """Whether a later alarm may go back to the state as it is."""
        back = self.watch.rules.action == "rollback"
        return back and self.completed in self.watch.best_steps

    def _due(self, every: int) -> bool:
        return every > 0 and self.completed % every == 0

    def save(self) -> Path:
        """Write a checkpoint of the state after the last completed rollout."""
        folder = checkpoint.step_folder(self.folder, self.completed)
        if self.comm.rank == 0 and not (folder / checkpoint.STATE).is_file():
            with checkpoint.atomic_folder(folder) as partial:
                self.policy.save(partial)
                (partial / "ema").mkdir()
                with self.updater.ema.applied():
                    self.policy.save(partial / "ema")
                checkpoint.save_state(partial, self.state_dict())
            self._retain()
        self.comm.barrier()
        return folder

    def _retain(self) -> None:
        """Delete the checkpoints that are neither new, nor on the front, nor to go back to."""
        front.retain(
            self.folder,
            self.scorer.names,
            newest=self.schedule.checkpoint_keep,
            front=self.schedule.checkpoint_front,
            best=self.watch.best_steps if self.watch.rules.action == "rollback" else (),
        )

    def close(self) -> None:
        """Release worker processes, trackers and the process group."""
        self.scorer.close()
        if self.heldout:
            self.heldout.scorer.close()
        self.comm.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything the next rollout depends on, equal on every process."""
        return {
            "step": self.completed,
            "seconds": self.seconds,
            "seed": self.seed,
            "objectives": list(self.scorer.names),
            "method": self._method(),
            "row": self._row,
            "heldout": self.heldout.state_dict() if self.heldout else {},
            "watch": self.watch.state_dict(),
            **self._state(),
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
        checkpoint.check_adapter(state["updater"]["trainable"], self.policy.trainable())
        self._restore(state)
        self.completed, self.seconds, self._row = state["step"], state["seconds"], state["row"]
        if self.heldout and state["heldout"]:  # empty: the run has not evaluated so far
            self.heldout.load_state_dict(state["heldout"])
        self.watch.load_state_dict(state["watch"])
        self.log.rewind(self.completed, pending=self._row is not None)
        if self.comm.rank == 0:
            checkpoint.forget_after(self.folder, self.completed)
            if checkpoint.list_checkpoints(self.folder):
                self._retain()

    def _state(self) -> dict[str, Any]:
        """What a step changes, and what undoing it needs."""
        return {
            "updater": self.updater.state_dict(),
            "normalizer": self.normalizer.state_dict(),
            "weighting": self.weighting.state_dict(),
            "gramian": self._gramian,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.updater.load_state_dict(state["updater"])
        for part in ("normalizer", "weighting"):
            try:
                getattr(self, part).load_state_dict(state[part])
            except (RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"resume: objectives.{part} has other settings than the checkpoint: {error}"
                ) from error
        self._gramian = state["gramian"]

    # ------------------------------------------------------------------ small parts

    def _report_silence(self, rewards: RewardMatrix) -> None:
        """Say so if a reward applies to nothing at the start: a wrong prompt set, perhaps."""
        if self.completed == 0:
            for name, row in zip(rewards.names, rewards.values, strict=True):
                if row.isnan().all():
                    logger.warning("Reward %s applies to no sample of the first rollout.", name)

    def _ask(self, rewards: RewardMatrix, advantages: Tensor, gramian: Tensor | None) -> Tensor:
        """Ask the weighting; rank 0's answer counts for all."""
        stats = ObjectiveStats(
            step=self.completed,
            rewards=rewards,
            advantages=advantages,
            gramian=gramian,
            win_rates=self.normalizer.win_rates(rewards),
        )
        try:
            weights: Tensor = self.weighting(stats).clone()
        except ValueError as error:  # such as a target below the base level that was measured
            raise TrainingError(f"objectives.weighting: {error}") from error
        self.comm.broadcast_(weights)
        return weights

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
