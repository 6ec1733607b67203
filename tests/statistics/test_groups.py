"""Statistics within groups: against plain loops, and errors that count prompts once."""

from __future__ import annotations

import math

import pytest
import torch

from moa_diffusion.statistics.groups import (
    group_moments,
    mean_and_error,
    same_prompt,
    spread_within,
)

NAN = math.nan


VALUES = torch.tensor([[1.0, 3.0, NAN, 5.0, 5.0], [NAN, NAN, NAN, 2.0, 4.0]]).double()


GROUPS = torch.tensor([7, 7, 7, 2, 2])


def test_moments_are_those_of_each_group():
    mean, std, count = group_moments(VALUES, GROUPS)
    assert mean.tolist() == [[2.0, 2.0, 2.0, 5.0, 5.0], [0.0, 0.0, 0.0, 3.0, 3.0]]
    assert std.tolist() == [[1.0, 1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0]]
    assert count.tolist() == [[2.0, 2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 2.0, 2.0]]


def test_rounding_is_no_spread():
    third = torch.full((1, 3), 1 / 3).double() + torch.tensor([[0.0, 1e-16, -1e-16]]).double()
    assert group_moments(third, torch.zeros(3, dtype=torch.int64))[1].tolist() == [[0.0] * 3]


@pytest.mark.parametrize("size", [2, 5, 50])
def test_the_spread_does_not_depend_on_the_size_of_the_groups(size):
    generator = torch.Generator().manual_seed(size)
    count = 20_000 // size
    values = 3 * torch.randn(1, count * size, generator=generator).double()
    values += 10 * torch.randn(1, count, generator=generator).repeat_interleave(size, 1)
    spread = spread_within(values, torch.arange(count).repeat_interleave(size))
    # At least 10,000 degrees of freedom: a deviation of 0.7 % at most.
    assert float(spread) == pytest.approx(3.0, rel=0.05)


def test_groups_of_one_have_no_spread():
    assert spread_within(VALUES[:, :2], torch.tensor([0, 1])).isnan().all()


def test_a_prompt_that_is_listed_twice_counts_once():
    prompts = same_prompt(["a", "b", "a", "c"])
    assert prompts.tolist() == [0, 1, 0, 2]
    values = torch.tensor([1.0, 2.0, 1.0, 6.0])
    once = mean_and_error(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 1, 2]))
    assert once == pytest.approx((3.0, math.sqrt(7 / 3)))
    mean, error = mean_and_error(values, prompts)
    assert mean == pytest.approx(2.5)
    assert error > float(values.std() / 2), "four independent samples would say less"


def test_one_prompt_has_a_mean_and_no_error():
    mean, error = mean_and_error(torch.tensor([1.0, 3.0, NAN]), torch.tensor([4, 4, 5]))
    assert mean == 2.0
    assert math.isnan(error)
    assert all(map(math.isnan, mean_and_error(torch.tensor([NAN]), torch.tensor([0]))))


def test_the_standard_error_counts_prompts_not_images():
    prompts = torch.tensor([0, 0, 0, 1, 1, 1])
    values = torch.tensor([1.0, 1, 1, 0, 0, 0]).double()
    mean, error = mean_and_error(values, prompts)
    assert (mean, error) == (0.5, pytest.approx(0.5))  # std of (1, 0) over the root of 2
    assert mean_and_error(values, torch.arange(6))[1] == pytest.approx((0.3 / 6) ** 0.5)
    gaps = torch.tensor([1, math.nan, math.nan, 0, 0, 0]).double()
    assert mean_and_error(gaps, prompts)[0] == 0.25
    assert math.isnan(mean_and_error(torch.full((2,), math.nan), prompts[:2])[0])
    assert math.isnan(mean_and_error(values[:3], prompts[:3])[1])
