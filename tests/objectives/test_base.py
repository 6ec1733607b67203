"""Combining objectives: means over what applies, and shares of the variance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moa_diffusion.objectives.base import combine
from moa_diffusion.objectives.base import variance_share as share_where
from moa_diffusion.objectives.normalize import DualStage, Raw
from moa_diffusion.types import RewardMatrix
from objective_stats import NAMES, rewards_at, stats


def variance_share(advantages: Tensor, weights: Tensor) -> Tensor:
    """Every objective applies to every sample."""
    return share_where(advantages, weights, torch.ones_like(advantages, dtype=torch.bool))


def everything(advantages: Tensor) -> Tensor:
    return torch.ones_like(advantages, dtype=torch.bool)


# ---------------------------------------------------------------------- combine


def test_combine_in_numbers():
    advantages = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    weights = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(
        combine(advantages, weights, everything(advantages)), torch.tensor([2.5, -2.5])
    )


def test_combine_is_a_mean_over_what_applies():
    advantages = torch.tensor([[1.0, 0.0, 0.0], [3.0, 3.0, 0.0]])
    applies = torch.tensor([[True, False, False], [True, True, False]])
    weights = torch.tensor([1.0, 3.0])
    assert combine(advantages, weights, applies).tolist() == [2.5, 3.0, 0.0]


def test_combine_takes_weights_per_sample(zoo):
    advantages, applies = stats(zoo).advantages, ~zoo.values.isnan()
    weights = torch.tensor([0.2, 0.8, 3.0]).double()
    per_sample = weights[:, None].expand(3, len(zoo.groups))
    torch.testing.assert_close(
        combine(advantages, per_sample, applies), combine(advantages, weights, applies)
    )
    one_each = torch.eye(3).double()[:, [0, 1, 2, 0]]
    torch.testing.assert_close(
        combine(advantages[:, :4], one_each, everything(one_each)),
        torch.stack([advantages[k, i] for i, k in enumerate([0, 1, 2, 0])]),
    )


def test_combine_does_not_see_the_size_of_the_weights(zoo):
    advantages, applies = stats(zoo).advantages, ~zoo.values.isnan()
    weights = torch.tensor([0.2, -0.8, 3.0]).double()
    small, large = (combine(advantages, weights * c, applies) for c in (1e-6, 1e6))
    torch.testing.assert_close(small, large)
    assert small.abs().max() <= advantages.abs().max() + 1e-12  # rounding of a weighted mean


def test_combine_with_a_zero_weight_beside_nan():
    """The only objective that applies has no weight: nothing is known, so nothing is learned."""
    advantages = torch.tensor([[0.0], [2.0]])
    applies = torch.tensor([[False], [True]])
    assert combine(advantages, torch.tensor([1.0, 0.0]), applies).tolist() == [0.0]


# ---------------------------------------------------------------------- who decides


def test_variance_shares_sum_to_one(zoo):
    for weights in (torch.tensor([0.2, 0.8, 3.0]), torch.rand(3, len(zoo.groups))):
        advantages = stats(zoo).advantages
        share = variance_share(advantages, weights.double())
        assert share.isfinite().all()
        assert float(share.sum()) == pytest.approx(float(advantages.any()))


def test_variance_share_against_the_covariance():
    advantages = stats(rewards_at(0)).advantages
    weights = torch.tensor([0.2, 0.8, 3.0]).double()
    covariance = torch.cov(advantages)
    expected = weights * (covariance @ weights) / (weights @ covariance @ weights)
    torch.testing.assert_close(variance_share(advantages, weights), expected)


def test_variance_hijacking_is_seen_and_cured():
    """Equal weights on raw rewards obey the objective with the largest unit alone."""
    rewards = rewards_at(0)
    scale = torch.tensor([[1.0], [100.0], [1.0]]).double()
    loud = RewardMatrix(
        names=NAMES, values=rewards.values * scale, groups=rewards.groups, prompts=rewards.prompts
    )
    weights = torch.ones(3).double()
    assert variance_share(Raw(NAMES).per_objective(loud), weights)[1] > 0.95
    cured = variance_share(DualStage(NAMES).per_objective(loud), weights)
    assert cured.max() < 0.6  # 0.56: a third, but for how 16 draws correlate


def test_variance_share_of_an_objective_that_the_others_oppose():
    up = torch.tensor([-1.0, 1.0])
    share = variance_share(torch.stack([up * 3, -up]), torch.ones(2))
    torch.testing.assert_close(share, torch.tensor([1.5, -0.5]))


def test_variance_share_is_that_of_the_combined_score_where_objectives_are_missing():
    """Weights are renormalised sample by sample, in the share as in the sum."""
    generator = torch.Generator().manual_seed(3)
    advantages = torch.randn(2, 400, generator=generator, dtype=torch.float64)
    applies = torch.rand(2, 400, generator=generator) < 0.6
    advantages, weights = advantages * applies, torch.tensor([1.0, 3.0]).double()
    shares = share_where(advantages, weights, applies)
    score = combine(advantages, weights, applies)
    alone = combine(advantages * torch.tensor([[1.0], [0.0]]), weights, applies)
    expected = ((alone - alone.mean()) * (score - score.mean())).sum() / (
        (score - score.mean()).square().sum()
    )
    torch.testing.assert_close(shares[0], expected)
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0).double())
