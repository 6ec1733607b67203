"""Bootstrap intervals: coverage of a known mean, and what NaN and few units do."""

from __future__ import annotations

import math

import numpy
import pytest

from moa_diffusion.statistics.bootstrap import (
    LEVEL,
    Estimate,
    estimate,
    estimate_one,
    prompt_sums,
    resample,
    resampled_means,
)


def test_resamples_hold_as_many_units_and_depend_on_the_seed():
    draws = resample(7, resamples=50, seed=3)
    assert draws.shape == (50, 7)
    assert (draws.sum(1) == 7).all()
    assert (draws == resample(7, resamples=50, seed=3)).all()
    assert (draws != resample(7, resamples=50, seed=4)).any()


def test_means_of_all_prompts_are_those_of_the_samples():
    values = numpy.array([[[1.0, 2.0, math.nan, 6.0], [math.nan] * 4]])  # [E=1, K=2, M=4]
    sums, counts = prompt_sums(values, numpy.array([5, 5, 9, 9]))
    assert sums.tolist() == [[[3.0, 6.0], [0.0, 0.0]]]
    assert counts.tolist() == [[[2.0, 1.0], [0.0, 0.0]]]
    means = resampled_means(sums, counts, numpy.array([[1.0, 1.0], [2.0, 0.0]]))  # [B, E, K]
    assert means[:, 0, 0].tolist() == [3.0, 1.5]
    assert numpy.isnan(means[:, 0, 1]).all(), "a reward that applies to nothing has no mean"


def test_an_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = numpy.random.default_rng(0)
    draws = resample(40, resamples=400, seed=1)
    covered = 0
    for _ in range(200):
        values = generator.normal(size=(1, 1, 40))
        resampled = resampled_means(*prompt_sums(values, numpy.arange(40)), draws)[:, 0, 0]
        one = estimate_one(float(values.mean()), resampled)
        assert one.low <= one.value <= one.high
        covered += one.low < 0 < one.high
    # The share of 200 has a deviation of 0.015, and percentiles of 40 values cover 0.01 too little.
    assert covered / 200 == pytest.approx(LEVEL, abs=0.05)


def test_runs_add_their_own_spread():
    """Two runs that differ by 2, each known exactly: the interval is from one to the other."""
    own = numpy.array([0.0, 2.0])
    resampled = numpy.repeat(own[:, None], 500, axis=1)  # [R, B]
    one = estimate(own, resampled, resample(2, resamples=500, seed=0))
    assert (one.value, one.low, one.high) == (1.0, 0.0, 2.0)


def test_nothing_known_is_a_dash():
    assert estimate_one(math.nan, numpy.full(9, math.nan)).text(".2f") == "-"
    assert Estimate(value=1.0, low=-0.5, high=2.0).text("+.1f") == "+1.0 [-0.5, +2.0]"
