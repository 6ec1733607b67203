"""The level of each reward as the policy changes, whatever prompts a rollout draws.

Prompts differ, and by more than the samples of one prompt: a mean over the prompts that a rollout
happened to draw says more about these than about the policy. So a prompt is compared with itself.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moa_diffusion.statistics.groups import group_moments
from moa_diffusion.types import RewardMatrix

WARMUP = 3  # first rollouts, where a method has no option for it
MEMORY = 256  # prompts


class RunningLevel(nn.Module):
    """The mean of each reward, whose changes are those of prompts compared with themselves.

    With ``m_p`` the mean of the latest group of the prompt p, over the last ``memory`` prompts::

        start    = mean of b_p over the prompts of the first rollouts
        progress = sum_p w_p (m_p - b_p) / sum_p w_p

    Of a prompt that has come back, ``b_p`` is what its first group scored, less the progress that
    there was then, and ``w_p = 1``. A prompt of the first rollouts that has not come back says
    nothing of the progress. One that was met only once, later, says little: ``b_p`` is ``start``,
    and ``w_p`` the variance of a difference of two group means over that of the prompts' means, at
    most 1/2. Where none has come back, the progress that there was counts like one that has. So
    with few prompts the progress is that of pairs, and with prompts that never come back it follows
    the difference of two means, slowly where prompts differ much. All of it is ours.

    Args:
        count: Number K of objectives.
        warmup: Number of first rollouts, at least 1.
        memory: Number of prompts that are remembered, the last ones seen; at least 1.

    Attributes:
        start: Mean reward at the start, ``[K]``, in each reward's own unit; NaN for an objective
            that is not known yet.
        progress: Mean change since the start, ``[K]``, in each reward's own unit.
        records: By prompt, in the order of the last visit: ``b_p``, ``m_p`` and ``w_p``, K numbers
            each.
    """

    start: Tensor
    progress: Tensor
    unpaired: Tensor
    rollouts: Tensor

    def __init__(self, count: int, *, warmup: int, memory: int) -> None:
        super().__init__()
        self.warmup, self.memory = warmup, memory
        unknown = torch.full((count,), torch.nan, dtype=torch.float64)  # NaN: not measured yet
        self.register_buffer("start", unknown)
        self.register_buffer("progress", torch.zeros_like(unknown))
        self.register_buffer("unpaired", unknown.clone())  # w_p of a prompt that is met late
        self.register_buffer("rollouts", torch.zeros((), dtype=torch.int64))
        self.records: dict[str, list[list[float]]] = {}

    @torch.no_grad()
    def forward(self, rewards: RewardMatrix) -> Tensor:
        """Take in a rollout, and return ``start + progress``: ``[K]``, NaN where nothing is known.

        Args:
            rewards: Rewards of the rollout, of all processes.

        Returns:
            Float64, in each reward's own unit.
        """
        self.rollouts = self.rollouts + 1
        early = self.start.isnan() | (self.rollouts <= self.warmup)  # [K]
        self._visit(rewards, early)
        known = torch.tensor(list(self.records.values()), dtype=torch.float64)  # [P, 3, K]
        base, mean, weight = known.unbind(1)
        change = torch.where(weight == 1, mean - base, mean - self.start)
        weight = torch.where(change.isnan(), 0.0, weight)
        before = torch.where((weight == 1).any(0), 0.0, 1.0)  # [K], the weight of what there was
        sums = (weight * change.nan_to_num(nan=0.0)).sum(0) + before * self.progress
        self.progress = sums / (weight.sum(0) + before)
        # What is met for the first time gets its base now, at the progress that there is.
        base = torch.where(base.isnan(), mean - self.progress, base)
        for record, values in zip(self.records.values(), base.tolist(), strict=True):
            record[0] = values
        self._begin(early, base, rewards)
        return self.start + self.progress

    def get_extra_state(self) -> dict[str, Any]:
        """Return what is known of each prompt, which no buffer of a fixed shape holds."""
        return copy.deepcopy(self.records)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what is known of each prompt."""
        self.records = copy.deepcopy(state)

    def _visit(self, rewards: RewardMatrix, early: Tensor) -> None:
        """Write down the groups' means, and what they are worth."""
        means, _, counts = group_moments(rewards.values, rewards.groups)  # [K, N]
        means = torch.where(counts > 0, means, torch.nan)
        groups = {group: i for i, group in reversed(list(enumerate(rewards.groups.tolist())))}
        visits: dict[str, list[Tensor]] = {}
        for group in sorted(groups):
            visits.setdefault(rewards.prompts[groups[group]], []).append(means[:, groups[group]])
        unpaired = torch.where(early, 0.0, self.unpaired)
        for prompt, found in visits.items():
            mean = torch.stack(found).nanmean(0)  # [K]
            before = self.records.pop(prompt, None)
            if before is None:
                base, weight = torch.full_like(mean, torch.nan), unpaired
            else:
                base, old, weight = torch.tensor(before, dtype=torch.float64)
                met = ~mean.isnan()
                weight = torch.where(met, torch.where(base.isnan(), unpaired, 1.0), weight)
                mean = torch.where(met, mean, old)
            self.records[prompt] = [base.tolist(), mean.tolist(), weight.tolist()]
        for prompt in list(self.records)[: -self.memory]:
            del self.records[prompt]

    def _begin(self, early: Tensor, base: Tensor, rewards: RewardMatrix) -> None:
        """Measure where objectives start, and what a prompt that comes late is worth."""
        _, std, counts = group_moments(rewards.values, rewards.groups)  # [K, N]
        errors = torch.where(counts > 0, std.square() / counts, torch.nan).nanmean(1)
        start = base.nanmean(0)  # [K]
        between = (base - start).square().nanmean(0)
        several = (~base.isnan()).sum(0) > 1  # or nothing is known of how prompts differ
        # A pair always counts for more, and weights of nothing could not be divided by.
        unpaired = (2 * errors / between).nan_to_num(nan=0.5).clamp(1e-6, 0.5)
        unpaired = torch.where(several, unpaired, 1e-6)
        self.start = torch.where(early, start, self.start)
        self.unpaired = torch.where(early, unpaired, self.unpaired)
