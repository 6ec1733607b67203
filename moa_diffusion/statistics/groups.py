"""Statistics of rewards within groups of siblings, for normalizers, monitors and reports."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moa_diffusion.types import RewardMatrix

RESIDUE = 1e-12  # relative to the largest |value|: a smaller spread is rounding, not signal


def group_moments(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, standard deviation and count of each sample's own group, ignoring NaN.

    Args:
        values: Rewards ``[K, N]`` float64, NaN where an objective does not apply.
        groups: Group ids ``[N]`` int64, any ids.

    Returns:
        Three ``[K, N]`` tensors; a group without a value has mean 0, std 0 and count 0. A spread
        that is only rounding is returned as exactly 0.
    """
    _, index = torch.unique(groups, return_inverse=True)  # [N] in 0..P-1
    applies = ~torch.isnan(values)
    filled = torch.where(applies, values, 0.0)
    size = (values.shape[0], int(index.max()) + 1 if len(index) else 0)

    def total(x: Tensor) -> Tensor:  # [K, N] summed over each group: [K, P]
        return x.new_zeros(size).index_add_(1, index, x)

    count = total(applies.to(values.dtype))  # [K, P]
    mean = total(filled) / count.clamp(min=1)
    centred = torch.where(applies, values - mean[:, index], 0.0)
    std = (total(centred.square()) / count.clamp(min=1)).sqrt()
    largest = values.new_zeros(size).scatter_reduce_(
        1, index.expand_as(values), filled.abs(), "amax"
    )
    std = torch.where(std <= RESIDUE * largest, 0.0, std)
    return mean[:, index], std[:, index], count[:, index]


def rms_group_std(rewards: RewardMatrix) -> Tensor:
    """Return the root mean square over the samples of their group's std: ``[K]``.

    It is NaN for an objective that applies to no sample.

    The population's std, which is what a group z-score divides by. In groups of n it is
    ``sqrt((n - 1) / n)`` of the true spread; ``spread_within`` is the estimate to report.
    """
    _, std, _ = group_moments(rewards.values, rewards.groups)
    applies = ~torch.isnan(rewards.values)
    return ((std.square() * applies).sum(1) / applies.sum(1)).sqrt()


def spread_within(values: Tensor, groups: Tensor) -> Tensor:
    """Return the spread within a group, whatever the size of the groups: ``[K]``.

    The pooled estimate with an unbiased square, ``sqrt(sum_g n_g s_g^2 / sum_g (n_g - 1))``. It is
    the unit of every gain that is reported: with the population's std a gain measured on two
    samples per prompt would be 41 % larger than on many.

    Args:
        values: Rewards ``[K, N]`` float64, NaN where an objective does not apply.
        groups: Group ids ``[N]`` int64, any ids.

    Returns:
        NaN for an objective that applies to no two samples of any group.
    """
    _, std, count = group_moments(values, groups)
    applies = ~torch.isnan(values)
    # A sum over samples of x is a sum over groups of n x.
    freedom = torch.where(applies, 1 - 1 / count.clamp(min=1), 0.0).sum(1)  # [K]
    squares = (std.square() * applies).sum(1)
    return torch.where(freedom > 0, squares / freedom, torch.nan).sqrt()


def same_prompt(prompts: Sequence[str]) -> Tensor:
    """Return the samples' prompts as numbers, equal for equal texts: ``[N]`` int64.

    What a standard error takes as independent: a prompt that was drawn twice, because a file holds
    it twice, tells no more about other prompts than a prompt that was drawn once.
    """
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return torch.tensor([number[prompt] for prompt in prompts], dtype=torch.int64)


def zero_variance_fraction(rewards: RewardMatrix) -> Tensor:
    """Return each objective's share of samples whose group has no spread: ``[K]``.

    It counts only samples to which the objective applies.
    """
    _, std, _ = group_moments(rewards.values, rewards.groups)
    applies = ~torch.isnan(rewards.values)
    return ((std == 0) & applies).sum(1) / applies.sum(1)


def group_centred(rewards: RewardMatrix) -> tuple[Tensor, Tensor]:
    """Return ``r_ki - m_kg`` and ``s_kg``, both ``[K, N]``.

    The difference is exactly 0 for NaN and in a group without spread, where it could only be
    rounding, which a small divisor would blow up.
    """
    mean, std, _ = group_moments(rewards.values, rewards.groups)
    centred = torch.where(std > 0, rewards.values - mean, 0.0)
    return centred.nan_to_num(nan=0.0), std


def mean_and_error(values: Tensor, prompts: Tensor) -> tuple[float, float]:
    """Return the mean of the samples, and its standard error with prompts as the independent units.

    Args:
        values: Values ``[M]``, NaN where a reward does not apply.
        prompts: Prompt of each value, ``[M]`` int64.

    Returns:
        Both NaN where nothing applies; the error also with fewer than two prompts.
    """
    known = ~values.isnan()
    values, prompts = values[known].double(), prompts[known]
    _, index = torch.unique(prompts, return_inverse=True)
    count = torch.bincount(index).double()  # [P]
    mean = values.mean()
    # Prompts may differ in size: the mean is a ratio of two sums over prompts, linearised here.
    deviations = torch.zeros_like(count).index_add_(0, index, values - mean)  # [P]
    units = len(count)
    if units < 2:
        return float(mean), math.nan
    error = (deviations.square().sum() * units / (units - 1)).sqrt() / len(values)
    return float(mean), float(error)
