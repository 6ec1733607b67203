"""Exponential moving average of the trained parameters, counted in optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """``average <- decay average + (1 - decay) parameter`` after every ``every`` optimizer steps.

    Counting optimizer steps (never micro-batches) makes the average independent of how a batch is
    cut over processes and forward passes.

    Args:
        parameters: What is averaged; starts at their present values.
        decay: Share of the old average that stays at an update, in [0, 1).
        every: Optimizer steps between two updates of the average.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, decay: float, every: int) -> None:
        self.parameters = dict(parameters)
        self.decay, self.every = decay, every
        self.count = 0  # optimizer steps seen
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Call once after every optimizer step."""
        self.count += 1
        if self.count % self.every == 0:
            torch._foreach_lerp_(
                list(self.average.values()), list(self.parameters.values()), 1 - self.decay
            )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Have the parameters hold the average within the block."""
        live = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(live)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by parameter, and how many updates they have seen."""
        return {"count": self.count, "average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to saved averages of the same parameters."""
        self.count = state["count"]
        with torch.no_grad():
            for name, tensor in self.average.items():
                tensor.copy_(state["average"][name])
