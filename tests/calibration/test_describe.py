"""Calibration: statistics that are known by construction, and the file that keeps them."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from calibrations import NAN, calibrated, matrix, normal
from moa_diffusion.calibration.describe import advantage_shares, correlations
from moa_diffusion.objectives.base import variance_share
from moa_diffusion.objectives.normalize import GDPO, DualStage, Raw
from moa_diffusion.storage.calibration_file import load, save
from moa_diffusion.types import RewardMatrix

SHARES = ("share_static", "share_gdpo", "share_dual_stage")


# Numbers are float64, and some of what is expected float32, rounded by 6e-8: pytest's default is
# 1e-6. Where samples are drawn the comment gives the standard error over seeds.


def test_a_small_case_by_hand():
    found = calibrated(matrix([[0, 2, 5, 7, 4, 4]], size=2))
    assert (found.model, found.prompts, found.images, found.seed) == ("tiny", 3, 2, 3)
    a = found.objectives["a"]
    assert a.mean == pytest.approx(22 / 6)
    # Squared deviations inside the groups: 1 + 1, 1 + 1, 0 + 0, with one degree of freedom each.
    assert a.std_within == pytest.approx(math.sqrt(4 / 3))
    # Group means 1, 6, 4: variance 19 / 3, of which 4 / 3 / 2 is noise of a mean of two.
    assert a.std_between == pytest.approx(math.sqrt(19 / 3 - 2 / 3))
    assert a.std_total == pytest.approx(float(torch.tensor([0.0, 2, 5, 7, 4, 4]).std()))
    assert (a.min, a.max, a.at_min, a.at_max) == (0, 7, pytest.approx(1 / 6), pytest.approx(1 / 6))
    assert (a.applies, a.zero_variance) == (1, pytest.approx(1 / 3))
    assert (a.retest_std, a.milliseconds) == (0, 2)
    assert (a.base, a.target, a.bound) == (a.mean, a.mean + a.std_within, 0.5)


@pytest.mark.parametrize("size", [2, 8])
def test_spreads_within_and_between_are_recovered_for_any_group_size(size: int):
    prompts = 4000
    between = 3 * normal(prompts, seed=1).repeat_interleave(size)
    within = 0.5 * normal(prompts * size, seed=2)
    a = calibrated(matrix((10 + between + within)[None], size)).objectives["a"]
    # 3 / sqrt(4000) = 0.05, and 1 / sqrt(2 * 4000) = 1.1 % of spreads: about three of them each.
    assert a.mean == pytest.approx(10, abs=0.15)
    assert a.std_within == pytest.approx(0.5, rel=0.03)
    assert a.std_between == pytest.approx(3, rel=0.03)
    assert a.std_total == pytest.approx(math.sqrt(9.25), rel=0.03)


def test_noise_alone_is_no_spread_between_prompts():
    a = calibrated(matrix(normal(1, 4000), 4)).objectives["a"]
    assert a.std_within == pytest.approx(1, rel=0.03)  # 3000 degrees of freedom: 1.3 %
    assert a.std_between < 0.1  # 0.02; its square is 0 to 0.01. The group means alone have 0.5


def test_uneven_groups_are_unbiased():
    """Mean over many draws of the variance between prompts, with NaN in half of each group."""
    found = []
    for seed in range(300):
        values = normal(40, seed=seed) + 2 * normal(10, seed=1000 + seed).repeat_interleave(4)
        values[[0, 1, 2, 6, 8, 9, 20, 21, 22]] = NAN
        found.append(calibrated(matrix(values[None])).objectives["a"].std_between ** 2)
    # Ten prompts know their variance to a half, 300 times ten to 3 %: three of them.
    assert sum(found) / len(found) == pytest.approx(4, rel=0.1)


def test_nan_stays_out():
    values = normal(2, 16)
    values[1, 4:] = NAN
    values[1, 0] = NAN
    found = calibrated(matrix(values)).objectives
    rest = values[1, 1:4]
    assert found["a"].applies == 1
    assert found["b"].applies == 0.25
    assert found["b"].mean == pytest.approx(float(rest.mean()))
    assert found["b"].std_within == pytest.approx(float(rest.std()))
    assert math.isnan(found["b"].std_between)  # one prompt
    assert found["b"].max == float(rest.max())


def test_an_objective_that_applies_to_nothing_is_not_known():
    values = normal(2, 16)
    values[1] = NAN
    found = calibrated(matrix(values))
    b = asdict(found.objectives["b"])
    known = {"applies", "milliseconds", "bound", *SHARES}
    assert {key for key, value in b.items() if not math.isnan(value)} == known
    assert b["applies"] == 0
    assert [b[share] for share in SHARES] == [0, 0, 0]
    assert [found.objectives["a"].share_static, found.hijacker()] == [1, None]
    assert math.isnan(found.correlations[0][1])


def test_saturation_counts_the_samples_at_each_end():
    a = calibrated(matrix([[0, 0, 0.3, 1, 1, 1, 1, 0.5]])).objectives["a"]
    assert (a.min, a.at_min, a.max, a.at_max) == (0, 0.25, 1, 0.5)


def test_a_constant_varies_by_exactly_zero():
    values = torch.full((1, 16), 0.1, dtype=torch.float64)
    values[0, ::3] *= 1 + 2**-52
    a = calibrated(matrix(values)).objectives["a"]
    assert (a.std_total, a.std_within, a.std_between, a.zero_variance) == (0, 0, 0, 1)
    assert a.target == a.base
    assert math.isnan(calibrated(matrix(values)).correlations[0][0])


def test_groups_of_one_have_no_spread_to_measure():
    a = calibrated(matrix(normal(1, 8), size=1)).objectives["a"]
    assert math.isnan(a.std_within)
    assert math.isnan(a.std_between)
    assert math.isnan(a.target)


def test_retest_noise_is_that_of_one_score():
    truth = 5 * normal(1, 20000)
    first, second = (truth + 0.2 * normal(1, 20000, seed=seed) for seed in (1, 2))
    second[0, :7] = NAN
    a = calibrated(matrix(first), retest=second + 1).objectives["a"]  # a drift is not noise
    assert a.retest_std == pytest.approx(0.2, rel=0.03)  # 20,000 differences: 0.5 %


def test_correlations_are_those_within_groups():
    inside, prompts = normal(3, 4000, seed=1), normal(1000, seed=2).repeat_interleave(4)
    # Within a prompt a and b oppose each other, across prompts they agree.
    rows = [inside[0] + 9 * prompts, -inside[0] + inside[1] + 9 * prompts, inside[2]]
    values = torch.stack([*rows, torch.ones(4000).double()])
    values[2, ::3] = NAN
    found = correlations(matrix(values))
    # (1 - r^2) / sqrt(3000) = 0.009, and 1 / sqrt(1700) = 0.025 where a third is missing.
    assert found[0, 1] == pytest.approx(-math.sqrt(0.5), abs=0.03)
    assert found[0, 2] == pytest.approx(0, abs=0.05)
    assert found[:3, :3].diagonal().tolist() == pytest.approx([1, 1, 1])
    assert torch.equal(found.nan_to_num(7), found.T.nan_to_num(7))
    assert found[3].isnan().all()


def test_correlations_of_a_pair_use_the_samples_that_both_have():
    values = normal(2, 40)
    values[1] = -2 * values[0]
    values[0, ::4], values[1, 1::8] = NAN, NAN
    assert correlations(matrix(values))[0, 1] == pytest.approx(-1)


def test_shares_are_those_that_training_reports():
    rewards = matrix(normal(3, 32) * torch.tensor([[1.0], [0.1], [5.0]]).double())
    rewards.values[1, :9] = NAN
    applies = ~rewards.values.isnan()
    weights, equal = torch.tensor([3.0, 1.0, 0.5]).double(), torch.ones(3).double()
    found = calibrated(rewards, weights=weights.tolist()).objectives.values()
    for field, normalizer, chosen in zip(
        SHARES, (Raw("abc"), GDPO("abc"), DualStage("abc")), (weights, equal, equal), strict=True
    ):
        expected = variance_share(normalizer.per_objective(rewards), chosen, applies)
        assert [getattr(row, field) for row in found] == expected.tolist()
        assert sum(expected.tolist()) == pytest.approx(1)
    assert list(advantage_shares(rewards, [1, 1, 1])) == ["static", "gdpo", "dual_stage"]


def test_the_loudest_reward_hijacks_a_raw_sum_until_its_weight_is_small():
    rewards = matrix(normal(3, 400) * torch.tensor([[1.0], [0.1], [50.0]]).double())
    assert calibrated(rewards).hijacker() == "c"
    assert calibrated(rewards, weights=[1.0, 10.0, 0.02]).hijacker() is None
    assert max(row.share_gdpo for row in calibrated(rewards).objectives.values()) < 0.5


def test_every_matrix_of_the_zoo_survives(zoo: RewardMatrix, tmp_path: Path):
    found = calibrated(zoo)
    save(found, tmp_path / "calibration.json")
    text = (tmp_path / "calibration.json").read_text()
    assert not {"NaN", "Infinity"} & set(text.replace(",", " ").split())
    again = load(tmp_path / "calibration.json", zoo.names)
    assert repr(again) == repr(found)  # as == but with NaN equal to itself
    for row in found.objectives.values():
        assert row.zero_variance <= 1 or math.isnan(row.zero_variance)
        assert not row.std_within < 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0]}, "`weights` should have one entry per objective"),
        ({"milliseconds": []}, "`milliseconds` should have one entry per objective"),
        ({"retest": torch.zeros(2, 3)}, r"`retest` should have the shape \(2, 16\)"),
    ],
)
def test_arguments_have_to_fit(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        calibrated(matrix(normal(2, 16)), **options)


def test_no_sample_is_an_error():
    with pytest.raises(ValueError, match="at least one sample"):
        calibrated(matrix(torch.zeros(2, 0)))
