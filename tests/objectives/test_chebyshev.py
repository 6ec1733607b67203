"""Chebyshev: the shortfalls, who gets the weight, and what it remembers."""

from __future__ import annotations

import io
import math

import pytest
import torch

from moa_diffusion.objectives.chebyshev import Chebyshev, smooth_max
from moa_diffusion.types import ObjectiveStats, RewardMatrix

# Numbers are float64. Where a test gives no tolerance it takes the defaults of pytest (1e-6) and
# torch (1e-7): what is expected is often written in float32, which rounds by 6e-8.
NAMES = ("a", "b")
NAN = math.nan


def stats(values: list[list[float]], step: int = 0) -> ObjectiveStats:
    """Groups of two; advantages are not looked at."""
    rewards = torch.tensor(values, dtype=torch.float64)
    matrix = RewardMatrix(
        names=NAMES,
        values=rewards,
        groups=torch.arange(rewards.shape[1]) // 2,
        prompts=("p",) * rewards.shape[1],
    )
    return ObjectiveStats(step=step, rewards=matrix, advantages=torch.zeros_like(rewards))


def around(a: float, b: float) -> ObjectiveStats:
    """Means a and b, spreads 1 and 10."""
    return stats([[a - 1, a + 1] * 2, [b - 10, b + 10] * 2])


def expected(d: list[float], temperature: float = 0.1, rho: float = 0.05) -> torch.Tensor:
    return (torch.tensor(d).double() / temperature).softmax(0) + rho


def test_the_first_rollout_weighs_all_alike():
    weighting = Chebyshev(NAMES)
    torch.testing.assert_close(weighting(around(3, 700)), torch.full((2,), 0.55).double())
    assert weighting.report() == {"shortfall/a": 1.0, "shortfall/b": 1.0}


def test_the_objective_that_lags_gets_the_weight():
    weighting = Chebyshev(NAMES, decay=0.5)
    weighting(around(3, 700))
    weights = weighting(around(4, 702))  # a: half of one spread; b: a tenth of one
    torch.testing.assert_close(weights, expected([0.5, 0.9]))
    assert weighting.report() == pytest.approx({"shortfall/a": 0.5, "shortfall/b": 0.9})


def test_given_base_and_ideal():
    weighting = Chebyshev(NAMES, base={"a": 0.0, "b": 0.0}, ideal={"a": 10.0, "b": 1000.0})
    torch.testing.assert_close(weighting(around(5, 200)), expected([0.5, 0.8]))
    half = Chebyshev(NAMES, base={"a": 2.0})  # the ideal is one spread above: 3
    torch.testing.assert_close(half(around(2.75, 200)), expected([0.25, 1.0]))


def test_importance_temperature_and_rho():
    weighting = Chebyshev(NAMES, weights=[1, 2], temperature=1.0, rho=0.0)
    torch.testing.assert_close(weighting(around(0, 0)), expected([1, 2], temperature=1.0, rho=0.0))
    sharp = Chebyshev(NAMES, weights=[1, 2], temperature=1e-3)
    torch.testing.assert_close(sharp(around(0, 0)), torch.tensor([0.05, 1.05]).double())


def test_base_and_ideal_are_those_of_the_start():
    weighting = Chebyshev(NAMES, decay=0.0)
    weighting(around(0, 0))
    weighting(stats([[100.0, 300.0], [0.0, 1.0]]))
    assert weighting.running_level.start.tolist() == [0, 0]
    assert weighting.spread.tolist() == [1, 10]
    assert weighting.average.tolist() == [200, 0.5]


def test_an_objective_without_a_known_shortfall_is_left_out_until_it_has_one():
    weighting = Chebyshev(NAMES, decay=0.0)
    weights = weighting(stats([[0.0, 2.0], [NAN, NAN]]))
    torch.testing.assert_close(weights, torch.tensor([1.05, 0.05]).double())
    assert weighting.report() == {"shortfall/a": 1.0}
    weights = weighting(stats([[0.0, 2.0], [5.0, 5.0]]))  # seen, but without a spread
    torch.testing.assert_close(weights, torch.tensor([1.05, 0.05]).double())
    weights = weighting(stats([[0.0, 2.0], [5.0, 7.0]]))  # base 5, ideal 6, mean 6
    torch.testing.assert_close(weights, expected([1.0, 0.0]))


def test_a_linear_trade_off_is_balanced():
    """Rewards (x, 1 - 3 x): the weights' pull changes sign where the shortfalls are equal."""
    options = {"base": {"a": -1.0, "b": -1.0}, "ideal": {"a": 1.0, "b": 1.0}}
    weighting, x = Chebyshev(NAMES, **options, decay=0.0, temperature=0.01), 1.0
    for _ in range(400):
        w = weighting(stats([[x, x], [1 - 3 * x, 1 - 3 * x]]))
        x += 0.002 * float(w[0] - 3 * w[1])
    # x = 1/4; equal weights would leave for -1. Where w_a = 3 w_b the shortfalls still differ, by
    # 0.01 log(0.775 / 0.225), and so the rewards by 0.025: twice that.
    assert x == pytest.approx(1 - 3 * x, abs=0.05)


def test_a_resumed_run_uses_its_own_settings_and_the_saved_measurements():
    before = Chebyshev(NAMES, ideal={"a": 50.0})
    before(around(3, 700))
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    resumed = Chebyshev(NAMES, ideal={"a": 80.0}, decay=0.0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    weights = resumed(around(80, 700))
    torch.testing.assert_close(weights, expected([0.0, 1.0]))


def test_smooth_max():
    d = torch.tensor([1.0, NAN, 1.0]).double()
    assert smooth_max(d, 0.1).tolist() == [0.5, 0, 0.5]
    assert smooth_max(torch.full((4,), NAN), 0.1).tolist() == [0.25] * 4
    assert smooth_max(torch.tensor([1e9, -1e9]), 1e-6).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"`decay` should be in \[0, 1\). Found 1"),
        ({"temperature": 0.0}, "`temperature` should be positive. Found 0"),
        ({"rho": -0.1}, "`rho` should be finite and at least 0. Found -0.1"),
        ({"weights": [1.0]}, r"`weights` should have a positive finite entry .* Found \[1.0\]"),
        ({"weights": [1.0, 0.0]}, "`weights` should have a positive finite entry"),
        ({"base": {"x": 0.0}}, "`base` should name objectives .* Found 'x'"),
        ({"ideal": {"bb": 0.0}}, "Found 'bb'. Did you mean 'b'"),
        ({"ideal": {"a": NAN}}, "`ideal` should give 'a' a finite number. Found nan"),
        ({"base": {"a": 2.0}, "ideal": {"a": 2.0}}, "`ideal` should be above `base`.* 2.0 <= 2.0"),
    ],
)
def test_bad_parameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Chebyshev(NAMES, **options)


def test_an_ideal_that_the_first_rollout_has_already_reached():
    with pytest.raises(ValueError, match=r"`ideal` should be above `base`.* 2.0 <= 3.0 for a"):
        Chebyshev(NAMES, ideal={"a": 2.0})(around(3, 700))
