"""Objectives that an update is given in a test: advantages as they are, weights from a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class FixedObjectives:
    """Stands for ``Scalarization``.

    Args:
        advantages: ``[K, n]`` of this process's samples.
        solve: The Gramian ``[K, K]`` to the weights ``[K]``.
        kl_scale: The factor of the KL's weight, once the weights are solved.
    """

    def __init__(
        self,
        advantages: torch.Tensor,
        solve: Callable[[Any], Any],
        kl_scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.advantages, self.weigh, self.kl_scale = advantages, solve, kl_scale
        self.names = tuple("abcdefgh"[: len(advantages)])
        self.step, self.clip = 0, 5.0

    def local_advantages(self) -> torch.Tensor:
        return self.advantages

    def rescaled(self, weights: torch.Tensor) -> torch.Tensor:
        return weights

    def combine(self, weights: torch.Tensor) -> torch.Tensor:
        return weights @ self.advantages.to(weights.dtype)
