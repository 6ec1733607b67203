"""What a rollout's rewards, advantages, weights and gradients look like in numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moa_diffusion.objectives.base import variance_share
from moa_diffusion.statistics.groups import zero_variance_fraction
from moa_diffusion.types import RewardMatrix


def reward_metrics(
    rewards: RewardMatrix,
    advantages: Tensor,
    weights: Tensor,
    credit: RewardMatrix | None = None,
) -> dict[str, float]:
    """Return what one rollout says about each objective; NaN where nothing applies.

    Args:
        rewards: Raw rewards ``[K, N]``.
        advantages: Advantages ``[K, N]``, after stage 1; or ``[K, D]`` if decisions have their own.
        weights: The objectives' weights, ``[K]``, ``[K, N]`` or ``[K, D]``.
        credit: What the advantages are computed from, if not from the rewards: ``[K, D]``.
    """
    applies = ~torch.isnan(rewards.values)
    known = ~torch.isnan((credit or rewards).values)
    mean_weight = weights if weights.ndim == 1 else weights.mean(1)
    columns = {
        "weight": mean_weight / mean_weight.abs().sum(),
        "share": variance_share(advantages, weights, known),
        "zero_variance": zero_variance_fraction(rewards),
        "applies": applies.double().mean(1),
    }
    metrics: dict[str, float] = {}
    for k, name in enumerate(rewards.names):
        values = rewards.values[k][applies[k]]
        deviation = float(values.std(correction=0)) if len(values) else math.nan
        metrics |= {f"reward_mean/{name}": float(values.mean()), f"reward_std/{name}": deviation}
        metrics |= {f"{group}/{name}": float(column[k]) for group, column in columns.items()}
    for i, j in itertools.combinations(range(len(rewards.names)), 2):
        both = known[i] & known[j]
        value = _correlation(advantages[i, both], advantages[j, both])
        metrics[f"correlation/{rewards.names[i]}~{rewards.names[j]}"] = value
    return metrics


def cosine_metrics(names: Sequence[str], gramian: Tensor) -> dict[str, float]:
    """Return ``cosine/<a>~<b>`` of every pair of objectives' gradients; NaN where one is zero.

    Args:
        names: Names of the K objectives.
        gramian: Gramian ``[K, K]`` of the objectives' gradients.
    """
    lengths = gramian.diagonal().sqrt()
    return {
        f"cosine/{names[i]}~{names[j]}": float(gramian[i, j] / (lengths[i] * lengths[j]))
        for i, j in itertools.combinations(range(len(names)), 2)
    }


def _correlation(x: Tensor, y: Tensor) -> float:
    """Return Pearson's correlation of two ``[n]``; NaN where one does not vary."""
    if len(x) < 2:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x.norm() * y.norm()))
