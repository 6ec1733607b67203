"""Static weights are those of the configuration."""

from __future__ import annotations

import math

import pytest

from moa_diffusion.objectives.static import Static
from objective_stats import NAMES, rewards_at, stats


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
