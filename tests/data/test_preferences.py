"""Win rates in numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moa_diffusion.data.preferences import win_rates_of_pairs, win_rates_of_scores

NAN = math.nan


def close(found: torch.Tensor, expected: Any) -> None:
    """Float64 from end to end: torch's default of 1e-7, and pytest's, are far above rounding."""
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_win_rates_of_pairs_count_what_was_compared():
    pairs = [(0, 1), (0, 2), (2, 1)]
    close(win_rates_of_pairs(pairs, 4), [1.0, 0.0, 0.5, NAN])
    close(win_rates_of_pairs(pairs, 4, smoothing=1.0), [3 / 4, 1 / 4, 0.5, NAN])
    close(win_rates_of_pairs([], 2), [NAN, NAN])


def test_a_complete_tournament_averages_one_half():
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [(order[i], order[j]) for i in range(6) for j in range(i + 1, 6)]
    # Float64, here and below: pytest's default is 1e-6.
    assert float(win_rates_of_pairs(pairs, 6).mean()) == pytest.approx(0.5)
    assert float(win_rates_of_pairs(pairs, 6, smoothing=2.0).mean()) == pytest.approx(0.5)


def test_win_rates_of_scores_are_mean_probabilities():
    def wins(gap: float) -> float:
        return 1 / (1 + math.exp(-gap / 2))

    found = win_rates_of_scores(torch.tensor([1.0, NAN, 3.0, 0.0]), 2.0)
    close(
        found,
        [(wins(-2) + wins(1)) / 2, NAN, (wins(2) + wins(3)) / 2, (wins(-1) + wins(-3)) / 2],
    )
    assert float(found.nanmean()) == pytest.approx(0.5)
    close(win_rates_of_scores(torch.tensor([1.0, 3.0, 1.0]), 0.0), [0.25, 1.0, 0.25])
    close(win_rates_of_scores(torch.tensor([5.0, NAN]), 1.0), [NAN, NAN])


def test_smoothing_narrows_what_single_labels_do_to_the_tilt():
    """Mean weight over labels against the weight of the probability: the docstring's numbers."""
    p, tau = torch.linspace(0.05, 0.95, 10).double(), 0.2

    def bias(smoothing: float) -> float:
        """Log of the factor by which the ratio of two responses' weights is off at most."""
        won, lost = win_rates_of_pairs([(0, 1)], 2, smoothing).tolist()
        scale = won - lost  # what is left of a label
        mean = (p * math.exp(won / tau) + (1 - p) * math.exp(lost / tau)).log()
        true = scale * p / tau
        gap = mean - true
        return float(gap.max() - gap.min())

    assert bias(0.0) > 2 * bias(1.0) > 4 * bias(4.0)
    plain = p * math.exp(1 / tau) + (1 - p)
    torch.testing.assert_close(plain, 1 + (math.exp(1 / tau) - 1) * p)
