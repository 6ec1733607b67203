"""Whether there is anything to learn from: a run that learns nothing ends as well as any other."""

from __future__ import annotations

import logging
from collections import Counter

from torch import Tensor

from moa_diffusion.types import RewardMatrix

logger = logging.getLogger(__name__)


class Lessons:
    """Counts the rollouts from which an objective, or the policy, can learn nothing.

    Says so at the first rollout, where a wrong reward function shows, and at the end.

    Args:
        names: The names of the K objectives.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._rollouts = 0
        self._empty: Counter[str] = Counter()  # rollouts by objective
        self._absent: Counter[str] = Counter()  # rollouts without any sample that it applies to
        self._in_vain = 0  # rollouts without any advantage
        self._resumed = False

    def look(
        self, rewards: RewardMatrix, advantages: Tensor, advantage: Tensor, *, first: bool
    ) -> None:
        """Count one rollout.

        Args:
            rewards: The rewards of its N samples.
            advantages: Advantages ``[K, N]`` of each objective, or ``[K, D]`` of decisions.
            advantage: What the policy is updated with, of any shape.
            first: Whether it is the run's first.
        """
        self._resumed |= self._rollouts == 0 and not first
        self._rollouts += 1
        for name, row, own in zip(self._names, rewards.values, advantages, strict=True):
            applying = row[~row.isnan()]
            # A critic's estimates vary even where the reward does not.
            constant = len(applying) > 0 and bool((applying == applying[0]).all())
            if not len(applying):
                self._absent[name] += 1
                continue
            if not constant and own.any():
                continue
            self._empty[name] += 1
            if first:
                low, high = float(applying.min()), float(applying.max())
                logger.warning(
                    "Nothing can be learned from the reward %s in the first rollout: it is %s. "
                    "Does its function score the samples, and not the prompts?",
                    name,
                    f"{low:g} for every sample"
                    if low == high
                    else f"equal for all samples of a prompt (from {low:g} to {high:g} in all)",
                )
        if not advantage.any():
            self._in_vain += 1
            if first:
                logger.warning(
                    "This run learns nothing so far: every advantage of the first rollout is 0."
                )

    def report(self) -> None:
        """Say at the end of a run from what nothing was learned since it began or was resumed."""
        since = " since it was resumed" if self._resumed else ""
        for name in self._names:
            count, applying = self._empty[name], self._rollouts - self._absent[name]
            if self._rollouts and not applying:
                logger.warning(
                    "Nothing could be learned from the reward %s in %d of %d rollouts%s: it was "
                    "NaN for every sample, as if it applied to none of the prompts.",
                    *(name, self._rollouts, self._rollouts, since),
                )
            elif count and 2 * count >= applying:
                logger.warning(
                    "Nothing could be learned from the reward %s in %d of %d rollouts%s: it did "
                    "not differ between samples of a prompt.",
                    *(name, count, self._rollouts, since),
                )
        if self._rollouts and self._in_vain == self._rollouts:
            logger.warning(
                "THIS RUN HAS LEARNED NOTHING%s: every advantage was 0 in all of its %d rollouts.",
                *(since.upper(), self._rollouts),
            )
