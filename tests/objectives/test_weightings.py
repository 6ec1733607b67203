"""Weightings: the suite that each must pass; then how weights are applied and what they cost."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from moa_diffusion.objectives.apex import Apex
from moa_diffusion.objectives.base import Weighting, combine
from moa_diffusion.objectives.base import variance_share as share_where
from moa_diffusion.objectives.chebyshev import Chebyshev
from moa_diffusion.objectives.gradient import Gradient
from moa_diffusion.objectives.mopo import Mopo
from moa_diffusion.objectives.normalize import DualStage, Raw
from moa_diffusion.objectives.pama import Pama, PamaVector
from moa_diffusion.objectives.static import Static
from moa_diffusion.types import ObjectiveStats, RewardMatrix

# Numbers are float64. Where a test gives no tolerance it takes the defaults of pytest (1e-6) and
# torch (1e-7): what is expected is often written in float32, which rounds by 6e-8.
NAMES = ("a", "b", "c")
CHOSEN = {"a": 0.2, "b": 0.8, "c": 3.0}

# A new weighting enters the common suite here, by one line.
WEIGHTINGS: dict[str, Callable[[Sequence[str]], Weighting]] = {
    "static_equal": Static,
    "static": lambda names: Static(names, weights=[CHOSEN[name] for name in names]),
    "chebyshev": Chebyshev,
    "mopo": lambda names: Mopo(names, primary="a", bounds={"b": 0.5, "c": 0.52}),
    "mopo_barrier": lambda names: Mopo(names, primary="a", variant="barrier"),
    "pama": Pama,
    "pama_vector": PamaVector,
    **{
        f"gradient_{name}": partial(Gradient, aggregator=name, options=options)
        for name, options in {
            **dict.fromkeys(("upgrad", "mgda", "pcgrad", "alignedmtl", "imtlg", "dualproj")),
            **dict.fromkeys(("config", "random", "mean", "sum")),
            "cagrad": {"c": 0.4},
            "fairgrad": {"alpha": 1.0},
        }.items()
    },
    "apex": lambda names: Apex(names, warmup=1),
    "apex_gradients": lambda names: Apex(names, warmup=1, conflict="gradients"),
    "apex_need": lambda names: Apex(names, warmup=1, potential=0, conflict="off"),
}


@pytest.fixture(params=WEIGHTINGS)
def make(request: pytest.FixtureRequest) -> Callable[[Sequence[str]], Weighting]:
    return WEIGHTINGS[request.param]


def stats(rewards: RewardMatrix, step: int = 0) -> ObjectiveStats:
    """What the trainer would show; the Gramian is any positive semi-definite matrix."""
    advantages = DualStage(rewards.names).per_objective(rewards)
    return ObjectiveStats(
        step=step,
        rewards=rewards,
        advantages=advantages,
        gramian=advantages @ advantages.T,
        win_rates=torch.where(rewards.values.isnan(), torch.nan, advantages.sigmoid()),
    )


def variance_share(advantages: Tensor, weights: Tensor) -> Tensor:
    """Every objective applies to every sample."""
    return share_where(advantages, weights, torch.ones_like(advantages, dtype=torch.bool))


def rewards_at(step: int) -> RewardMatrix:
    generator = torch.Generator().manual_seed(step)
    return RewardMatrix(
        names=NAMES,
        values=torch.randn(3, 16, generator=generator, dtype=torch.float64),
        groups=torch.arange(16) // 4,
        prompts=("p",) * 16,
    )


# ---------------------------------------------------------------------- the common suite


def test_weights_are_finite_and_not_all_zero(make, matrices, naming):
    for name, zoo in matrices.items():
        with naming(name):
            weighting = make(zoo.names)
            for step in range(3):
                shown = stats(zoo, step)
                before = shown.advantages.clone()
                weights = weighting(shown)
                assert weights.shape in {(3,), (3, len(zoo.groups))}
                assert weights.dtype == torch.float64
                assert not weights.requires_grad
                assert weights.isfinite().all()
                assert weights.any()
                assert torch.equal(shown.advantages, before)


def test_order_of_objectives_does_not_matter(make, matrices, naming):
    for name, zoo in matrices.items():
        with naming(name):
            order = [2, 0, 1]
            other = RewardMatrix(
                names=tuple(zoo.names[k] for k in order),
                values=zoo.values[order],
                groups=zoo.groups,
                prompts=zoo.prompts,
            )
            torch.testing.assert_close(
                make(other.names)(stats(other)), make(NAMES)(stats(zoo))[order]
            )


def test_order_of_samples_does_not_matter(make, matrices, naming):
    for name, zoo in matrices.items():
        with naming(name):
            order = torch.randperm(len(zoo.groups), generator=torch.Generator().manual_seed(3))
            other = RewardMatrix(
                names=NAMES,
                values=zoo.values[:, order],
                groups=zoo.groups[order],
                prompts=tuple(zoo.prompts[i] for i in order.tolist()),
            )
            weights, moved = make(NAMES)(stats(zoo)), make(NAMES)(stats(other))
            torch.testing.assert_close(moved, weights if weights.ndim == 1 else weights[:, order])


def test_adding_a_constant_to_an_objective_changes_nothing(make, matrices, naming):
    for name, zoo in matrices.items():
        with naming(name):
            shift = torch.tensor([[3.0], [-2.0], [0.5]]) * zoo.values.nan_to_num(0).abs().amax(
                1, keepdim=True
            )
            other = RewardMatrix(
                names=NAMES, values=zoo.values + shift, groups=zoo.groups, prompts=zoo.prompts
            )
            # Rewards that are moved by three times their size round by some 1e-15 of it, and
            # spreads may be a hundredth of the size; where there is none, an eps of 1e-4 keeps it.
            torch.testing.assert_close(
                make(NAMES)(stats(other)), make(NAMES)(stats(zoo)), rtol=1e-6, atol=1e-6
            )


def test_saved_state_continues_identically(make):
    straight, before = make(NAMES), make(NAMES)
    for step in range(3):
        straight(stats(rewards_at(step), step))
        before(stats(rewards_at(step), step))
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    resumed = make(NAMES)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        shown = stats(rewards_at(step), step)
        assert torch.equal(resumed(shown), straight(shown))


# ---------------------------------------------------------------------- static


def test_static_gives_the_weights_of_its_configuration():
    assert Static(NAMES)(stats(rewards_at(0))).tolist() == [1, 1, 1]
    assert Static(NAMES, weights=[2, 0, -1])(stats(rewards_at(0))).tolist() == [2, 0, -1]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], "one entry per objective .* Found 2 entries"),
        ([0.0, 0.0, 0.0], "not all zero"),
        ([1.0, math.nan, 1.0], "finite"),
        ([1.0, math.inf, 1.0], "finite"),
    ],
)
def test_static_refuses_weights_that_cannot_work(weights, message):
    with pytest.raises(ValueError, match=message):
        Static(NAMES, weights=weights)


# ---------------------------------------------------------------------- combine


def everything(advantages: Tensor) -> Tensor:
    return torch.ones_like(advantages, dtype=torch.bool)


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
