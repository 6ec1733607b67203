"""Ratings read from the logits of five levels."""

from __future__ import annotations

import pytest
import torch

from rewards.heads.levels import LEVELS, rate

ONE_TO_FIVE = (5.0, 4.0, 3.0, 2.0, 1.0)
# A softmax and a sum of five terms up to 5, each rounded by float32: 2e-6. pytest's default, where
# none is given, is 5e-6 of 5.
ROUNDING = 1e-5


def test_a_rating_is_the_mean_of_what_the_levels_are_worth():
    shares = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]])
    scores = rate(shares.log() + 7.0, ONE_TO_FIVE)  # softmax does not see a constant
    assert scores.values.tolist() == pytest.approx([4.0625], abs=ROUNDING)
    assert list(scores.extra) == list(LEVELS)
    found = [scores.extra[level] for level in LEVELS]
    assert found == [pytest.approx([share], abs=ROUNDING) for share in shares[0].tolist()]


@pytest.mark.parametrize("level", range(5))
def test_a_model_that_is_sure_gives_the_worth_of_one_level(level):
    logits = torch.zeros(1, 5)
    logits[0, level] = 50.0
    assert rate(logits, ONE_TO_FIVE).values.tolist() == pytest.approx([5.0 - level])


def test_a_model_that_knows_nothing_gives_the_middle():
    assert rate(torch.zeros(3, 5), ONE_TO_FIVE).values.tolist() == pytest.approx([3.0] * 3)


def test_half_precision_is_left_before_the_softmax():
    logits = torch.tensor([[9.0, 1.0, 0.0, -1.0, -2.0]], dtype=torch.float16)
    assert torch.equal(rate(logits, ONE_TO_FIVE).values, rate(logits.float(), ONE_TO_FIVE).values)
