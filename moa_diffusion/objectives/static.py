"""Weights that never change: linear scalarisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moa_diffusion.objectives.base import Weighting
from moa_diffusion.types import ObjectiveStats


class Static(Weighting):
    """The weights of the configuration, on every rollout.

    What they multiply is the normalizer's choice: raw rewards (``raw``) or z-scores.

    Args:
        objectives: Names of the K objectives.
        weights: K finite numbers, not all zero; equal by default. A negative one minimises.
    """

    weights: Tensor

    def __init__(
        self, objectives: Sequence[str], *, weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(objectives)
        values = torch.tensor(
            [1.0] * len(self.objectives) if weights is None else list(weights),
            dtype=torch.float64,
        )
        if values.shape != (len(self.objectives),):
            raise ValueError(
                f"Parameter `weights` should have one entry per objective {self.objectives}. "
                f"Found {len(values)} entries."
            )
        if not values.isfinite().all() or not values.any():
            raise ValueError(
                f"Parameter `weights` should be finite and not all zero. Found {values.tolist()}."
            )
        # Not persistent: a resumed run uses the weights of its own configuration.
        self.register_buffer("weights", values, persistent=False)

    def forward(self, stats: ObjectiveStats) -> Tensor:
        """Return the weights that were given, whatever was measured."""
        return self.weights
