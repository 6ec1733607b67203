"""What a rollout says about its objectives, in numbers."""

from __future__ import annotations

import math

import pytest
import torch

from moa_diffusion.objectives.metrics import cosine_metrics, reward_metrics
from two_rewards import NAN, matrix


def test_reward_metrics_in_numbers():
    rewards = matrix([[0.0, 2.0, 5.0, 5.0], [NAN, 1.0, NAN, NAN]])
    advantages = torch.tensor([[-1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]).double()
    found = reward_metrics(rewards, advantages, torch.tensor([1.0, -3.0]).double())
    expected = {
        "reward_mean/a": 3.0,
        "reward_std/a": math.sqrt((9 + 1 + 4 + 4) / 4),
        "weight/a": 0.25,
        "share/a": 1.0,
        "zero_variance/a": 0.5,
        "applies/a": 1.0,
        "reward_mean/b": 1.0,
        "reward_std/b": 0.0,
        "weight/b": -0.75,
        "share/b": 0.0,
        "zero_variance/b": 1.0,
        "applies/b": 0.25,
        "correlation/a~b": NAN,
    }
    # Float64 up to the file; pytest's default is 1e-6.
    assert found == pytest.approx(expected, nan_ok=True)
    per_sample = torch.tensor([[1.0] * 4, [-3.0] * 4]).double()
    again = reward_metrics(rewards, advantages, per_sample)
    assert again == pytest.approx(expected, nan_ok=True)


def test_pairs_of_objectives():
    """Correlations of advantages where both apply; cosines of gradients."""
    rewards = matrix([[0.0, 2.0, 5.0, 1.0], [3.0, 1.0, -7.0, NAN]])
    advantages = torch.tensor([[1.0, 2.0, 4.0, 9.0], [3.0, 2.0, 0.0, 0.0]]).double()
    found = reward_metrics(rewards, advantages, torch.ones(2).double())
    assert found["correlation/a~b"] == pytest.approx(-1)  # float64, as below
    gramian = torch.tensor([[4.0, -3.0, 0.0], [-3.0, 9.0, 0.0], [0.0, 0.0, 0.0]]).double()
    cosines = cosine_metrics(("a", "b", "c"), gramian)
    expected = {"cosine/a~b": -0.5, "cosine/a~c": NAN, "cosine/b~c": NAN}
    assert cosines == pytest.approx(expected, nan_ok=True)


def test_reward_metrics_of_an_objective_that_never_applies():
    rewards = matrix([[0.0, 2.0], [NAN, NAN]])
    found = reward_metrics(rewards, torch.zeros(2, 2).double(), torch.ones(2).double())
    assert found["applies/b"] == 0
    for group in ("reward_mean", "reward_std", "zero_variance"):
        assert math.isnan(found[f"{group}/b"])
    assert found["share/a"] == found["share/b"] == 0
