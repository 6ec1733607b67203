"""The clipped surrogate against a loop over decisions, and the direction of every clip."""

from __future__ import annotations

import math

import pytest
import torch

from moa_diffusion.config.schema import LossConfig
from moa_diffusion.policies.base import Terms
from moa_diffusion.training.loss import (
    Clip,
    ReferencePull,
    clipped_surrogate,
    surrogate_coefficients,
)

EPS = torch.finfo(torch.float32).eps


def draw(n: int = 7, t: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    old = torch.randn(n, t, generator=source)
    new = old + 0.3 * torch.randn(n, t, generator=source)
    return new, old, torch.randn(n, generator=source)


def test_against_a_loop():
    new, old, advantages = draw()
    cut = Clip(0.2).clipped(new - old, advantages)
    losses = clipped_surrogate(new, old, advantages, cut)
    assert losses.shape == cut.shape == new.shape
    for i, j in torch.cartesian_prod(torch.arange(7), torch.arange(5)).tolist():
        ratio, advantage = math.exp(new[i, j] - old[i, j]), float(advantages[i])
        inside = min(max(ratio, 0.8), 1.2)
        # Log-ratios of about 1 and the exponential: 1e-7 of it, as below.
        assert float(losses[i, j]) == pytest.approx(-advantage * ratio, rel=1e-5)
        # Cut off: the clipped branch is the one taken, and it is constant.
        assert bool(cut[i, j]) == (inside != ratio and -advantage * inside > -advantage * ratio)
    assert 0 < cut.float().mean() < 1


def test_on_policy_the_gradient_is_that_of_the_policy_gradient():
    _, old, advantages = draw()
    new = old.clone().requires_grad_()
    cut = Clip(1e-4).clipped(new - old, advantages)
    losses = clipped_surrogate(new, old, advantages, cut)
    # Times a ratio of exactly 1.
    torch.testing.assert_close(losses.detach(), -advantages[:, None].expand_as(old))
    losses.sum().backward()
    torch.testing.assert_close(new.grad, -advantages[:, None].expand_as(old))
    assert not cut.any()


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "slope"),
    [
        (1.0, 0.5, 0.0),  # already likelier, and good: no further
        (1.0, -0.5, -math.exp(-0.5)),  # good, but less likely than it was: pulled back
        (-1.0, -0.5, 0.0),  # already less likely, and bad: no further
        (-1.0, 0.5, math.exp(0.5)),  # bad, but likelier than it was: pushed down
        (1.0, 0.1, -math.exp(0.1)),
        (-1.0, -0.1, math.exp(-0.1)),
        (0.0, 0.5, 0.0),
    ],
)
def test_direction_of_the_clip(advantage, log_ratio, slope):
    old = torch.tensor([[-2.0]])
    new = (old + log_ratio).requires_grad_()
    advantages = torch.tensor([advantage])
    cut = Clip(0.2).clipped(new - old, advantages)
    clipped_surrogate(new, old, advantages, cut).sum().backward()
    # The sum -2 + log_ratio, the difference, its exponential and a product round once each.
    assert float(new.grad) == pytest.approx(slope, abs=8 * EPS)
    assert bool(cut) == (slope == 0 and advantage != 0)


def test_advantages_of_another_type_do_not_widen_the_loss():
    new, old, advantages = draw()
    cut = torch.zeros_like(new, dtype=torch.bool)
    assert clipped_surrogate(new, old, advantages.double(), cut).dtype == torch.float32


# ---------------------------------------------------------------------- other clips


def test_a_divergence_cuts_off_what_has_gone_far_enough_the_way_it_should():
    log_ratio = torch.tensor([[1e-6, -1e-6, 1e-6]]).repeat(3, 1)
    far = torch.tensor([[2.0, 2.0, 0.5]]).repeat(3, 1)
    advantages = torch.tensor([1.0, -1.0, 0.0])
    cut = Clip(1.0, "divergence").clipped(log_ratio, advantages, far)
    assert cut.tolist() == [
        [True, False, False],  # good and likelier; good but less likely; not far
        [False, True, False],  # bad but likelier; bad and less likely; not far
        [False, False, False],  # neither good nor bad
    ]
    assert Clip(2.0, "divergence").clipped(log_ratio, advantages, far)[0, 0]  # at the bound


@pytest.mark.parametrize("kind", ["normalized", "divergence"])
def test_the_on_policy_check_keeps_the_unit_of_log_ratios(kind):
    assert LossConfig(clip=kind, clip_range=1e-2).tolerance == LossConfig().tolerance == 5e-5
    assert LossConfig(clip_range=1e-2).tolerance == 5e-3
    assert LossConfig(clip=kind, ratio_tolerance=0.1).tolerance == 0.1


def test_a_normalized_clip_looks_at_the_ratio_that_it_is_given():
    new, old, advantages = draw()
    moved = new - old
    tiny = 1e-3 * moved  # as of an early step
    assert not Clip(0.2).clipped(tiny, advantages).any()
    found = Clip(0.2, "normalized").clipped(tiny, advantages, moved)
    assert torch.equal(found, Clip(0.2).clipped(moved, advantages))
    assert found.any()


@pytest.mark.parametrize("kind", ["normalized", "divergence"])
def test_a_clip_that_is_not_given_what_it_measures_says_so(kind):
    with pytest.raises(ValueError, match=f"should return `moved` where `loss.clip` is {kind}"):
        Clip(0.2, kind).clipped(torch.zeros(1, 1), torch.ones(1))


@pytest.mark.parametrize("kind", ["normalized", "divergence"])
def test_every_objective_has_a_mask_of_its_own(kind):
    new, old, _ = draw()
    source = torch.Generator().manual_seed(1)
    advantages, moved = torch.randn(3, 7, generator=source), torch.randn(7, 5, generator=source)
    clip = Clip(0.2, kind)
    found = surrogate_coefficients(new, old, advantages, clip, moved)
    for row, advantage in zip(found, advantages, strict=True):
        again = new.clone().requires_grad_()
        cut = clip.clipped(new - old, advantage, moved)
        clipped_surrogate(again, old, advantage, cut).sum().backward()
        # One exponential and one product each: equal to the bit.
        assert torch.equal(row, again.grad)
        assert 0 < (row == 0).sum() < row.numel()


# ---------------------------------------------------------------------- the reference


def pull(**options) -> ReferencePull:
    return ReferencePull(LossConfig(**options))


def test_only_longer_velocities_are_penalised():
    norm = torch.tensor([[0.5, 1.0, 1.1, 2.0]], requires_grad=True)
    terms = Terms(torch.zeros(1, 4), norm=norm)
    assert pull().penalty(terms) is None
    found = pull(norm_weight=3.0).penalty(terms)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0, 0.03, 3.0]]))
    found.sum().backward()
    torch.testing.assert_close(norm.grad, torch.tensor([[0.0, 0.0, 0.6, 6.0]]))


def test_the_penalty_lets_velocities_turn():
    """At most the squared distance over the squared length, and nothing where the length stays."""
    source = torch.Generator().manual_seed(0)
    v, v_ref = torch.randn(2, 500, 12, generator=source)
    lengths, reference = v.norm(dim=1), v_ref.norm(dim=1)
    penalty = pull(norm_weight=1.0).penalty(
        Terms(lengths[:, None], norm=(lengths / reference)[:, None])
    )
    distance = (v - v_ref).square().sum(1) / reference.square()
    assert (penalty[:, 0] <= distance * (1 + 10 * EPS)).all()
    assert (penalty > 0).any()


def test_pulls_to_copies_are_added_to_the_penalty():
    terms = Terms(torch.zeros(1, 1), pull=torch.tensor([[0.25]]), norm=torch.tensor([[1.5]]))
    assert float(pull().penalty(terms)) == 0.25
    assert float(pull(norm_weight=2.0).penalty(terms)) == 0.75
    with pytest.raises(ValueError, match="should return `norm`"):
        pull(norm_weight=2.0).penalty(Terms(torch.zeros(1, 1)))


def test_the_weight_of_the_kl_follows_its_target():
    """By the share that the KL is off, at most a fifth; what is no number changes nothing."""
    held = pull(kl_weight=0.5, kl_target=0.1)
    for kl, expected in ((0.11, 0.55), (0.5, 0.66), (0.1, 0.66), (math.nan, 0.66), (0.0, 0.528)):
        held.follow(kl)
        assert held.kl_weight == pytest.approx(expected)
    again = pull(kl_weight=0.5, kl_target=0.1)
    again.load_state_dict(held.state_dict())
    assert again.kl_weight == held.kl_weight
    anew = pull(kl_weight=0.7, kl_target=0.1)  # with another weight than the saved run's
    anew.load_state_dict(held.state_dict())
    assert anew.kl_weight == 0.7
    for kl, bound in ((0.0, 0.005), (9.0, 50.0)):
        for _ in range(60):
            again.follow(kl)
        assert again.kl_weight == bound
    fixed = pull(kl_weight=0.5)
    fixed.follow(9.0)
    fixed.load_state_dict(held.state_dict())
    assert fixed.kl_weight == 0.5
