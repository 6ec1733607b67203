"""One rollout: drawn, scored, normalized, weighed and learned from. No algorithm lives here.

How rewards become advantages is the business of the normalizer and the weighting, how advantages
improve the policy that of the update, how a rollout is cut over processes that of the geometry.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from moa_diffusion.data.sampling import GroupSampler
from moa_diffusion.data.seeds import derive_seed, generator
from moa_diffusion.distributed import agreed, local_slice, shard
from moa_diffusion.monitoring import drift
from moa_diffusion.monitoring.heldout import HeldOut
from moa_diffusion.monitoring.lessons import Lessons
from moa_diffusion.objectives.base import Normalizer, Weighting
from moa_diffusion.objectives.metrics import reward_metrics
from moa_diffusion.scoring import Scorer, Scoring
from moa_diffusion.storage import checkpoint
from moa_diffusion.storage.log import RunLog
from moa_diffusion.training.critic import Credit, Critic
from moa_diffusion.training.update import Scalarization, Update
from moa_diffusion.types import ConfigError, Outputs, Request, RewardMatrix, Rollout, concatenate

logger = logging.getLogger(__name__)


class Trainer:
    """Improves a policy on K rewards, rollout by rollout: a ``Learner``.

    The policy, the geometry and the run's seed are those of the update's optimizer steps.

    Args:
        scorer: Runs the K reward heads.
        sampler: Says which prompts and seeds are drawn in which rollout.
        normalizer: Stage 1 and stage 2 of the normalization of rewards.
        weighting: Finds the objectives' weights from statistics.
        update: Weighs the objectives and takes the optimizer steps.
        rollouts: The length of the whole run, over which draws of the reference are shared out.
        log: Where every sample's scores go.
        critic: The value heads; None if the decisions of a sample share one advantage.

    Raises:
        ValueError: If the update weighs at every optimizer step, and the weighting depends on more
            than the Gramian.
    """

    title = "rollouts"

    def __init__(
        self,
        *,
        scorer: Scorer,
        sampler: GroupSampler,
        normalizer: Normalizer,
        weighting: Weighting,
        update: Update,
        rollouts: int,
        log: RunLog,
        critic: Critic | None = None,
    ) -> None:
        if update.fused and not weighting.from_gramian_alone:
            raise ValueError(
                "Parameter `update` should weigh once per rollout for a weighting that depends on "
                f"more than the Gramian. Found a fused one for {type(weighting).__name__}."
            )
        self.scorer, self.sampler = scorer, sampler
        self.normalizer, self.weighting = normalizer, weighting
        self.update, self.critic = update, critic
        self.rollouts, self.log, self.objectives = rollouts, log, scorer.names
        self.steps = steps = update.steps
        self.policy, self.stepper, self.geometry = steps.policy, steps.stepper, steps.geometry
        self.progress, self.comm, self.seed = steps.progress, steps.comm, steps.seed
        self._lessons = Lessons(scorer.names)

    # ------------------------------------------------------------------ the paragraph

    def step(self, *, kl_scale: float = 1.0) -> dict[str, float]:
        """Draw one rollout and improve the policy on it; return the step's metrics.

        Args:
            kl_scale: A factor of the KL's weight.
        """
        number = self.progress.completed  # rollouts before this one
        requests = self.sampler.requests(number)  # N
        self.draw_references(requests)
        rollout, rewards = self.draw(requests)  # n samples of this process; [K, N] of all
        rollout = self.judged(rollout, rewards)
        credit = self.assign_credit(rollout, rewards)  # [K, N], or of decisions [K, D]
        advantages = self.normalizer.per_objective(credit.matrix)  # [K, N] or [K, D]
        scalarization = self.scalarization(credit, advantages)
        improvement = self.update.improve(rollout, scalarization, kl_scale=kl_scale)
        self.record(requests, rollout, rewards, improvement.advantage)
        self._lessons.look(rewards, advantages, improvement.advantage, first=number == 0)
        return {
            **reward_metrics(rewards, advantages, improvement.weights, credit.matrix),
            **self.statistics(rollout),
            **self.weighting.report(),
            **improvement.metrics,
            **credit.metrics,
        }

    # ------------------------------------------------------------------ its verbs

    def draw_references(self, requests: Sequence[Request]) -> None:
        """Draw from the reference for prompts that the normalizer meets for the first time.

        Rollouts differ in which decisions have noise, and rewards with them, so the reference's
        draws of a prompt lie evenly over the run: sibling m is drawn as a rollout in the m-th part
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
        steps, size = self._reference_steps(), self.geometry.sample_batch
        local = shard(len(references), size, self.comm)[self.comm.rank]
        self.expect([references[i] for i in local or [0]])

        batches = [references[start : start + size] for start in range(0, len(references), size)]
        most = max(len(_by_step(batch, steps)) for batch in batches) if self.policy.lockstep else 0
        with self.progress.timed("reference"), self.policy.reference():
            scored = self.scorer.draw_and_score(
                references,
                partial(self._draw_by_step, steps=steps, most=most),
                batch=size,
                title="reference",
                before_batch=self.progress.leave_if_stopped,
                bars=self.progress.bars,
                lockstep=self.policy.lockstep,
            )
        pools = scored.values.unflatten(1, (-1, len(prompts)))  # [K, samples, P]
        self.normalizer.remember(prompts, pools.permute(2, 0, 1))

    def draw(self, requests: tuple[Request, ...]) -> tuple[Rollout, RewardMatrix]:
        """Draw a rollout and score it, each batch while the next one is drawn.

        Args:
            requests: The N requests of all processes.

        Returns:
            The n samples of this process, and the raw rewards ``[K, N]`` on every process.

        Raises:
            TrainingError: If log-probabilities as trained differ from those of sampling.
            RewardError: If a head fails.
        """
        local = local_slice(requests, self.comm)
        self.expect(local)
        with self.scorer.begin() as scoring:
            rollout = self.sample(local, scoring)
            self.steps.check_ratio(rollout, self.policy.trained_steps(self.progress.completed))
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
                parts.append(part := self.policy.sample(batch, step=self.progress.completed))
                if scoring is not None:
                    scoring.add(part.requests, images=part.images, texts=part.texts)
        return concatenate(parts)

    def score(self, scoring: Scoring, requests: Sequence[Request]) -> RewardMatrix:
        """Return raw rewards of all N samples, on every process; wait for those not scored yet."""
        with self.progress.timed("score"):
            rewards = self.scorer.collect(
                scoring, requests, while_waiting=self.progress.leave_if_stopped
            )
        seconds = self.scorer.seconds.items()
        self.progress.note_seconds({f"score_{name}": spent for name, spent in seconds})
        self._report_silence(rewards)
        return rewards

    def judged(self, rollout: Rollout, rewards: RewardMatrix) -> Rollout:
        """Return the rollout without the decisions of samples that no reward applies to.

        They say nothing about what is better. Along the reverse process they take part in the KL
        all the same, as in the papers; along the forward process they would be pulled to the old
        adapter, as if they were neither good nor bad.
        """
        if self.steps.settings.kind != "forward":
            return rollout
        applies = ~rewards.values.isnan().all(0)  # [N]
        mine = local_slice(applies, self.comm).to(rollout.mask.device)
        return replace(rollout, mask=rollout.mask & mine[:, None])

    def assign_credit(self, rollout: Rollout, rewards: RewardMatrix) -> Credit:
        """Return what advantages are computed from.

        It is the rewards ``[K, N]``, or a critic's estimates ``[K, D]``.
        """
        if self.critic is None:
            return Credit(matrix=rewards)
        with self.progress.timed("critic"):
            return self.critic.assign_credit(rollout, rewards)

    def scalarization(self, credit: Credit, advantages: Tensor) -> Scalarization:
        """Return what the update needs to make one advantage of the K ``[K, N]`` or ``[K, D]``."""
        return Scalarization(
            normalizer=self.normalizer,
            weighting=self.weighting,
            comm=self.comm,
            step=self.progress.completed,
            credit=credit,
            advantages=advantages,
            clip=self.steps.settings.advantage_clip,
        )

    def record(
        self,
        requests: Sequence[Request],
        rollout: Rollout,
        rewards: RewardMatrix,
        advantage: Tensor,
    ) -> None:
        """Write the scores of all N samples, with the mean advantage of their decisions.

        Args:
            requests: The N requests of all processes.
            rollout: The n samples of this process; its texts and mask are gathered.
            rewards: The raw rewards ``[K, N]``.
            advantage: The combined advantage ``[N]``, or ``[N, T]`` if each decision has its own.
        """
        texts = self.comm.gather_objects(rollout.texts) if rollout.texts is not None else ()
        if advantage.ndim == 2:
            decisions = self.comm.gather(rollout.mask.cpu()).sum(1)  # [N]
            advantage = advantage.sum(1) / decisions
        with agreed(self.comm, as_one=True):
            self.log.write_scores(self.progress.completed + 1, requests, rewards, advantage, texts)

    def statistics(self, rollout: Rollout) -> dict[str, float]:
        """Return means over N outputs of signs of a reward being gamed, and siblings' diversity."""
        outputs = rollout.outputs
        with self.progress.timed("statistics"):
            by_sample = drift.statistics(
                outputs, device=self.stepper.device, batch=self.geometry.sample_batch
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

    # ------------------------------------------------------------------ what the run asks for

    def prepare(self, heldout: HeldOut | None) -> Mapping[str, Any]:
        """Encode the prompts, then load the heads and try them on samples."""
        scorer = heldout.scorer if heldout else self.scorer
        prompts = [prompt.text for prompt in self.sampler.prompts]
        prompts += [request.prompt for request in heldout.requests] if heldout else []
        with agreed(self.comm):
            self.policy.prepare(prompts)
        # After the policy's encoders have left the accelerator: they and the heads need not fit
        # together.
        heads = scorer.load(prompts)
        self.try_rewards()
        if heldout:
            heldout.try_rewards()
        return heads

    def try_rewards(self) -> None:
        """Score the first samples of the next rollout: what always fails, fails before it is drawn.

        Two samples, as a function may need several; the rollout draws them once more.
        """
        requests = local_slice(self.sampler.requests(self.progress.completed), self.comm)[:2]
        self.expect(requests)
        size = self.geometry.sample_batch
        parts = [requests[start : start + size] for start in range(0, len(requests), size)]
        with agreed(self.comm):
            drawn = concatenate(
                [self.policy.sample(part, step=self.progress.completed) for part in parts]
            )
        self.scorer.try_out(requests, drawn.outputs)

    def evaluate(self) -> dict[str, float]:
        """Return nothing: rollouts say it already."""
        return {}

    def snapshot(self) -> dict[str, Any]:
        """Copy the state to main memory."""
        copied: dict[str, Any] = checkpoint.to_cpu(self.state_dict())
        return copied

    def undo(self, snapshot: dict[str, Any]) -> bool:
        """Load the snapshot, which always works."""
        self.load_state_dict(snapshot)
        return True

    def headline(self, metrics: Mapping[str, float]) -> str:
        """Return the weighting's own words."""
        return self.weighting.headline()

    def facts(self) -> dict[str, Any]:
        """Return the classes of normalizer, weighting and critic."""
        parts = [self.normalizer, self.weighting, *([self.critic] if self.critic else [])]
        return {"method": [type(part).__name__ for part in parts]}

    def state_dict(self) -> dict[str, Any]:
        """Return optimizer, normalizer, weighting, critic, and what the update remembers."""
        return {
            "updater": self.stepper.state_dict(),
            "reference": self.steps.reference.state_dict(),
            "normalizer": self.normalizer.state_dict(),
            "weighting": self.weighting.state_dict(),
            **self.update.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state, part by part."""
        self.stepper.load_state_dict(state["updater"])
        self.steps.reference.load_state_dict(state.get("reference", {}))  # older ones lack it
        with _fitting("objectives.normalizer"):
            self.normalizer.load_state_dict(state["normalizer"])
        with _fitting("objectives.weighting"):
            self.weighting.load_state_dict(state["weighting"])
        self.update.load_state_dict(state)
        if self.critic is not None:
            with _fitting("critic"):
                self.critic.load_state_dict(state["critic"])

    def finish(self) -> None:
        """Report what kept the run from learning, if anything did."""
        self._lessons.report()

    def close(self) -> None:
        """End the heads' threads and workers."""
        self.scorer.close()

    # ------------------------------------------------------------------ small parts

    def _reference_steps(self) -> list[int]:
        """Return rollouts at even distances over the run, one per reference sample of a prompt.

        They begin elsewhere in each rollout that meets new prompts.
        """
        count = self.normalizer.reference_samples
        draws = generator(self.seed, "reference steps", self.progress.completed)
        start = float(torch.rand((), generator=draws, dtype=torch.float64))
        return [int((m + start) * self.rollouts / count) for m in range(count)]

    def _draw_by_step(
        self, batch: Sequence[Request], *, steps: Sequence[int], most: int
    ) -> Outputs:
        """Draw each sibling as the rollout ``steps[sibling]`` would, in at least ``most`` calls."""
        parts = [self.policy.sample(part, step=step) for step, part in _by_step(batch, steps)]
        for _ in range(most - len(parts)):  # another process may draw so many; dropped here
            self.policy.sample(batch[:1], step=steps[0])
        return concatenate(parts).outputs

    def _report_silence(self, rewards: RewardMatrix) -> None:
        """Say so if a reward applies to nothing at the start: a wrong prompt set, perhaps."""
        if self.progress.completed == 0:
            for name, row in zip(rewards.names, rewards.values, strict=True):
                if row.isnan().all():
                    logger.warning("Reward %s applies to no sample of the first rollout.", name)


def _by_step(batch: Sequence[Request], steps: Sequence[int]) -> list[tuple[int, list[Request]]]:
    """Cut a batch where the rollout changes that its siblings are drawn as."""
    groups = groupby(batch, lambda request: steps[request.sibling])
    return [(step, list(part)) for step, part in groups]


@contextmanager
def _fitting(section: str) -> Iterator[None]:
    """Report a state that does not fit as one of other settings."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"resume: {section} has other settings than the checkpoint: {error}"
        ) from error
