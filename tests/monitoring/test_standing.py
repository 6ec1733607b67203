"""Gains in words have the numbers of metrics and of evaluations, and intervals over prompts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moa_diffusion.monitoring.standing import Standing, standings
from moa_diffusion.report.summary import summarise
from moa_diffusion.report.table import Column, Table
from moa_diffusion.statistics.groups import mean_and_error, spread_within

PROMPTS, SEEDS = 6, 4


def stand(start: Tensor, latest: Tensor, *, trained: tuple[str, ...] = ("a",)) -> list[Standing]:
    """Rewards ``[K, P, S]`` as an evaluation has them."""
    owner = torch.arange(start.shape[1]).repeat_interleave(start.shape[2])
    flat = start.flatten(1)
    return list(
        standings(
            ("a", "b")[: len(start)],
            trained,
            base=flat.nanmean(1),
            unit=spread_within(flat, owner),
            start=flat,
            latest=latest.flatten(1),
            prompts=owner,
        )
    )


def rewards(seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(2, PROMPTS, SEEDS, generator=draws, dtype=torch.float64)


def test_a_standing_says_what_scripts_evaluate_says() -> None:
    start, latest = rewards(0), rewards(0) + 0.3 * rewards(1) + 0.5
    columns = tuple(
        Column(label=str(e), series="", step=e, weights=None, model_digest="", adapter_digest="")
        for e in range(2)
    )
    table = Table(
        models=columns,
        prompts=tuple(f"prompt {p}" for p in range(PROMPTS)),
        seeds=tuple(range(SEEDS)),
        rewards=("a", "b"),
        values=torch.stack([start, latest]).numpy(),
        images=None,
        texts=None,
        units={"a": "", "b": ""},
        scorers={},
        sampler={},
    )
    (base, now) = summarise(table).models
    for one in stand(start, latest):
        said = now.rewards[one.name]
        assert one.base == pytest.approx(base.rewards[one.name].mean.value)
        assert one.now == pytest.approx(said.mean.value)
        assert one.gain == pytest.approx(said.gain_in_stds.value)
        assert (one.interval.low, one.interval.high) == pytest.approx(
            (said.gain_in_stds.low, said.gain_in_stds.high)
        )
        assert one.trained == (one.name == "a")


def test_the_error_is_that_of_paired_differences() -> None:
    start = rewards(0)
    (one, _) = stand(start, start + 0.5)
    assert one.error == pytest.approx(0, abs=1e-12)  # the same for every sample
    (one, _) = stand(start, start + rewards(1))
    owner = torch.arange(PROMPTS).repeat_interleave(SEEDS)
    unit = float(spread_within(start.flatten(1), owner)[0])
    assert one.error == pytest.approx(mean_and_error(rewards(1)[0].flatten(), owner)[1] / unit)


@pytest.mark.parametrize("spread", ["one sample", "none"])
def test_without_a_spread_there_is_no_gain(spread: str) -> None:
    start = rewards(0)[:, :, :1] if spread == "one sample" else torch.ones(2, PROMPTS, SEEDS)
    (one, _) = stand(start.double(), start.double() + 1)
    assert one.now == pytest.approx(one.base + 1)
    assert math.isnan(one.gain)
    assert math.isnan(one.error)


def test_before_an_evaluation_nothing_is_known() -> None:
    nothing = torch.full((1, PROMPTS, SEEDS), math.nan, dtype=torch.float64)
    (one,) = stand(nothing, nothing)
    numbers = (one.base, one.now, one.gain, one.error, one.interval.low)
    assert all(math.isnan(number) for number in numbers)
