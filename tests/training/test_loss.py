"""The clipped surrogate against a loop over decisions, and the direction of every clip."""

from __future__ import annotations

import math

import pytest
import torch

from moa_diffusion.training.loss import clip_fraction, clipped_surrogate

EPS = torch.finfo(torch.float32).eps


def draw(n: int = 7, t: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    old = torch.randn(n, t, generator=source)
    new = old + 0.3 * torch.randn(n, t, generator=source)
    return new, old, torch.randn(n, generator=source)


def test_against_a_loop():
    new, old, advantages = draw()
    losses = clipped_surrogate(new, old, advantages, 0.2)
    cut = clip_fraction(new, old, advantages, 0.2)
    assert losses.shape == cut.shape == new.shape
    for i, j in torch.cartesian_prod(torch.arange(7), torch.arange(5)).tolist():
        ratio, advantage = math.exp(new[i, j] - old[i, j]), float(advantages[i])
        inside = min(max(ratio, 0.8), 1.2)
        expected = max(-advantage * ratio, -advantage * inside)
        # Log-ratios of about 1 and the exponential: 1e-7 of it, as below.
        assert float(losses[i, j]) == pytest.approx(expected, rel=1e-5)
        # Cut off: the clipped branch is the one taken, and it is constant.
        assert bool(cut[i, j]) == (inside != ratio and -advantage * inside > -advantage * ratio)
    assert 0 < cut.float().mean() < 1


def test_on_policy_the_gradient_is_that_of_the_policy_gradient():
    _, old, advantages = draw()
    new = old.clone().requires_grad_()
    losses = clipped_surrogate(new, old, advantages, 1e-4)
    # Times a ratio of exactly 1.
    torch.testing.assert_close(losses.detach(), -advantages[:, None].expand_as(old))
    losses.sum().backward()
    torch.testing.assert_close(new.grad, -advantages[:, None].expand_as(old))
    assert not clip_fraction(new.detach(), old, advantages, 1e-4).any()


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
    clipped_surrogate(new, old, advantages, 0.2).sum().backward()
    # The sum -2 + log_ratio, the difference, its exponential and a product round once each.
    assert float(new.grad) == pytest.approx(slope, abs=8 * EPS)
    cut = bool(clip_fraction(new.detach(), old, advantages, 0.2))
    assert cut == (slope == 0 and advantage != 0)


def test_advantages_of_another_type_do_not_widen_the_loss():
    new, old, advantages = draw()
    assert clipped_surrogate(new, old, advantages.double(), 0.2).dtype == torch.float32
