"""Normalizers: raw (normalise once), GDPO, dual-stage adaptive, per-prompt history.

A group is the set of siblings of one prompt draw; ``m_kg`` and ``s_kg`` are the mean and the
population standard deviation of objective k over the members of group g to which it applies.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moa_diffusion.objectives.base import Normalizer
from moa_diffusion.statistics.groups import group_centred, rms_group_std
from moa_diffusion.types import RewardMatrix

Std = Literal["group", "batch"]


class Raw(Normalizer):
    """Normalise once, after the weighted sum of raw rewards: what most codebases do.

    Stage 1 only centres, ``z_ki = r_ki - m_kg``, so the objective with the largest spread times
    weight decides; stage 2 is GRPO's group z-score (arXiv 2402.03300, section 4.1.2), which gives
    every group the same weight, whatever applies to it. With ``std='batch'`` it does not.

    Args:
        objectives: Names of the K objectives.
        std: The divisor: the spread of the ``group`` (GRPO) or of the whole ``batch``, that
            is the RMS of the groups' (Flow-GRPO's ``global_std`` has the spread between prompts in
            it).
        eps: Number that is added to the spread, in units of the weighted sum; positive.
    """

    def __init__(self, objectives: Sequence[str], *, std: Std = "group", eps: float = 1e-4) -> None:
        super().__init__(objectives)
        _check_std(std)
        _check_positive("eps", eps)
        self.std, self.eps = std, eps

    def per_objective(self, rewards: RewardMatrix) -> Tensor:
        """Return rewards less their group's mean, in their own units."""
        centred, _ = group_centred(rewards)
        return centred

    def combined(self, advantage: Tensor, rewards: RewardMatrix) -> Tensor:
        """Return the z-score of the sum, by the standard deviation of its group or of the batch."""
        if self.std == "batch":
            return whiten(advantage, rewards, self.eps)
        centred, std = group_centred(_combined(advantage, rewards))
        return centred[0] / (std[0] + self.eps)


class GDPO(Normalizer):
    """Group z-score per objective, then whitening of the weighted sum over the batch.

    Source: GDPO (arXiv 2601.05242). Stage 1: ``z_ki = (r_ki - m_kg) / (s_kg + eps)``; stage 2:
    ``A_i = (S_i - mean_B S) / (std_B S + eps)``. In the paper every objective applies to every
    sample. Where that is not so, ``S_i`` is the weighted mean of those that do, and the batch stays
    the whole batch, as published: prompts to which fewer objectives apply have the larger
    advantages (1.15 times with three of four, twice with one of four, if the objectives are
    independent). ``DualStage`` evens that out.

    Args:
        objectives: Names of the K objectives.
        std: What stage 1 divides by: the spread of the ``group``, or one for the whole ``batch``,
            the RMS of the groups'.
        eps: Number that is added to each spread, in the objective's own unit; positive.
    """

    def __init__(self, objectives: Sequence[str], *, std: Std = "group", eps: float = 1e-4) -> None:
        super().__init__(objectives)
        _check_std(std)
        _check_positive("eps", eps)
        self.std, self.eps = std, eps

    def per_objective(self, rewards: RewardMatrix) -> Tensor:
        """Return each reward's z-score, by the standard deviation of its group or of all groups."""
        centred, std = group_centred(rewards)
        if self.std == "batch":
            std = rms_group_std(rewards).nan_to_num(nan=0.0)[:, None]
        return centred / (std + self.eps)

    def combined(self, advantage: Tensor, rewards: RewardMatrix) -> Tensor:
        """Whiten the weighted mean over the batch."""
        return whiten(advantage, rewards, self.eps)


class DualStage(Normalizer):
    """Dual-stage adaptive normalization, reconstructed from the published description of APEX.

    APEX (arXiv 2601.06574) names the idea; its equations were not available, so these are a
    reconstruction. Stage 1, with an adaptive floor under the group's spread::

        z_ki = (r_ki - m_kg) / max(s_kg, c sbar_k),   sbar_k = EMA of the RMS group std

    keeps a group whose members differ only by noise from being blown up to unit variance, whatever
    the reward's unit; a group without any spread gets exactly 0. Stage 2 whitens the weighted mean
    over the batch::

        A_i = (S_i - mean_B S) / (std_B S + 1e-4)

    where B are the groups of the batch to which the same objectives apply (``whiten_alike``), so
    that a prompt counts the same however many objectives have something to say about it. The
    description does not say what happens where some do not apply.

    Args:
        objectives: Names of the K objectives.
        floor: Share ``c`` of the usual spread below which no spread is divided by, in [0, 1]; 0
            gives GDPO's stage 1 without its eps.
        decay: Decay of the moving average of spreads, in [0, 1).
    """

    spread: Tensor

    def __init__(
        self, objectives: Sequence[str], *, floor: float = 0.1, decay: float = 0.9
    ) -> None:
        super().__init__(objectives)
        if not 0 <= floor <= 1:
            raise ValueError(f"Parameter `floor` should be in [0, 1]. Found {floor}.")
        if not 0 <= decay < 1:
            raise ValueError(f"Parameter `decay` should be in [0, 1). Found {decay}.")
        self.floor, self.decay = floor, decay
        # NaN: not measured yet.
        self.register_buffer("spread", torch.full((len(self.objectives),), torch.nan).double())

    def per_objective(self, rewards: RewardMatrix) -> Tensor:
        """Return each reward's z-score, by at least a share of its usual deviation in a group."""
        self.spread = update_ema(self.spread, rms_group_std(rewards), self.decay)
        centred, std = group_centred(rewards)
        scale = torch.maximum(std, self.floor * self.spread.nan_to_num(nan=0.0)[:, None])
        return centred / torch.where(scale > 0, scale, 1.0)

    def combined(self, advantage: Tensor, rewards: RewardMatrix) -> Tensor:
        """Whiten the weighted mean over groups to which the same objectives apply."""
        return whiten_alike(advantage, rewards, 1e-4)


class PromptHistory(Normalizer):
    """Each prompt's own running mean and spread, per objective (DDPO, arXiv 2305.13301, app. B).

    Deviation: kept per objective and then averaged with the weights; DDPO has a single reward. The
    average is not normalised again, so prompts to which fewer objectives apply weigh more.

    Args:
        objectives: Names of the K objectives.
        size: Number of rewards that are remembered per prompt and objective, at least 1.
        min_count: Number of remembered rewards below which the batch's mean and spread are used,
            in [1, size].
        eps: Number that is added to each spread, in the objective's own unit; positive.
    """

    def __init__(
        self,
        objectives: Sequence[str],
        *,
        size: int = 16,
        min_count: int = 16,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(objectives)
        if not 1 <= min_count <= size:
            raise ValueError(
                f"Parameter `min_count` should be in [1, size = {size}]. Found {min_count}."
            )
        _check_positive("eps", eps)
        self.size, self.min_count, self.eps = size, min_count, eps
        self.history: dict[str, list[list[float]]] = {}

    def per_objective(self, rewards: RewardMatrix) -> Tensor:
        """Return z-scores by the mean and deviation of each prompt's last rewards."""
        advantages = torch.zeros_like(rewards.values)
        members: dict[str, list[int]] = {}
        for i, prompt in enumerate(rewards.prompts):
            members.setdefault(prompt, []).append(i)
        for k, row in enumerate(rewards.values):
            batch = row[~torch.isnan(row)]
            for prompt, index in members.items():
                values = row[index]
                new = values[~torch.isnan(values)].tolist()
                past = self.history.setdefault(prompt, [[] for _ in self.objectives])
                past[k] = (past[k] + new)[-self.size :]
                known = row.new_tensor(past[k]) if len(past[k]) >= self.min_count else batch
                if len(known):
                    scale = known.std(correction=0) + self.eps
                    advantages[k, index] = ((values - known.mean()) / scale).nan_to_num(nan=0.0)
        return advantages

    def combined(self, advantage: Tensor, rewards: RewardMatrix) -> Tensor:
        """Return the weighted mean as it is: DDPO normalizes once."""
        return advantage

    def get_extra_state(self) -> dict[str, Any]:
        """Return the last rewards of each prompt, by objective."""
        return self.history

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over the last rewards of each prompt."""
        self.history = state


def whiten(advantage: Tensor, rewards: RewardMatrix, eps: float) -> Tensor:
    """Return ``(S - mean S) / (std S + eps)`` of the samples to which anything applies: ``[N]``.

    The mean taken off is the group's. Over groups centred in stage 1 it is the batch's as well;
    only where an objective applies to a part of a group does it differ, and there the batch's
    would give a group without any spread an advantage.

    Args:
        advantage: Weighted means ``[N]`` of the advantages after stage 1.
        rewards: Decides which samples count, and their groups.
        eps: Added to the standard deviation.
    """
    centred, _ = group_centred(_combined(advantage, rewards))
    return centred[0] / (batch_spread(advantage, rewards) + eps)


def whiten_alike(advantage: Tensor, rewards: RewardMatrix, eps: float) -> Tensor:
    """Do as ``whiten``, over groups to which the same objectives apply: ``[N]``.

    A mean of K objectives that have little to do with each other varies as ``1 / sqrt(K)``. Divided
    by one spread for all, prompts to which one objective applies would weigh twice as much as
    prompts to which four apply; so each group is treated as in a batch of its like.

    Args:
        advantage: Weighted means ``[N]`` of the advantages after stage 1.
        rewards: Decides to which samples the same objectives apply, and their groups.
        eps: Added to each standard deviation.
    """
    advantages = torch.zeros_like(advantage)
    patterns = _patterns(rewards)
    for pattern in patterns.unique():
        alike = patterns == pattern
        part = RewardMatrix(
            names=rewards.names,
            values=rewards.values[:, alike],
            groups=rewards.groups[alike],
            prompts=tuple(itertools.compress(rewards.prompts, alike.tolist())),
        )
        advantages[alike] = whiten(advantage[alike], part, eps)
    return advantages


def batch_spread(advantage: Tensor, rewards: RewardMatrix) -> Tensor:
    """Return the RMS distance to the group's mean of the samples to which anything applies."""
    centred, _ = group_centred(_combined(advantage, rewards))
    counted = (~torch.isnan(rewards.values)).any(0)
    return (centred[0].square().sum() / counted.sum().clamp(min=1)).sqrt()


def _patterns(rewards: RewardMatrix) -> Tensor:
    """Return the number of each sample's set of objectives: ``[N]``.

    The set holds the objectives that apply to some sample of its group.

    Of the group, since a head that cannot judge one of its samples makes that no prompt of another
    kind.
    """
    _, index = torch.unique(rewards.groups, return_inverse=True)  # [N] in 0..P-1
    applies = (~torch.isnan(rewards.values)).double()
    count = applies.new_zeros(len(applies), int(index.max()) + 1 if len(index) else 0)
    present = count.index_add_(1, index, applies) > 0  # [K, P]
    if not present.numel():
        return index
    _, pattern = torch.unique(present, dim=1, return_inverse=True)  # [P]
    return pattern[index]


def _combined(advantage: Tensor, rewards: RewardMatrix) -> RewardMatrix:
    """Return the weighted mean as a matrix of one objective, NaN where nothing applies."""
    counted = (~torch.isnan(rewards.values)).any(0)
    return RewardMatrix(
        names=("combined",),
        values=torch.where(counted, advantage, torch.nan)[None],
        groups=rewards.groups,
        prompts=rewards.prompts,
    )


def update_ema(average: Tensor, value: Tensor, decay: float) -> Tensor:
    """Return the next average; where either is NaN (nothing known, nothing new), the other one.

    Args:
        average: The average so far, of any shape.
        value: What is new, of the same shape.
        decay: The share of the average that stays.
    """
    blended = decay * average + (1 - decay) * value
    return torch.where(average.isnan(), value, torch.where(value.isnan(), average, blended))


def _check_std(std: str) -> None:
    if std not in get_args(Std):
        raise ValueError(f"Parameter `std` should be 'group' or 'batch'. Found {std!r}.")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"Parameter `{name}` should be positive. Found {value}.")
