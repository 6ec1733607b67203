"""The two contracts between K rewards and one advantage, and how weights are applied.

A *normalizer* has two moments: each objective on its own (before weighting), and the weighted sum
(after). A *weighting* sees only ``ObjectiveStats`` and answers with weights, once per rollout.
Both keep whatever they remember in buffers (or extra state), which checkpoints save.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import isfinite, nan

import torch
from torch import Tensor, nn

from moa_diffusion.types import ObjectiveStats, RewardMatrix
from rewards.suggestions import did_you_mean


class Normalizer(nn.Module, ABC):
    """Puts rewards of different units onto one scale.

    Args:
        objectives: Names of the K objectives, in the order of the matrix's rows.
    """

    reference_samples: int = 0  # outputs of the reference wanted per prompt, see `remember`

    def __init__(self, objectives: Sequence[str]) -> None:
        super().__init__()
        self.objectives = tuple(objectives)

    def unknown(self, prompts: Sequence[str]) -> list[str]:
        """Return the distinct prompts, in order, whose reference rewards are not known yet.

        Empty for a normalizer that wants no reference samples.
        """
        return []

    def remember(self, prompts: Sequence[str], rewards: Tensor) -> None:
        """Keep the raw rewards of reference outputs; they are part of the saved state.

        Args:
            prompts: P distinct prompts.
            rewards: Raw rewards ``[P, K, reference_samples]`` float64, NaN where an objective does
                not apply.
        """
        raise RuntimeError(f"{type(self).__name__} compares with no reference.")

    def win_rates(self, rewards: RewardMatrix) -> Tensor | None:
        """Return shares of the reference's rewards that each beats, ``[K, N]``; None without one.

        NaN where an objective does not apply.
        """
        return None

    @abstractmethod
    def per_objective(self, rewards: RewardMatrix) -> Tensor:
        """Do stage 1: return advantages ``[K, N]`` float64, exactly 0 where the reward is NaN."""

    @abstractmethod
    def combined(self, advantage: Tensor, rewards: RewardMatrix) -> Tensor:
        """Do stage 2: return the weighted mean ``advantage [N]`` of each sample, normalized.

        Exactly 0 for a sample to which nothing applies, or whose group has no spread.
        """

    def kl_scale(self) -> float:
        """Return the factor of the KL's weight since the last call of ``combined``.

        It is 1, unless the two stages keep the reward's unit up to one number, which then has to
        scale the KL as well.
        """
        return 1.0


class Weighting(nn.Module, ABC):
    """Decides how much each objective counts.

    Args:
        objectives: Names of the K objectives, in the order of the matrix's rows.
    """

    needs_gramian: bool = False  # whether ``stats.gramian`` has to be measured
    # Whether weights may be solved anew at every optimizer step, on that step's own Gramian: only
    # where they depend on nothing else and nothing is remembered.
    from_gramian_alone: bool = False

    def __init__(self, objectives: Sequence[str]) -> None:
        super().__init__()
        self.objectives = tuple(objectives)

    @abstractmethod
    def forward(self, stats: ObjectiveStats) -> Tensor:
        """Return weights ``[K]``, or ``[K, N]`` if each sample has its own; float64, finite."""

    def report(self) -> dict[str, float]:
        """Return what the last call found, for the metrics: ``group/objective`` to a number."""
        return {}

    def headline(self) -> str:
        """Return a few words about the last call for the progress bar; empty for nothing to say."""
        return ""

    def kl_scale(self) -> float:
        """Return the factor of the KL's weight since the last call; 1 unless a method moves it."""
        return 1.0


def by_name(
    parameter: str, values: Mapping[str, float] | None, objectives: Sequence[str]
) -> Tensor:
    """Return numbers given by objective's name in the objectives' order: ``[K]``, NaN for none.

    Args:
        parameter: The parameter's name, for messages.
        values: Numbers by objective; None for none.
        objectives: Names of the K objectives.

    Raises:
        ValueError: Naming the parameter, for an unknown objective or a value that is not finite.
    """
    for name, value in (values or {}).items():
        if name not in objectives:
            raise ValueError(
                f"Parameter `{parameter}` should name objectives of {list(objectives)}. "
                f"Found {name!r}.{did_you_mean(name, objectives)}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise ValueError(
                f"Parameter `{parameter}` should give {name!r} a finite number. Found {value!r}."
            )
    given = [(values or {}).get(name, nan) for name in objectives]
    return torch.tensor(given, dtype=torch.float64)


def effective_weights(weights: Tensor, applies: Tensor) -> Tensor:
    """Return each sample's weights over the objectives that apply to it, with absolute sum 1.

    Dividing by the absolute sum lets methods be compared at the same step size.

    Args:
        weights: The objectives' weights, ``[K]`` or ``[K, N]``.
        applies: Whether the objective applies to the sample: ``[K, N]`` bool.

    Returns:
        ``[K, N]``; zeros for a sample to which no objective with a weight applies.
    """
    weights = (weights[:, None] if weights.ndim == 1 else weights) * applies  # [K, N]
    total = weights.abs().sum(0)  # [N]
    return weights / torch.where(total > 0, total, 1)


def combine(advantages: Tensor, weights: Tensor, applies: Tensor) -> Tensor:
    """Return the weighted mean of the objectives that apply to each sample: ``[N]``.

    Args:
        advantages: Advantages ``[K, N]``, 0 where the objective does not apply.
        weights: The objectives' weights, ``[K]`` or ``[K, N]``.
        applies: Whether the objective applies to the sample: ``[K, N]`` bool.
    """
    return (effective_weights(weights, applies) * advantages).sum(0)


def variance_share(advantages: Tensor, weights: Tensor, applies: Tensor) -> Tensor:
    """Return each objective's share of the variance of ``combine``: what decides the gradient.

    With constant weights that is ``w_k (Cov(z) w)_k / (w' Cov(z) w)``. The shares sum to 1; one
    may be negative (an objective that the others oppose). One near 1 is "variance hijacking".

    Args:
        advantages: Advantages ``[K, N]``, after stage 1.
        weights: The objectives' weights, ``[K]`` or ``[K, N]``.
        applies: Whether the objective applies to the sample: ``[K, N]`` bool.

    Returns:
        ``[K]``; zeros if the sum does not vary.
    """
    weighted = effective_weights(weights, applies) * advantages  # [K, N]
    centred = weighted - weighted.mean(1, keepdim=True)
    parts = centred @ centred.sum(0)  # [K]
    total = parts.sum()
    return parts / total if total > 0 else torch.zeros_like(parts)
