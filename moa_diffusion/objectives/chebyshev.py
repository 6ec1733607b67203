"""Augmented Tchebycheff scalarisation (Steuer and Choo 1983, doi:10.1007/BF02591870), smoothed.

The objective that lags most behind its aim gets the weight. With the running level ``Rbar_k`` of
reward k (``running_level.py``), each shortfall is measured on the reward's own way from ``base_k``
to ``ideal_k``::

    d_k = w_k (ideal_k - Rbar_k) / (ideal_k - base_k)
    lambda_k = softmax(d / temperature)_k + rho

Minimising ``max_k d_k`` reaches every Pareto-optimal point by some ``w``, also where the front is
concave and no weighted sum does; ``rho`` keeps points out that are only weakly optimal, and the
softmax keeps the weights from jumping (smooth Tchebycheff, arXiv 2402.19078).

Deviations: the weights are applied to advantages that the normalizer has put on one scale, so the
chain-rule factor ``w_k / (ideal_k - base_k)`` is left to it; with the default ``ideal``, one
within-group standard deviation above the start, the two agree up to ``w_k``. The exact ``max``
would need no temperature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moa_diffusion.objectives.base import Weighting, by_name
from moa_diffusion.objectives.normalize import update_ema
from moa_diffusion.objectives.running_level import MEMORY, WARMUP, RunningLevel
from moa_diffusion.statistics.groups import rms_group_std
from moa_diffusion.types import ObjectiveStats


class Chebyshev(Weighting):
    """Weights ``[K]``, largest for the objective with the largest shortfall.

    An objective without a known shortfall (never seen, or without any spread to measure an ideal
    by) is left out of the softmax.

    Args:
        objectives: Names of the K objectives.
        weights: K positive finite numbers, the importance of each shortfall; equal by default.
        base: Raw reward, by name, at which the shortfall is ``w_k``, any number; by default the
            mean of the first three rollouts.
        ideal: Raw reward, by name, at which the shortfall is 0, any number above ``base``; by
            default ``base`` plus the first within-group standard deviation (RMS) that is not 0.
        decay: Decay of the running mean, in [0, 1).
        temperature: Temperature of the softmax, in units of ``d``; positive.
        rho: Weight that every objective gets besides, at least 0.
        memory: Number of prompts, the last ones seen, over which the mean is taken, at least 1.
    """

    average: Tensor
    spread: Tensor

    def __init__(
        self,
        objectives: Sequence[str],
        *,
        weights: Sequence[float] | None = None,
        base: Mapping[str, float] | None = None,
        ideal: Mapping[str, float] | None = None,
        decay: float = 0.9,
        temperature: float = 0.1,
        rho: float = 0.05,
        memory: int = MEMORY,
    ) -> None:
        super().__init__(objectives)
        if not 0 <= decay < 1:
            raise ValueError(f"Parameter `decay` should be in [0, 1). Found {decay}.")
        if not temperature > 0:
            raise ValueError(f"Parameter `temperature` should be positive. Found {temperature}.")
        if not 0 <= rho < math.inf:
            raise ValueError(f"Parameter `rho` should be finite and at least 0. Found {rho}.")
        if memory < 1:
            raise ValueError(f"Parameter `memory` should be at least 1. Found {memory}.")
        self.decay, self.temperature, self.rho = decay, temperature, rho
        self._w = self._importance(weights)
        self._base, self._ideal = (
            by_name("base", base, self.objectives),
            by_name("ideal", ideal, self.objectives),
        )
        self._check_order(self._base)
        # NaN: not measured yet.
        unknown = torch.full((len(self.objectives),), torch.nan, dtype=torch.float64)
        self.register_buffer("average", unknown)  # Rbar_k
        self.register_buffer("spread", unknown.clone())  # first within-group spread
        self.running_level = RunningLevel(len(self.objectives), warmup=WARMUP, memory=memory)
        self._d = unknown.clone()  # [K], the shortfalls at the last call

    def forward(self, stats: ObjectiveStats) -> Tensor:
        """Return weights ``[K]`` that follow the largest weighted shortfall from the ideal."""
        mean, std = self.running_level(stats.rewards), rms_group_std(stats.rewards)  # [K]
        self.average = update_ema(self.average, mean, self.decay)
        seen = torch.where(std > 0, std, torch.nan)
        self.spread = torch.where(self.spread.isnan(), seen, self.spread)

        base = torch.where(self._base.isnan(), self.running_level.start, self._base)
        self._check_order(base)
        ideal = torch.where(self._ideal.isnan(), base + self.spread, self._ideal)
        d = self._w * (ideal - self.average) / (ideal - base)
        self._d = d
        return smooth_max(d, self.temperature) + self.rho

    def report(self) -> dict[str, float]:
        """Return the shortfalls ``d_k`` of the last call, as far as they are known."""
        shortfalls = zip(self.objectives, self._d.tolist(), strict=True)
        return {f"shortfall/{name}": d for name, d in shortfalls if not math.isnan(d)}

    def _importance(self, weights: Sequence[float] | None) -> Tensor:
        values = [1.0] * len(self.objectives) if weights is None else list(weights)
        if len(values) != len(self.objectives) or not all(0 < w < math.inf for w in values):
            raise ValueError(
                "Parameter `weights` should have a positive finite entry per objective "
                f"{self.objectives}. Found {values}."
            )
        return torch.tensor(values, dtype=torch.float64)

    def _check_order(self, base: Tensor) -> None:
        rows = zip(self.objectives, self._ideal.tolist(), base.tolist(), strict=True)
        for name, ideal, start in rows:
            if ideal <= start:  # False where either is unknown
                raise ValueError(
                    "Parameter `ideal` should be above `base` (by default the mean of the first "
                    f"rollouts). Found {ideal} <= {start} for {name}."
                )


def smooth_max(d: Tensor, temperature: float) -> Tensor:
    """Take the softmax over what is not NaN, 0 for others; uniform if all are: ``[K]``."""
    known = ~torch.isnan(d)
    if not known.any():
        return torch.full_like(d, 1 / len(d))
    return (torch.where(known, d, -torch.inf) / temperature).softmax(0)
