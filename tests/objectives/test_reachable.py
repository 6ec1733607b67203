"""Bounds that cannot be kept are found out: pessimistic ones, and those that exclude each other."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from moa_diffusion.objectives.mopo_offline import OfflineMopo, OfflineSettings
from moa_diffusion.objectives.reachable import check_bounds

NAN = math.nan


def single_labels(eps: float, *, bound: float = 0.5, **settings: float) -> OfflineMopo:
    """Pairs with one label each, and no prompt that both objectives were compared on."""
    rates = torch.full((2, 40, 2), NAN, dtype=torch.float64)
    rates[0, :20] = rates[1, 20:] = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
    return make(rates, [bound], OfflineSettings(eps=eps, **settings))  # type: ignore[arg-type]


def make(rates: Tensor, bounds: list[float], settings: OfflineSettings) -> OfflineMopo:
    responses = rates.shape[2]
    return OfflineMopo(
        primary="a",
        secondary=("b", "c", "d")[: len(rates) - 1],
        pbar=rates[0],
        qbar=rates[1:],
        log_data=torch.full(rates.shape[1:], -math.log(responses), dtype=torch.float64),
        bounds=bounds,
        settings=settings,
    )


def test_a_pessimistic_bound_can_be_out_of_any_multipliers_reach() -> None:
    """The largest level lies at a multiplier in between; at the largest one it is .31."""
    message = (
        r"`bounds` should be within reach .* Found 0\.5 for `b`; .* up to 10 reach is 0\.411\d? in "
        r"the worst case within `eps` = 0\.15\. Lower the bounds, or `eps` .* `preferences\.smooth"
    )
    with pytest.raises(ValueError, match=message):
        check_bounds(single_labels(0.15))
    mopo = single_labels(0.15)
    assert mopo.level_at(mopo.tilted(torch.tensor([10.0]).double()), 1, eps=0.15) < 0.32
    check_bounds(single_labels(0.01))
    check_bounds(single_labels(0.0))


def test_reach_ends_where_the_dual_settles_at_its_cap() -> None:
    settings = {"maximum": 2.0, "eta": 1.0}
    with pytest.raises(ValueError, match="within reach") as caught:
        check_bounds(single_labels(0.05, bound=1.0, **settings))
    (said,) = re.findall(r"reach is (0\.\d+) in", str(caught.value))
    for bound, kept in ((float(said) - 0.01, True), (float(said) + 0.01, False)):
        mopo = single_labels(0.05, bound=bound, **settings)
        for _ in range(250):  # 200 steps at a violation of .01 lead to the cap
            mopo()
        assert (float(mopo.lambdas) < 2) == kept
        if kept:
            # What 250 steps leave: 1.4e-4. From `said`, of three digits, it is 0.01.
            assert float(mopo.level) == pytest.approx(bound, abs=1e-3)
            check_bounds(mopo)


def test_bounds_that_exclude_each_other_are_named() -> None:
    """Each can be .8 by itself, and their mean never above .5."""
    b = torch.tensor([[0.9, 0.5, 0.1]] * 3, dtype=torch.float64)
    other = torch.full((3, 3), 0.5, dtype=torch.float64)
    rates = torch.stack([other, b, 1 - b, other])
    settings = OfflineSettings()
    check_bounds(make(rates, [0.8, 0.0, 0.0], settings))
    check_bounds(make(rates, [0.0, 0.8, 0.4], settings))
    check_bounds(make(rates, [0.6, 0.39, 0.4], settings))
    both = r"Found 0\.6 for `b` and 0\.7 for `c`, which exclude each other: they ask 0\.6\d+ of"
    for reference_known in (True, False):
        with pytest.raises(ValueError, match=both):
            check_bounds(make(rates, [0.6, 0.7, 0.4], settings), reference_known=reference_known)


def test_what_no_reference_can_keep_is_known_without_one() -> None:
    rates = torch.tensor([[[0.5, 0.5]], [[0.7, 0.3]]]).double()
    with pytest.raises(ValueError, match=r"Found 0\.8 for `b`; .* reach is 0\.7\."):
        check_bounds(make(rates, [0.8], OfflineSettings()), reference_known=False)
    check_bounds(make(rates, [0.69], OfflineSettings()), reference_known=False)


def test_an_objective_of_which_nothing_is_known_is_not_out_of_reach() -> None:
    mopo = make(torch.rand(3, 2, 3).double(), [0.1, 0.2], OfflineSettings(eps=0.01))
    mopo.log_ref[:] = NAN
    check_bounds(mopo)
    assert mopo().isnan().all()
    assert mopo.level.isnan().all()
