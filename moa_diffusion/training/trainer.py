"""One rollout: drawn, scored, normalized, weighed and learned from. No algorithm lives here.

How rewards become advantages is the business of the normalizer and the weighting, how advantages
improve the policy that of the update, how a rollout is cut over processes that of the geometry.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa_diffusion.data.sampling import GroupSampler
from moa_diffusion.data.seeds import derive_seed, generator
from moa_diffusion.distributed import agreed, deal, local_slice
from moa_diffusion.monitoring import drift
from moa_diffusion.monitoring.alarm import Watch
from moa_diffusion.monitoring.heldout import HeldOut
from moa_diffusion.monitoring.lessons import Lessons
from moa_diffusion.monitoring.progress import Progress
from moa_diffusion.objectives.base import Normalizer, Weighting
from moa_diffusion.objectives.metrics import reward_metrics
from moa_diffusion.policies.base import Policy
from moa_diffusion.scoring import Scorer, Scoring
from moa_diffusion.storage import checkpoint
from moa_diffusion.storage.log import RunLog
from moa_diffusion.training.critic import Critic, Estimates
from moa_diffusion.training.loop import Loop, Schedule
from moa_diffusion.training.update import Scalarization, Update
from moa_diffusion.types import ConfigError, Outputs, Request, RewardMatrix, Rollout, concatenate

logger = logging.getLogger(__name__)


class Trainer(Loop):
    """Improves a policy on K rewards.

    Args:
        policy: The policy, which draws samples and gives their log-probabilities.
        scorer: Runs the K reward heads.
        normalizer: Stage 1 and stage 2 of the normalization of rewards.
        weighting: Finds the objectives' weights from statistics.
        sampler: Says which prompts and seeds are drawn in which rollout.
        update: Weighs the objectives and takes the optimizer steps.
        progress: How far the run is.
        schedule: How long the run is, and what happens when.
        heldout: The evaluation; None for none.
        watch: Looks at the evaluations for a reward that is being gamed.
        log: Where metrics and scores go.
        folder: The run's folder.
        seed: The run's seed.
        critic: The value heads; None if the decisions of a sample share one advantage.

    Raises:
        ValueError: if the update weighs at every optimizer step, and the weighting depends on more
            than the Gramian.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        scorer: Scorer,
        normalizer: Normalizer,
        weighting: Weighting,
        sampler: GroupSampler,
        update: Update,
        progress: Progress,
        schedule: Schedule,
        heldout: HeldOut | None,
        watch: Watch,
        log: RunLog,
        folder: Path,
        seed: int,
        critic: Critic | None = None,
    ) -> None:
        super().__init__(
            policy=policy,
            stepper=update.steps.stepper,
            objectives=scorer.names,
            progress=progress,
            schedule=schedule,
            heldout=heldout,
            watch=watch,
            log=log,
            folder=folder,
            seed=seed,
        )
        self.scorer, self.critic = scorer, critic
        self.normalizer, self.weighting = normalizer, weighting
        self.sampler, self.update = sampler, update
        self.steps, self.geometry = update.steps, update.steps.geometry
        if update.fused and not weighting.from_gramian_alone:
            raise ValueError(
                "Parameter `update` should weigh once per rollout for a weighting that depends on "
                f"more than the Gramian. Found a fused one for {type(weighting).__name__}."
            )
        self._lessons = Lessons(scorer.names)

    # ------------------------------------------------------------------ the paragraph

    def step(self) -> dict[str, float]:
        """Draw one rollout and improve the policy on it; return the step's metrics."""
        requests = self.sampler.requests(self.completed)  # N
        self.draw_references(requests)
        rollout, rewards = self.draw(requests)  # n samples of this process; [K, N] of all
        estimates = self.estimate(rollout, rewards)  # [K, N], or decisions [K, D]
        advantages = self.normalizer.per_objective(estimates.matrix)  # [K, N] or [K, D]
        objectives = self.scalarization(estimates, advantages)
        improvement = self.update.improve(rollout, objectives, kl_scale=self.watch.kl_scale)
        self.record(requests, rollout, rewards, improvement.advantage)
        self._lessons.look(rewards, advantages, improvement.advantage, first=self.completed == 0)
        self.progress.completed += 1
        return {
            **reward_metrics(rewards, advantages, improvement.weights, estimates.matrix),
            **self.statistics(rollout),
            **self.weighting.report(),
            **improvement.metrics,
            **estimates.metrics,
        }

    # ------------------------------------------------------------------ its verbs

    def draw_references(self, requests: Sequence[Request]) -> None:
        """Draw from the reference for prompts that the normalizer meets for the first time.

        Rollouts differ in which decisions have noise, and rewards with them, so the reference's
        draws of a prompt are spread over the run: sibling m is drawn as a rollout in the m-th part
        of it would be.
        """
        prompts = self.normalizer.unknown([request.prompt for request in requests])
        if not prompts:
            return
        metadata = {request.prompt: request.metadata for request in requests}
        references = [
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
        local = deal(len(references), self.geometry.sample_batch, self.comm)[self.comm.rank]
        self.expect([references[i] for i in local or [0]])

        def draw(batch: Sequence[Request]) -> Outputs:
            parts = [
                self.policy.sample(list(part), step=step)
                for step, part in groupby(batch, lambda request: steps[request.sibling])
            ]
            return concatenate(parts).outputs

        with self.progress.timed("reference"), self.policy.reference():
            scored = self.scorer.survey(
                references,
                draw,
                batch=self.geometry.sample_batch,
                title="reference",
                before_batch=self.progress.leave_if_stopped,
                progress=self.progress.bars,
            )
        pools = scored.values.unflatten(0, (-1, len(prompts)))  # [samples, P, K]
        self.normalizer.remember(prompts, pools.permute(1, 2, 0))

    def draw(self, requests: tuple[Request, ...]) -> tuple[Rollout, RewardMatrix]:
        """Draw a rollout and score it, each batch while the next one is drawn.

        Args:
            requests: The N requests of all processes.

        Returns:
            the n samples of this process, and the raw rewards ``[K, N]`` on every process.

        Raises:
            TrainingError: if log-probabilities as trained differ from those of sampling.
            RewardError: if a head fails.
        """
        local = local_slice(requests, self.comm)
        self.expect(local)
        with self.scorer.begin() as scoring:
            rollout = self.sample(local, scoring)
            self.steps.check_ratio(rollout, self.policy.trained_steps(self.completed))
            return rollout, self.score(scoring, requests)

    def expect(self, requests: Sequence[Request]) -> None:
        """Let the policy make ready for the prompts that this process draws next, all at once."""
        with self.progress.timed("sample"):
            self.policy.expect([request.prompt for request in requests])

    def sample(self, requests: Sequence[Request], scoring: Scoring | None = None) -> Rollout:
        """Draw this process's share, batch by batch; a stop request is honoured in between.

        Args:
            requests: The n requests of this process.
            scoring: Gets each batch as soon as it is drawn.
        """
        size = self.geometry.sample_batch
        batches = [requests[start : start + size] for start in range(0, len(requests), size)]
        parts = []
        with self.progress.timed("sample"):
            for batch in self.progress.bar("sample", batches):
                self.progress.leave_if_stopped()
                parts.append(part := self.policy.sample(batch, step=self.completed))
                if scoring is not None:
                    scoring.add(part.requests, images=part.images, texts=part.texts)
        return concatenate(parts)

    def score(self, scoring: Scoring, requests: Sequence[Request]) -> RewardMatrix:
        """Raw rewards of all N samples, on every process; waits for what is not scored yet."""
        with self.progress.timed("score"):
            rewards = self.scorer.collect(
                scoring, requests, while_waiting=self.progress.leave_if_stopped
            )
        seconds = self.scorer.seconds.items()
        self.progress.note_seconds({f"score_{name}": spent for name, spent in seconds})
        self._report_silence(rewards)
        return rewards

    def estimate(self, rollout: Rollout, rewards: RewardMatrix) -> Estimates:
        """What advantages are computed from: the rewards ``[K, N]``, or the critic's estimates."""
        if self.critic is None:
            return Estimates(matrix=rewards)
        with self.progress.timed("critic"):
            return self.critic.estimate(rollout, rewards)

    def scalarization(self, estimates: Estimates, advantages: Tensor) -> Scalarization:
        """What the update needs to make one advantage of the K ``[K, N]`` or ``[K, D]``."""
        return Scalarization(
            normalizer=self.normalizer,
            weighting=self.weighting,
            comm=self.comm,
            step=self.completed,
            estimates=estimates,
            advantages=advantages,
            clip=self.steps.loss.advantage_clip,
        )

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
            self.log.write_scores(self.completed + 1, requests, rewards, advantage, texts)

    def statistics(self, rollout: Rollout) -> dict[str, float]:
        """Means over all N outputs of what shows a reward being gamed, and siblings' diversity."""
        outputs = rollout.outputs
        with self.progress.timed("statistics"):
            by_sample = drift.statistics(
                outputs, device=self.steps.stepper.device, batch=self.geometry.sample_batch
            )
            prints = drift.fingerprints(outputs)
        means = {
            name: float(self.comm.gather(values.double()).mean())
            for name, values in (by_sample | dict(rollout.statistics)).items()
        }
        groups = torch.tensor([request.group for request in rollout.requests])
        if isinstance(prints, Tensor):
            everyone: Tensor | list[list[str]] = self.comm.gather(prints)
        else:
            everyone = self.comm.gather_objects(prints)
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
            "updater": self.steps.stepper.state_dict(),
            "normalizer": self.normalizer.state_dict(),
            "weighting": self.weighting.state_dict(),
            **self.update.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.steps.stepper.load_state_dict(state["updater"])
        for part in ("normalizer", "weighting"):
            try:
                getattr(self, part).load_state_dict(state[part])
            except (RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"resume: objectives.{part} has other settings than the checkpoint: {error}"
                ) from error
        self.update.load_state_dict(state)
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

    def _method(self) -> list[str]:
        parts = [self.normalizer, self.weighting, *([self.critic] if self.critic else [])]
        return [type(part).__name__ for part in parts]
