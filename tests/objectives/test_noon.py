"""Noon: the clamp, what it does to PAMA's problem, and the option that undoes its shrinking."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moa_diffusion.objectives.base import combine
from moa_diffusion.objectives.noon import Noon
from moa_diffusion.objectives.normalize import GDPO
from moa_diffusion.objectives.pama import Pama
from moa_diffusion.types import ObjectiveStats, RewardMatrix

# Numbers are float64. Where a test gives no tolerance it takes the defaults of pytest (1e-6) and
# torch (1e-7): what is expected is often written in float32, which rounds by 6e-8.


def rewards(values: Tensor | list[list[float]], group_size: int = 4) -> RewardMatrix:
    values = torch.as_tensor(values, dtype=torch.float64)
    groups = torch.arange(values.shape[1]) // group_size
    return RewardMatrix(
        names=tuple(f"r{k}" for k in range(len(values))),
        values=values,
        groups=groups,
        prompts=tuple(f"prompt {group}" for group in groups.tolist()),
    )


def draw(objectives: int, samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(objectives, samples, generator=generator, dtype=torch.float64)


def pama(normalizer: Noon, matrix: RewardMatrix) -> Tensor:
    """Both stages around PAMA's weights: ``[N]``."""
    advantages = normalizer.per_objective(matrix)
    stats = ObjectiveStats(step=0, rewards=matrix, advantages=advantages)
    weights = Pama(matrix.names)(stats)
    return normalizer.combined(combine(advantages, weights, ~matrix.values.isnan()), matrix)


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def test_noon_in_numbers():
    matrix = rewards([[1, 3, 5, 7], [0, 0, 1, math.nan]])
    advantages = Noon(matrix.names, eps=1e-12).per_objective(matrix)
    expected = torch.tensor([[0, 0, 1 / 5**0.5, 3 / 5**0.5], [0, 0, 2**0.5, 0]]).double()
    torch.testing.assert_close(advantages, expected)


def test_noon_is_the_positive_part_of_gdpo(zoo):
    expected = GDPO(zoo.names).per_objective(zoo).clamp(min=0)
    assert torch.equal(Noon(zoo.names, eps=1e-4).per_objective(zoo), expected)


def test_without_a_rescale_stage_two_changes_nothing(zoo):
    scores = torch.arange(len(zoo.groups)).double()
    assert torch.equal(Noon(zoo.names).combined(scores, zoo), scores)


def test_with_one_objective_pama_is_noon_grpo():
    matrix = rewards(draw(1, 24), group_size=8)
    z = GDPO(matrix.names, eps=1e-12).per_objective(matrix)[0]
    torch.testing.assert_close(pama(Noon(matrix.names), matrix), z.clamp(min=0))
    torch.testing.assert_close(pama(Noon(matrix.names, match_rms=True), matrix), z.clamp(min=0))


def test_with_noon_the_projection_is_the_minimum():
    matrix = rewards(draw(4, 48), group_size=24)
    noon = Noon(matrix.names)
    torch.testing.assert_close(pama(noon, matrix), noon.per_objective(matrix).amin(0))


@pytest.mark.parametrize("match_rms", [False, True])
def test_rescaling_one_raw_reward_changes_nothing(match_rms):
    values = draw(3, 48) * 1e3
    scaled = values * torch.tensor([[1.0], [1e4], [1.0]]).double()
    noon = Noon(("r0", "r1", "r2"), match_rms=match_rms)
    before = pama(noon, rewards(values, 24))
    # Without an eps the unit cancels; an eps of 1e-4 would be seen at 1e-7.
    torch.testing.assert_close(pama(noon, rewards(scaled, 24)), before, rtol=1e-12, atol=1e-12)


def test_match_rms_restores_the_size_and_keeps_the_direction():
    matrix = rewards(draw(4, 96), group_size=24)
    plain, matched = Noon(matrix.names), Noon(matrix.names, match_rms=True)
    small, large = pama(plain, matrix), pama(matched, matrix)
    mean = plain.per_objective(matrix).mean(0)
    assert rms(small) < 0.5 * rms(mean)
    assert rms(large) == pytest.approx(rms(mean), rel=1e-12)  # sums of 96 terms
    torch.testing.assert_close(large / rms(large), small / rms(small))
    assert torch.equal(large == 0, small == 0)


def test_match_rms_leaves_zeros_alone():
    matrix = rewards([[0, 1, 0, 1], [1, 0, 1, 0]])  # nobody is above the mean of both
    assert pama(Noon(matrix.names, match_rms=True), matrix).tolist() == [0, 0, 0, 0]
    constant = rewards([[0.1] * 4, [21.7] * 4])
    assert pama(Noon(constant.names, match_rms=True), constant).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("objectives", "share"), [(2, 0.43), (3, 0.27), (4, 0.18), (6, 0.07)])
def test_how_much_smaller_the_minimum_is_than_the_mean(objectives, share):
    """The frozen numbers of the class's docstring: independent objectives in groups of 24."""
    matrix = rewards(draw(objectives, 24 * 400), group_size=24)
    noon = Noon(matrix.names)
    mean = GDPO(matrix.names).per_objective(matrix).mean(0)
    # Two digits, and a standard error of 0.005 over seeds, of which this is one.
    assert rms(pama(noon, matrix)) / rms(mean) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("eps", [-1.0, math.nan])
def test_noon_refuses_a_negative_eps(eps):
    with pytest.raises(ValueError, match=r"`eps` should be at least 0. Found"):
        Noon(("a",), eps=eps)
