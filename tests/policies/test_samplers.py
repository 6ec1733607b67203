"""Sampler steps against what the flow's own mathematics says about a Gaussian data set."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from moa_diffusion.policies.samplers import Step, Steps, cps, flow_sde, generators, noise, ode

CPU = torch.device("cpu")
# Steps are made of Python's floats, which some ten operations round by 1e-16 each. The default of
# pytest, 1e-6, leaves them a wide margin. Tensors are float32, which rounds by 6e-8; sums and means
# over 120 elements of squares of about 1 stay within 20 of these, torch's default of 1.3e-6.

# Data N(m, c^2): x_s = (1 - s) data + s noise is Gaussian, and its velocity is known exactly.
MEAN, SPREAD = 0.8, 0.5


def moments(s: float) -> tuple[float, float]:
    """Mean and variance of ``x_s``."""
    return (1 - s) * MEAN, (1 - s) ** 2 * SPREAD**2 + s**2


def slope(s: float) -> float:
    """Of the velocity: ``E[noise - data | x_s = x] = slope (x - mean) - m``."""
    return (s - (1 - s) * SPREAD**2) / moments(s)[1]


def after(step: Step, s: float) -> tuple[float, float]:
    """Mean and variance after one step from ``x_s``."""
    mean, variance = moments(s)
    return step.x * mean - step.v * MEAN, (step.x + step.v * slope(s)) ** 2 * variance + step.std**2


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sde(s: float, s_next: float, noise_level: float = 0.7) -> Step:
    return flow_sde(s, s_next, noise_level=noise_level, s_second=0.95)


@pytest.mark.parametrize("kind", [ode, sde])
@pytest.mark.parametrize("s", [0.9, 0.5, 0.2])
def test_steps_keep_the_marginals_to_first_order(kind, s):
    """The error of one step is of second order: a tenth of the step, a hundredth of the error."""
    errors = []
    for length in (1e-2, 1e-3):
        found, expected = after(kind(s, s - length), s), moments(s - length)
        errors.append([abs(a - b) for a, b in zip(found, expected, strict=True)])
    for coarse, fine in zip(*errors, strict=True):
        assert coarse < 1e-2  # 1e-3 for the SDE at 0.9
        assert fine < coarse / 50 + 1e-13  # half of a hundredfold, and rounding of a 1


def test_many_sde_steps_end_in_the_data():
    """Mean and variance through 2000 steps: a drift of the wrong size would end elsewhere."""
    sigmas = torch.linspace(1, 0, 2001, dtype=torch.float64).tolist()
    mean, variance = moments(1.0)
    for s, s_next in pairwise(sigmas):
        step = flow_sde(s, s_next, noise_level=0.7, s_second=sigmas[1])
        total = step.x + step.v * slope(s)
        mean = step.x * mean + step.v * (slope(s) * (mean - moments(s)[0]) - MEAN)
        variance = total**2 * variance + step.std**2
    # The method is of first order: 2000 steps leave 0.15 % of the spread.
    assert mean == pytest.approx(MEAN, rel=5e-3)
    assert math.sqrt(variance) == pytest.approx(SPREAD, rel=5e-3)


def test_without_noise_every_step_is_the_ode():
    plain, gaps = ode(0.6, 0.5), []
    assert (plain.x, plain.std) == (1.0, 0.0)
    assert plain.v == pytest.approx(-0.1)
    for level in (1e-2, 1e-3):
        step = sde(0.6, 0.5, level)
        gaps.append(abs(step.x - plain.x) + abs(step.v - plain.v))
        assert step.std == pytest.approx(level * math.sqrt(0.6 / 0.4) * math.sqrt(0.1))
    assert gaps[1] == pytest.approx(gaps[0] / 100)
    silent = cps(0.6, 0.5, noise_level=1e-9)
    assert (silent.x, silent.v) == pytest.approx((plain.x, plain.v))
    assert silent.std < 1e-8  # 0.5 sin(1e-9 pi / 2) = 8e-10


def test_flow_sde_in_numbers():
    """g = 0.7 sqrt(0.8 / 0.2) = 1.4; by hand for D = -0.1."""
    step = flow_sde(0.8, 0.7, noise_level=0.7, s_second=0.9)
    assert step.x == pytest.approx(1 - 0.1 * 1.96 / 1.6)
    assert step.v == pytest.approx(-0.1 * (1 + 1.96 * 0.2 / 1.6))
    assert step.std == pytest.approx(1.4 * math.sqrt(0.1))
    assert step.length == pytest.approx(0.1)


def test_first_step_divides_by_the_second_sigma():
    step = flow_sde(1.0, 0.9, noise_level=0.7, s_second=0.96)
    g = 0.7 * math.sqrt(1 / 0.04)
    assert step.std == pytest.approx(g * math.sqrt(0.1))
    assert step.x == pytest.approx(1 - 0.1 * g**2 / 2)
    assert step.v == pytest.approx(-0.1)  # 1 - s is 0 in the drift


def test_last_step_may_end_at_zero():
    step = flow_sde(0.1, 0.0, noise_level=0.7, s_second=0.9)
    assert step.std == pytest.approx(0.7 * math.sqrt(0.1 / 0.9) * math.sqrt(0.1))


@pytest.mark.parametrize("noise_level", [0.1, 0.7, 1.0])
@pytest.mark.parametrize(("s", "s_next"), [(1.0, 0.9), (0.6, 0.5), (0.2, 0.01)])
def test_cps_leaves_exactly_s_next_of_noise(s, s_next, noise_level):
    """``x = (1 - s) data + s noise``, ``v = noise - data``: collect the coefficients of both."""
    step = cps(s, s_next, noise_level=noise_level)
    of_data = step.x * (1 - s) - step.v
    of_noise = step.x * s + step.v
    assert of_data == pytest.approx(1 - s_next)
    assert math.hypot(of_noise, step.std) == pytest.approx(s_next)
    assert of_noise >= -1e-12  # 0 but for rounding at a noise level of 1
    assert step.std == pytest.approx(s_next * math.sin(noise_level * math.pi / 2))
    assert step.length == pytest.approx(s - s_next)


# Levels of ten steps with shift 3, without the last step, which is not trained.
SIGMAS = [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089]


def rates(steps: list[Step]) -> list[float]:
    """How fast the log-prob of each step changes with ``v``, for noise of 1: by autograd."""
    batch = Steps.of(steps, CPU)
    v = torch.zeros(len(steps), 1, 1, 1, requires_grad=True)
    x_next = batch.std  # one standard deviation away from x = 0
    batch.log_prob(x_next, batch.mean(torch.zeros(1), v)).sum().backward()
    return v.grad.abs().flatten().tolist()


def test_cps_trains_all_its_steps():
    """Flow-CPS's log-prob is minus the squared distance; by the density one step has it all."""
    steps = [cps(s, s_next, noise_level=0.7) for s, s_next in pairwise(SIGMAS)]
    found = rates(steps)
    # Some ten operations in float32: 6e-7.
    assert found == pytest.approx([2 * abs(step.v) * step.std for step in steps], rel=1e-5)
    expected = [0.0682, 0.1085, 0.1471, 0.1813, 0.2068, 0.2161, 0.1974, 0.1328, 0.0043]
    assert found == pytest.approx(expected, rel=0.02)  # the sigmas have four digits
    density = rates([replace(step, unscaled=False) for step in steps])
    assert max(density) / sorted(density)[-2] == pytest.approx(32, rel=0.05)  # 31.76
    assert max(found) / sorted(found)[-2] < 1.05  # 1.045


def test_flow_sde_weighs_its_steps_by_the_density():
    steps = [flow_sde(s, t, noise_level=0.7, s_second=SIGMAS[1]) for s, t in pairwise(SIGMAS)]
    assert not any(step.unscaled for step in steps)
    expected = [0.057, 0.078, 0.129, 0.188, 0.264, 0.371, 0.536, 0.825, 1.487]
    assert rates(steps) == pytest.approx(expected, rel=0.01)  # 0.057 is rounded by up to 0.9 %


def test_log_prob_of_cps_is_the_published_one():
    x_next, mean = draw(2, 3, 4, 5, 6)
    steps = [cps(0.8, 0.7, noise_level=0.7), cps(0.278, 0.0089, noise_level=0.7), sde(0.8, 0.7)]
    found = Steps.of(steps, CPU).log_prob(x_next, mean)
    published = -((x_next - mean) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(found[:2], published[:2])
    # In a batch with others, Flow-SDE's is the bits that it is alone.
    assert torch.equal(found[2:], Steps.of(steps[2:], CPU).log_prob(x_next[2:], mean[2:]))


def test_a_batch_of_steps_is_each_step_on_its_own():
    steps = [sde(0.9, 0.8), cps(0.5, 0.3, noise_level=0.7), sde(0.2, 0.1)]
    x, v, x_next = draw(3, 3, 4, 5, 6)
    batch = Steps.of(steps, CPU)
    mean = batch.mean(x, v)
    log_prob = batch.log_prob(x_next, mean)
    assert mean.shape == x.shape
    assert log_prob.shape == (3,)
    for i, step in enumerate(steps):
        torch.testing.assert_close(mean[i], step.x * x[i] + step.v * v[i])
        one = Steps.of([step], CPU)
        alone = one.mean(x[i : i + 1], v[i : i + 1])
        torch.testing.assert_close(alone[0], mean[i])
        # Sums over a batch of another size may be cut otherwise, so not to the bit.
        torch.testing.assert_close(one.log_prob(x_next[i : i + 1], alone)[0], log_prob[i])
        # One row for all samples means the same as the row repeated.
        torch.testing.assert_close(one.mean(x, v), Steps.of([step] * 3, CPU).mean(x, v))


def test_log_prob_is_that_of_a_normal():
    x_next, mean = draw(2, 3, 4, 5, 6)
    steps = Steps.of([Step(1.0, -0.1, std, 0.1) for std in (0.37, 0.01, 2.0)], CPU)
    spread = torch.tensor([0.37, 0.01, 2.0])[:, None, None, None]
    expected = Normal(mean, spread).log_prob(x_next).flatten(1).mean(1)
    torch.testing.assert_close(steps.log_prob(x_next, mean), expected)


@pytest.mark.parametrize("step", [sde(0.8, 0.7), cps(0.8, 0.7, noise_level=0.7)])
def test_kl_is_that_of_two_normals(step):
    x, v, v_ref = draw(3, 3, 4, 5, 6)
    steps = Steps.of([step], CPU)
    mean, reference = steps.mean(x, v), steps.mean(x, v_ref)
    true = kl_divergence(Normal(mean, step.std), Normal(reference, step.std)).flatten(1).mean(1)
    found = steps.kl(v, v_ref, "gaussian")
    assert found.shape == (3,)
    torch.testing.assert_close(found, true)
    published = true if step.unscaled else true * 0.1  # see the formulas below
    torch.testing.assert_close(steps.kl(v, v_ref, "dt_free"), published)
    torch.testing.assert_close(steps.kl(v, v_ref, "velocity"), ((v - v_ref) ** 2).mean((1, 2, 3)))
    assert not steps.kl(v, v, "gaussian").any()


def test_kl_of_a_batch_weighs_each_sample_by_its_own_step():
    chosen = [sde(0.9, 0.8), sde(0.3, 0.25)]
    v, v_ref = draw(2, 2, 4, 5, 6)
    for kind in ("gaussian", "dt_free", "velocity"):
        together = Steps.of(chosen, CPU).kl(v, v_ref, kind)
        for i, step in enumerate(chosen):
            alone = Steps.of([step], CPU).kl(v[i : i + 1], v_ref[i : i + 1], kind)
            torch.testing.assert_close(alone[0], together[i])


def test_kl_dt_free_is_the_original_codes_formula():
    """Flow-GRPO divides the difference of means by the spread per unit time, without the step."""
    step = flow_sde(0.8, 0.7, noise_level=0.7, s_second=0.9)  # g = 1.4
    v, v_ref = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, 1, 1, 1)
    found = Steps.of([step], CPU).kl(v, v_ref, "dt_free")
    # Some ten operations in float32, as in the next test: 6e-7.
    assert float(found) == pytest.approx((step.v * 0.5) ** 2 / (2 * 1.4**2), rel=1e-5)


def test_kl_dt_free_of_cps_is_the_original_codes_formula():
    """There `std_dev_t` is the step's whole spread, so the length is in it already."""
    step = cps(0.8, 0.7, noise_level=0.7)
    v, v_ref = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, 1, 1, 1)
    expected = (step.v * 0.5) ** 2 / (2 * (0.7 * math.sin(0.35 * math.pi)) ** 2)
    for batch in ([step], [step, sde(0.5, 0.4)]):
        found = Steps.of(batch, CPU).kl(v, v_ref, "dt_free")
        # Some ten operations in float32: 6e-7.
        assert float(found[0]) == pytest.approx(expected, rel=1e-5)


def test_noise_of_a_sample_depends_on_its_seed_alone():
    seeds, shape = [5, 6, 2**63 - 1], (4, 2, 2)
    together = noise(generators(seeds), shape, CPU)
    assert together.shape == (3, 4, 2, 2)
    assert together.dtype == torch.float32
    for seed, expected in zip(seeds, together, strict=True):
        assert torch.equal(noise(generators([seed]), shape, CPU)[0], expected)
    assert not torch.equal(together[0], together[1])


def test_noise_continues_where_it_stopped_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    sources = generators([5])
    first, second = (noise(sources, (3,), CPU) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_even_scores_differ_by_the_normalised_log_ratio():
    """By hand: log r without its bias, times std over the velocity's coefficient."""
    source = torch.Generator().manual_seed(0)
    x, v, other, z = torch.randn(4, 2, 3, 4, 4, generator=source, dtype=torch.float64)
    sigmas = [1.0, 0.9, 0.5, 0.1]
    made = [flow_sde(s, s_next, noise_level=0.7, s_second=0.9) for s, s_next in pairwise(sigmas)]
    moved = []
    for step in made:
        steps = Steps(
            *(
                torch.full((2, 1, 1, 1), value, dtype=torch.float64)
                for value in (step.x, step.v, step.std, step.length)
            )
        )
        old, new = steps.mean(x, v), steps.mean(x, other)
        x_next = old + steps.std * z
        log_ratio = steps.log_prob(x_next, new) - steps.log_prob(x_next, old)
        bias = ((new - old) / step.std).square().flatten(1).mean(1) / 2
        expected = (log_ratio + bias) * step.std / abs(step.v)
        found = steps.even_score(other, z) - steps.even_score(v, z)
        # Float64. Two log-probs of about 1 are subtracted, so 1e-16 of 1 stays.
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        moved.append(found)
    for later in moved[1:]:  # all steps have one scale
        torch.testing.assert_close(later, moved[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("make", [flow_sde, cps])
def test_how_far_a_step_has_moved(make):
    """The divergence is the KL of two normals; the other one is what even scores differ by."""
    source = torch.Generator().manual_seed(0)
    x, v, other, z = torch.randn(4, 2, 3, 4, 4, generator=source)
    step = make(0.8, 0.6, noise_level=0.7, s_second=0.9)
    steps = Steps.of([step], CPU)
    old, new = steps.mean(x, v), steps.mean(x, other)
    x_next = old + steps.std * z
    expected = kl_divergence(Normal(new, step.std), Normal(old, step.std)).flatten(1).mean(1)
    # The old mean is what is left of x_next without its noise: eps of about 3 over the std of 0.2
    # is 2e-6 of a shift of some std; sums of 48 squares stay within torch's default of the rest.
    torch.testing.assert_close(
        steps.moved(new, x_next, z, "divergence"), expected, rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(
        steps.moved(new, x_next, z, "normalized"),
        steps.even_score(other, z) - steps.even_score(v, z),
        rtol=1e-5,
        atol=1e-6,
    )
    assert steps.moved(old, x_next, z, "divergence").abs().max() < 1e-10
