"""The training loop: sample, score, normalise, weigh, improve. No algorithm lives here.

How rewards become advantages is the normalizer's and the weighting's business, how advantages
improve the policy the updater's, how a rollout is cut over processes the geometry's.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from moa_diffusion.data.sampling import GroupSampler
from moa_diffusion.data.seeds import derive_seed, generator
from moa_diffusion.distributed import Comm, agreed, deal, local_slice
from moa_diffusion.monitoring import drift
from moa_diffusion.monitoring.alarm import Watch
from moa_diffusion.monitoring.heldout import HeldOut
from moa_diffusion.monitoring.lessons import Lessons
from moa_diffusion.objectives.base import Normalizer, Weighting, combine
from moa_diffusion.objectives.metrics import cosine_metrics, reward_metrics
from moa_diffusion.policies.base import Policy
from moa_diffusion.scoring import Scorer, Scoring
from moa_diffusion.storage import checkpoint
from moa_diffusion.storage.log import RunLog
from moa_diffusion.training.critic import Critic
from moa_diffusion.training.geometry import Geometry
from moa_diffusion.training.loop import Loop, Schedule
from moa_diffusion.training.stepper import TrainingError
from moa_diffusion.training.update import Updater
from moa_diffusion.types import (
    ConfigError,
    ObjectiveStats,
    Outputs,
    Request,
    RewardMatrix,
    Rollout,
    concatenate,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """When the gradients of the objectives are measured, if the weighting needs their Gramian."""

    fused: bool = False  # at every optimizer step, inside its backward pass
    every: int = 1  # else by a probe: rollouts between two
    share: float = 0.25  # of the rollout's micro-batches in a probe, in (0, 1]


class Trainer(Loop):
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
        critic: value heads, if decisions are to have advantages of their own.
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
        critic: Critic | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(
            policy=policy,
            stepper=updater,
            objectives=scorer.names,
            comm=comm,
            schedule=schedule,
            heldout=heldout,
            watch=watch,
            log=log,
            folder=folder,
            seed=seed,
            progress=progress,
        )
        self.scorer, self.critic = scorer, critic
        self.normalizer, self.weighting = normalizer, weighting
        self.sampler, self.geometry = sampler, geometry
        self.updater, self.gradients = updater, gradients

        if gradients.fused and not weighting.from_gramian_alone:
            raise ValueError(
                "Parameter `gradients.fused` should be False for a weighting that depends on more "
                f"than the Gramian. Found True for {type(weighting).__name__}."
            )

        self._gramian: Tensor | None = None  # [K, K], the last one probed
        self._measured: Tensor | None = None  # [K, K], of this rollout's gradients, if they were
        self._lessons = Lessons(scorer.names)

    # ------------------------------------------------------------------ the paragraph

    def step(self) -> dict[str, float]:
        """One rollout and its optimizer steps; returns the step's metrics."""
        requests = self.sampler.requests(self.completed)
        self.meet(requests)
        mine = local_slice(requests, self.comm)
        self.expect(mine)
        with self.scorer.begin() as scoring:
            rollout = self.sample(mine, scoring)
            self.updater.check_ratio(rollout, self.policy.trained_steps(self.completed))
            rewards = self.score(scoring, requests)  # [K, N]

        self._report_silence(rewards)
        judged, spread = self.judge(rollout, rewards)  # [K, N], or decisions [K, D]
        advantages = self.normalizer.per_objective(judged)  # [K, N]
        if self.gradients.fused:
            update, weights = self.improve_jointly(rollout, judged, advantages)  # [K]
            advantage = self.combine(judged, advantages, weights)
        else:
            weights = self.weigh(rollout, judged, advantages)  # [K] or [K, N]
            advantage = spread(self.combine(judged, advantages, weights))  # [N] or [N, T]
            update = self.improve(rollout, local_slice(advantage, self.comm))

        self._lessons.look(rewards, advantages, advantage, first=self.completed == 0)
        self.completed += 1
        self.record(requests, rollout, rewards, advantage)
        found = reward_metrics(rewards, advantages, weights, judged) | self.statistics(rollout)
        if self._measured is not None:
            found |= cosine_metrics(rewards.names, self._measured)
        return found | self.weighting.report() | update

    # ------------------------------------------------------------------ its verbs

    def meet(self, requests: Sequence[Request]) -> None:
        """Show the normalizer what the reference draws for prompts it meets for the first time.

        Rollouts differ in which decisions have noise, and rewards with them, so the reference's
        draws of a prompt are spread over the run: sibling m is drawn as a rollout in the m-th part
        of it would be.
        """
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
            for sibling in range(self.normalizer.reference_samples)  # so that a batch has few steps
            for group, prompt in enumerate(prompts)
        ]
        steps = self._reference_steps()
        dealt = deal(len(asked), self.geometry.sample_batch, self.comm)[self.comm.rank]
        self.expect([asked[i] for i in dealt or [0]])

        def draw(batch: Sequence[Request]) -> Outputs:
            parts = [
                self.policy.sample(list(part), step=step)
                for step, part in groupby(batch, lambda request: steps[request.sibling])
            ]
            return concatenate(parts).outputs

        with self._timed("reference"), self.policy.reference():
            found = self.scorer.survey(
                asked,
                draw,
                batch=self.geometry.sample_batch,
                title="reference",
                before_batch=self._leave_if_stopped,
                progress=self.progress,
            )
        pools = found.values.unflatten(0, (-1, len(prompts)))  # [samples, P, K]
        self.normalizer.remember(prompts, pools.permute(1, 2, 0))

    def expect(self, requests: Sequence[Request]) -> None:
        """Let the policy make ready for the prompts that this process draws next, all at once."""
        with self._timed("sample"):
            self.policy.expect([request.prompt for request in requests])

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

    def judge(
        self, rollout: Rollout, rewards: RewardMatrix
    ) -> tuple[RewardMatrix, Callable[[Tensor], Tensor]]:
        """What advantages are made of: the rewards ``[K, N]``, or estimates of decisions.

        Returns:
            a matrix ``[K, D]``, and what brings advantages of its columns ``[D]`` into the form
            that the update takes: ``[N]``, or with a critic ``[N, T]``.
        """
        if self.critic is None:
            return rewards, lambda advantage: advantage
        critic = self.critic
        with self._timed("critic"):
            judged, everywhere = critic.judge(rollout, rewards)
        return judged, lambda advantage: critic.spread(advantage, everywhere)

    def record(
        self,
        requests: Sequence[Request],
        rollout: Rollout,
        rewards: RewardMatrix,
        advantage: Tensor,
    ) -> None:
        """Write the scores of all N samples, with the mean advantage of their decisions."""
        texts = self.comm.gather_objects(rollout.texts) if rollout.texts is not None else ()
        if advantage.ndim == 2:
            decisions = self.comm.gather(rollout.mask.cpu()).sum(1)  # [N]
            advantage = advantage.sum(1) / decisions
        with agreed(self.comm, as_one=True):
            self.log.write_scores(self.completed, requests, rewards, advantage, texts)

    def weigh(self, rollout: Rollout, rewards: RewardMatrix, advantages: Tensor) -> Tensor:
        """Weights of this rollout, from a probe of the gradients if the weighting wants one."""
        self._measured = None
        stale = self._gramian is None or self.completed % self.gradients.every == 0
        if self.weighting.needs_gramian and stale:
            with self._timed("probe"):
                local = local_slice(advantages.T, self.comm).T
                found = self.updater.measure(
                    rollout, local, step=self.completed, share=self.gradients.share
                )
            if found.isfinite().all():
                self._gramian = self._measured = found
            else:  # the loss scale of float16 was too high, say: the update will lower it
                logger.warning("The probe's gradients are not finite; it does not count.")
        gramian = self._gramian
        if self.weighting.needs_gramian and gramian is None:  # the next rollout probes again
            gramian = torch.eye(len(advantages), dtype=torch.float64)
        return self._ask(rewards, advantages, gramian)

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

        What stage 2 of the normalizer divides by becomes a factor of the weights, one for the whole
        batch. Two things differ from weighing advantages: the clip of advantages acts on each
        objective's, and a sample to which few objectives apply counts less, since weights cannot be
        renormalised, and it cannot be whitened, for it alone.

        Returns:
            metrics, and the mean weights ``[K]``.
        """
        self._measured = None
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
                kl_unit=lambda: self.weighting.kl_scale() * self.normalizer.kl_scale(),
                before_batch=self._leave_if_stopped,
            )

    def improve(self, rollout: Rollout, advantage: Tensor) -> dict[str, float]:
        """The rollout's optimizer steps.

        Args:
            rollout: this process's n samples.
            advantage: ``[n]``, or ``[n, T]``.

        Returns:
            metrics, averaged over all processes and optimizer steps.
        """
        with self._timed("update"):
            found = self.updater(
                rollout,
                advantage,
                step=self.completed,
                kl_scale=(
                    self.weighting.kl_scale() * self.normalizer.kl_scale() * self.watch.kl_scale
                ),
                before_batch=self._leave_if_stopped,
            )
        return found if self.critic is None else found | self.critic.report

    def statistics(self, rollout: Rollout) -> dict[str, float]:
        """Means over all N outputs of what shows a reward being gamed, and siblings' diversity."""
        outputs = rollout.outputs
        with self._timed("statistics"):
            found = drift.statistics(
                outputs, device=self.updater.device, batch=self.geometry.sample_batch
            )
            kept = drift.fingerprints(outputs)
        means = {
            name: float(self.comm.gather(values.double()).mean())
            for name, values in (found | dict(rollout.statistics)).items()
        }
        groups = torch.tensor([request.group for request in rollout.requests])
        if isinstance(kept, Tensor):
            everyone: Tensor | list[list[str]] = self.comm.gather(kept)
        else:
            everyone = self.comm.gather_objects(kept)
        means["diversity"] = drift.diversity(everyone, self.comm.gather(groups))
        return drift.prefixed("", outputs, means)

    # ------------------------------------------------------------------ of the run

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._lessons.report()

    def prepare(self) -> None:
        scorer = self.heldout.scorer if self.heldout else self.scorer
        asked = self.heldout.requests if self.heldout else ()
        prompts = [p.text for p in self.sampler.prompts] + [request.prompt for request in asked]
        with agreed(self.comm):
            self.policy.prepare(prompts)
        # After the policy's encoders have left the accelerator: they and the heads need not fit
        # together.
        facts = scorer.load(prompts)
        self._try_rewards()
        with agreed(self.comm):
            self.log.write_heads(self.completed, facts)

    def _try_rewards(self) -> None:
        """Score the first samples of the next rollout: what always fails, fails before it is drawn.

        Two samples, as a function may need several; the rollout draws them once more.
        """
        asked = local_slice(self.sampler.requests(self.completed), self.comm)[:2]
        self.expect(asked)
        size = self.geometry.sample_batch
        parts = [asked[start : start + size] for start in range(0, len(asked), size)]
        with agreed(self.comm):
            drawn = concatenate([self.policy.sample(part, step=self.completed) for part in parts])
        self.scorer.try_out(asked, drawn.outputs)
        if self.heldout:
            self.heldout.try_rewards()

    def attempt(self) -> dict[str, float]:
        before = checkpoint.to_cpu(self.changing_state())
        try:
            return self.step()
        except BaseException as error:  # perhaps between two optimizer steps
            traceback.clear_frames(error.__traceback__)  # they hold what memory ran out for
            self.restore(before)  # what is saved is the state before this rollout
            raise

    def headline(self, metrics: Mapping[str, float]) -> str:
        means = [f"{name} {metrics[f'reward_mean/{name}']:.3g}" for name in self.objectives]
        return " ".join([*means, self.weighting.headline()]).rstrip()

    def close(self) -> None:
        self.scorer.close()
        super().close()

    def facts(self) -> dict[str, Any]:
        return {"method": self._method()}

    def changing_state(self) -> dict[str, Any]:
        """What a step changes, and what undoing it needs."""
        return {
            "updater": self.updater.state_dict(),
            "normalizer": self.normalizer.state_dict(),
            "weighting": self.weighting.state_dict(),
            "gramian": self._gramian,
            "critic": None if self.critic is None else self.critic.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.updater.load_state_dict(state["updater"])
        for part in ("normalizer", "weighting"):
            try:
                getattr(self, part).load_state_dict(state[part])
            except (RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"resume: objectives.{part} has other settings than the checkpoint: {error}"
                ) from error
        self._gramian = state["gramian"]
        if self.critic is not None:
            try:
                self.critic.load_state_dict(state["critic"])
            except (RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"resume: critic has other settings than the checkpoint: {error}"
                ) from error

    # ------------------------------------------------------------------ small parts

    def _reference_steps(self) -> list[int]:
        """Rollouts at even distances over the run, one for each reference sample of a prompt.

        They begin elsewhere in each rollout that meets new prompts.
        """
        count = self.normalizer.reference_samples
        draws = generator(self.seed, "reference steps", self.completed)
        start = float(torch.rand((), generator=draws, dtype=torch.float64))
        return [int((m + start) * self.schedule.steps / count) for m in range(count)]

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
        parts = [self.normalizer, self.weighting, *([self.critic] if self.critic else [])]
        return [type(part).__name__ for part in parts]

    def _bar(self, steps: range, phase: str) -> tqdm[int]:
        return tqdm(steps, desc=phase, leave=False, disable=not self.progress or len(steps) < 2)
