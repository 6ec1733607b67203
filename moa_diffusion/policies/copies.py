"""Copies of the adapter that follow it: what rollouts are drawn with, or training is held to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moa_diffusion.config.presets import CopyRules


class AdapterCopy:
    """``copy <- share copy + (1 - share) parameter``, once per rollout.

    The share grows with the optimizer steps that were taken, as DiffusionNFT (arXiv 2509.16117) and
    AWM (arXiv 2509.25050) have it: a copy that stays behind is the steadier anchor, but early
    progress should not be held back.

    Args:
        parameters: What is copied.
        settings: How the share grows.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: CopyRules) -> None:
        self.parameters, self.settings = dict(parameters), settings
        self.values: dict[str, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Begin with the parameters as they are."""
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    def share(self, updates: int) -> float:
        """Return the share of the copy that stays after so many optimizer steps."""
        rule = self.settings
        return min(max(rule.decay_rate * (updates - rule.decay_after), 0.0), rule.decay_limit)

    @torch.no_grad()
    def follow(self, updates: int) -> None:
        """Call once after the optimizer steps of a rollout.

        Args:
            updates: Number of optimizer steps since the beginning of training.
        """
        torch._foreach_lerp_(
            list(self.values.values()), list(self.parameters.values()), 1 - self.share(updates)
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Have the parameters hold the copy within the block, in which no graph may be kept."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            trained = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name] = trained

    def state_dict(self) -> dict[str, Any]:
        """Return the copy, by parameter."""
        return dict(self.values)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a saved copy of the same parameters."""
        for name, values in self.values.items():
            values.copy_(state[name])
