"""MOPO's closed form: against a convex solver, against sums by hand, and at its limits."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from moa_diffusion.objectives.mopo_offline import (
    barrier,
    constraint_levels,
    dual_step,
    pessimistic,
    tilt,
)

INFINITY = math.inf


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor, float, Tensor]:
    """``pbar [P, Y]``, ``qbar [K, P, Y]``, ``log_ref [P, Y]``, ``tau`` and bounds that some meet.

    The secondary objectives oppose the primary one, so that bounds bind; every fourth problem
    has one that does not.
    """
    p, y, k = 1 + seed % 3, 3 + seed % 4, 1 + seed % 2
    noise = random((2 + k, p, y), seed)
    pbar, tau = noise[0], (0.08, 0.2, 0.5)[seed % 3]
    qbar = 0.5 * (1 - pbar) + 0.5 * noise[1 : 1 + k]
    log_ref = (2 * noise[1 + k]).log_softmax(1)
    # What a policy reaches that cares for the secondary objectives alone is within reach.
    rho = tilt(qbar.mean(0), qbar, torch.zeros(k).double(), tau, log_ref)
    bounds = constraint_levels(rho, qbar, log_ref) - 0.02
    if seed % 4 == 0:
        bounds[0] = qbar[0].amin(1).mean() - 0.01
    return pbar, qbar, log_ref, tau, bounds


def by_dual(
    pbar: Tensor, qbar: Tensor, log_ref: Tensor, tau: float, bounds: Tensor
) -> tuple[Tensor, Tensor]:
    """The tilted policy ``[P, Y]`` and its multipliers ``[K]`` after dual ascent."""
    lambdas = torch.zeros(len(qbar)).double()
    for _ in range(20000):
        rho = tilt(pbar, qbar, lambdas, tau, log_ref)
        levels = constraint_levels(rho, qbar, log_ref)
        after = dual_step(lambdas, levels, bounds, 4 * tau)
        if (after - lambdas).abs().max() < 1e-9:
            break
        lambdas = after
    return rho * log_ref.exp(), lambdas


def by_solver(pbar: Tensor, qbar: Tensor, log_ref: Tensor, tau: float, bounds: Tensor) -> Tensor:
    """``max_pi E pbar - tau KL(pi || ref)`` subject to ``E qbar >= b``, by SLSQP: ``[P, Y]``."""
    optimize = pytest.importorskip("scipy.optimize")
    p, q, ref = pbar.numpy(), qbar.numpy(), log_ref.numpy()
    prompts, responses = p.shape

    def loss(x):
        pi = x.reshape(p.shape)
        return -(pi * p - tau * pi * (np.log(pi) - ref)).sum() / prompts

    def slope(x):
        pi = x.reshape(p.shape)
        return -(p - tau * (np.log(pi) - ref + 1)).flatten() / prompts

    rows = np.kron(np.eye(prompts), np.ones(responses))  # [P, P Y]
    levels = q.reshape(len(q), -1) / prompts  # [K, P Y]
    found = optimize.minimize(
        loss,
        np.exp(ref).flatten(),
        jac=slope,
        method="SLSQP",
        bounds=[(1e-12, 1)] * p.size,
        constraints=[
            {"type": "eq", "fun": lambda x: rows @ x - 1, "jac": lambda x: rows},
            {"type": "ineq", "fun": lambda x: levels @ x - bounds.numpy(), "jac": lambda x: levels},
        ],
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert found.success, found.message
    return torch.from_numpy(found.x.reshape(p.shape))


@pytest.mark.parametrize("seed", range(48))
def test_closed_form_and_dual_reach_the_constrained_optimum(seed):
    pbar, qbar, log_ref, tau, bounds = problem(seed)
    pi, lambdas = by_dual(pbar, qbar, log_ref, tau, bounds)
    torch.testing.assert_close(pi, by_solver(pbar, qbar, log_ref, tau, bounds), atol=1e-4, rtol=0)
    levels = (pi * qbar).sum(2).mean(1)
    assert (levels >= bounds - 1e-6).all()
    assert (lambdas * (levels - bounds)).abs().max() < 1e-6  # complementary slackness
    if seed % 4 == 0:
        assert lambdas[0] == 0


def test_most_bounds_of_these_problems_bind():
    binding = [bool((by_dual(*problem(seed)[:5])[1] > 0).any()) for seed in range(1, 48, 4)]
    assert sum(binding) >= 10


def test_tilt_is_a_density_for_every_prompt():
    pbar, qbar, log_ref, tau, _ = problem(5)
    rho = tilt(pbar, qbar, torch.full((len(qbar),), 3.0).double(), tau, log_ref)
    torch.testing.assert_close((log_ref.exp() * rho).sum(1), torch.ones(len(pbar)).double())


def test_tilt_in_numbers():
    pbar = torch.tensor([[0.0, 1.0]]).double()
    qbar = torch.tensor([[[1.0, 0.0]]]).double()
    log_ref = torch.full((1, 2), -math.log(2)).double()
    even = tilt(pbar, qbar, torch.ones(1).double(), 0.5, log_ref)
    torch.testing.assert_close(even, torch.ones(1, 2).double())
    free = tilt(pbar, qbar, torch.zeros(1).double(), 0.5, log_ref)
    e = math.exp(2)
    torch.testing.assert_close(free, torch.tensor([[2 / (1 + e), 2 * e / (1 + e)]]).double())
    capped = tilt(pbar, qbar, torch.zeros(1).double(), 0.5, log_ref, log_cap=0.1)
    assert float(capped[0, 1]) == pytest.approx(math.exp(0.1))


def test_padding_and_a_constant_change_nothing():
    """A constant in every win rate of a prompt is taken off by ``Z``."""
    pbar, qbar, log_ref, tau, _ = problem(7)
    lambdas = torch.full((len(qbar),), 0.7).double()
    rho = tilt(pbar, qbar, lambdas, tau, log_ref)
    torch.testing.assert_close(tilt(pbar + 0.3, qbar - 0.1, lambdas, tau, log_ref), rho)

    padded = [torch.cat([x, torch.full_like(x[..., :1], 0.9)], -1) for x in (pbar, qbar)]
    short = torch.cat([log_ref, torch.full_like(log_ref[:, :1], -INFINITY)], 1)
    longer = tilt(*padded, lambdas, tau, short)
    torch.testing.assert_close(longer[:, :-1], rho)
    torch.testing.assert_close(
        constraint_levels(longer, padded[1], short), constraint_levels(rho, qbar, log_ref)
    )
    torch.testing.assert_close(
        pessimistic(longer, padded[1], short, 0.1), pessimistic(rho, qbar, log_ref, 0.1)
    )


def test_dual_follows_the_violation():
    lambdas, bounds = torch.tensor([1.0, 1.0, 0.01, 9.99]), torch.tensor([0.5] * 4)
    levels = torch.tensor([0.4, 0.6, 0.9, 0.1])
    after = dual_step(lambdas, levels, bounds, 0.1, 10.0)
    torch.testing.assert_close(after, torch.tensor([1.01, 0.99, 0.0, 10.0]))


def test_a_slack_bound_loses_its_multiplier():
    pbar, qbar, log_ref, tau, _ = problem(3)
    lambdas, bounds = torch.full((len(qbar),), 5.0).double(), torch.zeros(len(qbar)).double()
    for _ in range(200):
        levels = constraint_levels(tilt(pbar, qbar, lambdas, tau, log_ref), qbar, log_ref)
        after = dual_step(lambdas, levels, bounds, 0.5)
        assert (after <= lambdas).all()
        lambdas = after
    assert (lambdas == 0).all()


def test_barrier_in_numbers_and_at_its_cap():
    levels, bounds = torch.tensor([0.6, 0.501, 0.5, 0.3]), torch.tensor([0.5] * 4)
    torch.testing.assert_close(barrier(levels, bounds, 0.01, 5.0), torch.tensor([0.1, 5, 5, 5]))


@pytest.mark.parametrize("eps", [1e-4, 0.01, 0.15, 1.0])
def test_pessimistic_is_the_largest_value_of_its_dual(eps):
    """The maximum over ``chi`` on a fine grid, straight from the formula."""
    pbar, qbar, log_ref, tau, _ = problem(5)
    rho = tilt(pbar, qbar, torch.ones(len(qbar)).double(), tau, log_ref)
    found = pessimistic(rho, qbar, log_ref, eps)
    log_p = (log_ref - math.log(len(log_ref))).flatten()
    chi = torch.logspace(-4, 4, 20001).double()[:, None]
    for k, level in enumerate(found):
        f = (rho * qbar[k]).flatten()
        dual = -chi[:, 0] * (log_p - f / chi).logsumexp(1) - chi[:, 0] * eps
        assert float(level) == pytest.approx(float(dual.max()), abs=1e-6)


def test_pessimism_grows_from_the_mean_to_the_smallest_value():
    pbar, qbar, log_ref, tau, _ = problem(5)
    rho = tilt(pbar, qbar, torch.ones(len(qbar)).double(), tau, log_ref)
    mean = constraint_levels(rho, qbar, log_ref)
    assert torch.equal(pessimistic(rho, qbar, log_ref, 0.0), mean)
    levels = [pessimistic(rho, qbar, log_ref, eps) for eps in (1e-9, 1e-3, 0.1, 1.0, 100.0)]
    torch.testing.assert_close(levels[0], mean, atol=1e-4, rtol=0)
    assert all((low < high).all() for high, low in pairwise(levels))
    torch.testing.assert_close(levels[-1], (rho * qbar).flatten(1).amin(1), atol=1e-4, rtol=0)
    constant = torch.ones_like(qbar)
    flat = pessimistic(torch.ones_like(pbar), constant, log_ref, 0.1)
    torch.testing.assert_close(flat, torch.ones(len(qbar)).double())


def test_bad_parameters_are_named():
    pbar, qbar, log_ref, _, _ = problem(1)
    lambdas = torch.zeros(len(qbar)).double()
    with pytest.raises(ValueError, match=r"`tau` should be positive\. Found 0"):
        tilt(pbar, qbar, lambdas, 0.0, log_ref)
    for eps in (-0.1, INFINITY, math.nan):
        with pytest.raises(ValueError, match=f"`eps` should be finite .* Found {eps}"):
            pessimistic(torch.ones_like(pbar), qbar, log_ref, eps)
