"""MOPO's closed form: against a convex solver, against sums by hand, and at its limits."""

from __future__ import annotations

import io
import logging
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moa_diffusion.objectives.mopo_offline import (
    OfflineMopo,
    OfflineSettings,
    barrier,
    barrier_step,
    constraint_levels,
    dual_step,
    effective_samples,
    pessimistic,
    tilt,
)

# Numbers are float64. Where a test gives no tolerance it takes the defaults of pytest (1e-6) and
# torch (1e-7): what is expected is often written in float32, which rounds by 6e-8.
INFINITY = math.inf
# How far win rates, which lie in [0, 1], may be off. The dual steps that tests take leave at most
# 2e-7, and SLSQP, which stops where it gains less than 1e-14, knows its optimum to 1e-7.
SETTLED = 1e-4


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


@pytest.mark.parametrize("seed", range(24))
def test_closed_form_and_dual_reach_the_constrained_optimum(seed):
    pbar, qbar, log_ref, tau, bounds = problem(seed)
    pi, lambdas = by_dual(pbar, qbar, log_ref, tau, bounds)
    expected = by_solver(pbar, qbar, log_ref, tau, bounds)
    torch.testing.assert_close(pi, expected, atol=SETTLED, rtol=0)
    levels = (pi * qbar).sum(2).mean(1)
    # The last step moved multipliers by less than 1e-9, so violations are below 1e-9 / (4 tau).
    assert (levels >= bounds - 1e-6).all()
    assert (lambdas * (levels - bounds)).abs().max() < 1e-6  # complementary slackness
    if seed % 4 == 0:
        assert lambdas[0] == 0


def test_most_bounds_of_these_problems_bind():
    binding = [bool((by_dual(*problem(seed)[:5])[1] > 0).any()) for seed in range(1, 24, 4)]
    assert sum(binding) >= 5


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
    # Three operations in float32, 6e-8 each: torch's default for it is 1.3e-6.
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
    # 0.6 - 0.5 in float32 is off by 3e-8, which is 3e-7 of it; torch's default allows 1.3e-6.
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
        # The grid's points are 0.09 % apart, and the value is flat at its maximum: 1e-7.
        assert float(level) == pytest.approx(float(dual.max()), abs=1e-6)


def test_pessimism_grows_from_the_mean_to_the_smallest_value():
    pbar, qbar, log_ref, tau, _ = problem(5)
    rho = tilt(pbar, qbar, torch.ones(len(qbar)).double(), tau, log_ref)
    mean = constraint_levels(rho, qbar, log_ref)
    assert torch.equal(pessimistic(rho, qbar, log_ref, 0.0), mean)
    levels = [pessimistic(rho, qbar, log_ref, eps) for eps in (1e-9, 1e-3, 0.1, 1.0, 100.0)]
    # Within 1e-9 the worst case is the root of 2e-9 of a standard deviation lower: 1.4e-5.
    torch.testing.assert_close(levels[0], mean, atol=1e-4, rtol=0)
    assert all((low < high).all() for high, low in pairwise(levels))
    torch.testing.assert_close(levels[-1], (rho * qbar).flatten(1).amin(1))
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


def test_a_barrier_step_settles_where_the_barrier_says():
    """With a level that answers at once, plain ``barrier`` swings between nothing and the cap."""
    pbar, qbar, log_ref, tau, bounds = problem(1)
    bounds = bounds - 0.05
    lambdas, sigma = torch.zeros(len(qbar)).double(), 0.01
    for _ in range(600):
        levels = constraint_levels(tilt(pbar, qbar, lambdas, tau, log_ref), qbar, log_ref)
        lambdas = barrier_step(lambdas, levels, bounds, 0.5, sigma, 10.0)
    assert (levels > bounds).all()
    # 600 steps leave 7e-7 of it.
    torch.testing.assert_close(lambdas, barrier(levels, bounds, sigma, 10.0), rtol=1e-5, atol=0)
    assert 0 < float(lambdas.min()) < 10

    swings = [torch.zeros(len(qbar)).double()]
    for _ in range(20):
        levels = constraint_levels(tilt(pbar, qbar, swings[-1], tau, log_ref), qbar, log_ref)
        swings.append(barrier(levels, bounds, sigma, 10.0))
    assert (swings[-1] - swings[-2]).abs().max() > 1


def test_without_a_barrier_its_step_is_the_dual_step():
    lambdas, bounds = torch.tensor([1.0, 0.01, 9.99]).double(), torch.tensor([0.5] * 3).double()
    levels = torch.tensor([0.4, 0.9, 0.1]).double()
    torch.testing.assert_close(
        barrier_step(lambdas, levels, bounds, 0.1, 0.0, 10.0),
        dual_step(lambdas, levels, bounds, 0.1, 10.0),
    )


def test_effective_samples_count_what_carries_the_weight():
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    assert effective_samples(weights) == pytest.approx((4 + 2 + 1) / 3)


# ---------------------------------------------------------------------- over a set of responses


def offline(
    pbar: Tensor, qbar: Tensor, bounds: Any, *, log_data: Tensor | None = None, **options: Any
) -> OfflineMopo:
    even = torch.full_like(pbar, -math.log(pbar.shape[1]))
    return OfflineMopo(
        primary="taste",
        secondary=("price", "health")[: len(qbar)],
        pbar=pbar,
        qbar=qbar,
        log_data=even if log_data is None else log_data,
        bounds=[float(bound) for bound in bounds],
        settings=OfflineSettings(**({"tau": 0.2, "eta": 1.0, "lag": 0} | options)),
    )


def settle(mopo: OfflineMopo, steps: int = 200) -> Tensor:
    for _ in range(steps):
        target = mopo()
    return target


def opposed(seed: int = 2) -> tuple[Tensor, Tensor]:
    """Win rates ``[4, 6]`` and ``[1, 4, 6]`` of an objective that mostly opposes the first."""
    noise = random((2, 4, 6), seed)
    return noise[0], (0.6 * (1 - noise[0]) + 0.4 * noise[1])[None]


@pytest.mark.parametrize("seed", [1, 6, 11])
def test_a_set_of_responses_settles_at_the_solvers_optimum(seed):
    pbar, qbar, log_ref, tau, bounds = problem(seed)
    mopo = offline(pbar, qbar, bounds, tau=tau, eta=4 * tau, log_data=log_ref)
    target = settle(mopo, 800)
    expected = by_solver(pbar, qbar, log_ref, tau, bounds)
    torch.testing.assert_close(target, expected, atol=SETTLED, rtol=0)


def test_a_higher_bound_costs_more_of_the_primary_objective():
    pbar, qbar = opposed()
    free = offline(pbar, qbar, [0.0])
    settle(free, 1)
    start = float(free.level)
    reached = []
    for bound in (start + 0.02 * i for i in range(1, 6)):
        mopo = offline(pbar, qbar, [bound])
        settle(mopo)
        assert float(mopo.level) == pytest.approx(bound, abs=SETTLED)
        reached.append((mopo.reached, float(mopo.lambdas)))
    assert all(high[0] > low[0] and high[1] < low[1] for high, low in pairwise(reached))
    assert free.reached > reached[0][0]


@pytest.mark.parametrize("variant", ["lagrangian", "barrier"])
def test_a_slack_bound_leaves_the_primary_objective_alone(variant):
    pbar, qbar = opposed()
    mopo = offline(pbar, qbar, [0.1], variant=variant, sigma=1e-4)
    target = settle(mopo)
    free = (pbar / 0.2).softmax(1)
    if variant == "lagrangian":
        assert mopo.lambdas.tolist() == [0]
        torch.testing.assert_close(target, free)
    else:
        # 4e-4; over tau = 0.2 it moves shares, which are about 0.2, by some 1e-4.
        assert 0 < float(mopo.lambdas) < 1e-3
        torch.testing.assert_close(target, free, atol=1e-3, rtol=0)


@pytest.mark.parametrize("variant", ["lagrangian", "barrier"])
def test_a_bound_beyond_the_cap_is_warned_of_once(variant, caplog):
    pbar, qbar = opposed()
    mopo = offline(pbar, qbar, [0.99], variant=variant, maximum=3.0)
    with caplog.at_level(logging.WARNING):
        settle(mopo, 50)
        again = offline(pbar, qbar, [0.99], variant=variant, maximum=3.0)
        again.load_state_dict(mopo.state_dict())
        settle(again, 5)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("Bound 0.99 on `price` may be out of reach: its multiplier sits at")
    assert mopo.lambdas.tolist() == [3]


def test_pessimism_keeps_a_distance_from_the_bound():
    pbar, qbar = opposed()
    found = {}
    for eps in (0.0, 0.001, 0.01):
        mopo = offline(pbar, qbar, [0.5], eps=eps)
        target = settle(mopo, 120)
        found[eps] = float((target * qbar[0]).sum(1).mean()), float(mopo.lambdas), mopo.reached
    assert found[0.0][0] == pytest.approx(0.5, abs=SETTLED)
    assert found[0.0][0] + 0.005 < found[0.001][0] < found[0.01][0]
    assert found[0.0][1] < found[0.001][1] < found[0.01][1]
    assert found[0.0][2] > found[0.001][2] > found[0.01][2]


def test_without_secondary_objectives_the_target_is_the_tilt():
    pbar, _ = opposed()
    mopo = offline(pbar, torch.zeros(0, 4, 6).double(), [])
    torch.testing.assert_close(settle(mopo, 3), (pbar / 0.2).softmax(1))
    mopo.refer(torch.zeros_like(pbar))
    assert set(mopo.report()) == {"mopo_level/taste"}
    assert mopo.headline() == ""


def test_what_was_not_compared_says_nothing():
    """Nothing in the tilt of its prompt, and nothing in the level if the prompt has no other."""
    pbar, qbar = opposed()
    qbar[0, 0] = math.nan  # a prompt without any comparison of the objective
    qbar[0, 1, 2] = math.nan  # one response of another
    pbar[2, 0] = math.nan
    mopo = offline(pbar, qbar, [0.6])
    target = settle(mopo)
    torch.testing.assert_close(target[0], (pbar[0] / 0.2).softmax(0))
    filled = qbar[0].clone()
    filled[1, 2] = qbar[0, 1].nanmean()
    expected = (target[1:] * filled[1:]).sum(1).mean()
    assert float(mopo.level) == pytest.approx(float(expected)) == pytest.approx(0.6, abs=SETTLED)
    score = torch.where(pbar[2].isnan(), pbar[2].nanmean(), pbar[2]) + mopo.lambdas * qbar[0, 2]
    torch.testing.assert_close(target[2], (score / 0.2).softmax(0))


def test_padding_has_no_weight():
    pbar, qbar = opposed()
    log_data = torch.full_like(pbar, -math.log(6))
    log_data[1] = torch.tensor([-math.log(2)] * 2 + [-INFINITY] * 4)
    pbar[1, 2:], qbar[0, 1, 2:] = math.nan, 0.9  # whatever stands there
    mopo = offline(pbar, qbar, [0.5], log_data=log_data)
    target = settle(mopo)
    assert target[1, 2:].tolist() == [0] * 4
    torch.testing.assert_close(target.sum(1), torch.ones(4).double())
    assert float(mopo.level) == pytest.approx(0.5, abs=SETTLED)
    mopo.refer(torch.zeros_like(pbar))
    torch.testing.assert_close(mopo.log_ref, log_data)


def test_the_reference_follows_and_the_bounds_with_it():
    pbar, qbar = opposed()
    first, second = random((2, 4, 6), 9)
    for follow, bound in (("ratchet", 0.55), ("beta_lag", 0.9 * 0.55)):
        mopo = offline(pbar, qbar, [0.55], lag=1, beta=0.9, follow=follow)
        settle(mopo)
        assert float(mopo.level) == pytest.approx(0.55, abs=SETTLED)
        mopo.refer(first)
        torch.testing.assert_close(mopo.log_ref, mopo.log_data)  # the start, still
        assert float(mopo.bounds()) == pytest.approx(bound, abs=SETTLED)
        mopo()
        mopo.refer(second)
        torch.testing.assert_close(mopo.log_ref, first.log_softmax(1))
    ratchet = offline(pbar, qbar, [0.1], lag=1, beta=0.9)
    settle(ratchet, 5)
    reached = float(ratchet.level)
    ratchet.refer(first)
    assert float(ratchet.bounds()) == pytest.approx(0.9 * reached)  # what was reached is held
    assert reached > 0.3


def test_levels_of_a_policy_are_reweighted_responses():
    pbar, qbar = opposed()
    mopo = offline(pbar, qbar, [0.5])
    ratio = random((4, 6), 3)
    pi = ratio.softmax(1)
    assert mopo.levels_of(ratio) == pytest.approx(
        {
            "taste": float((pi * pbar).sum(1).mean()),
            "price": float((pi * qbar[0]).sum(1).mean()),
        }
    )


@pytest.mark.parametrize("variant", ["lagrangian", "barrier"])
def test_a_resumed_set_goes_on_bit_by_bit(variant):
    pbar, qbar = opposed()

    def build() -> OfflineMopo:
        return offline(pbar, qbar, [0.55], variant=variant, eps=0.001, beta=0.9)

    straight, resumed = build(), build()
    settle(straight, 7)
    straight.refer(random((4, 6), 4))
    settle(straight, 2)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(6):
        assert torch.equal(resumed(), straight())
        assert resumed.report() == straight.report()
        if step == 2:
            for mopo in (resumed, straight):
                mopo.refer(random((4, 6), 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "log"}, r"`variant` should be one of .* Found 'log'"),
        ({"follow": "beta"}, r"`follow` should be one of .* Found 'beta'"),
        ({"tau": 0.0}, r"`tau` should be finite and positive\. Found 0"),
        ({"eta": math.nan}, "`eta` should be finite and positive. Found nan"),
        ({"maximum": INFINITY}, "`maximum` should be finite and positive. Found inf"),
        ({"log_cap": -1.0}, "`log_cap` should be positive. Found -1"),
        ({"eps": -0.1}, "`eps` should be finite and not negative. Found -0.1"),
        ({"sigma": 0.0}, "`sigma` should be finite and positive. Found 0"),
        ({"lag": -1}, "`lag` should be at least 0. Found -1"),
        ({"beta": 1.1}, r"`beta` should be in \[0, 1\]. Found 1.1"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        OfflineSettings(**options)


def test_shapes_that_do_not_fit_are_named():
    pbar, qbar = opposed()
    with pytest.raises(
        ValueError, match=r"`qbar` should have shape \(1, 4, 6\)\. Found \(1, 4, 5\)"
    ):
        offline(pbar, qbar[..., :5], [0.5])
    with pytest.raises(ValueError, match=r"`bounds` should have shape \(1,\)\. Found \(2,\)"):
        offline(pbar, qbar, [0.5, 0.5])
    with pytest.raises(ValueError, match=r"`pbar` should have shape \(4, 5\)\. Found \(4, 6\)"):
        offline(pbar, qbar, [0.5], log_data=torch.zeros(4, 5))
