"""A policy small enough to reason about: a Gaussian walk on a plane, for tests and examples.

The "image" is one pixel whose three channels are the final point squashed into [0, 1]. A prompt
shifts nothing: what is learned is the mean of each step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from moa_diffusion.policies.base import Terms
from moa_diffusion.policies.copies import AdapterCopy
from moa_diffusion.policies.samplers import Steps, generators, noise
from moa_diffusion.types import Generated, Request, Rollout


class ToyPolicy:
    """``x_{i+1} = x_i + drift_i + std * noise`` for T steps of a 3-dimensional point.

    Args:
        steps: Number T of decisions per sample.
        std: The standard deviation of each step.
        kl: Kind of KL to the reference (drift 0), 'gaussian' or 'dt_free'.
    """

    dtype = torch.float32
    row_per_sample, row_copies, lockstep = False, 1, False
    copies: Mapping[str, AdapterCopy] = MappingProxyType({})
    dimensions = 3

    def __init__(self, *, steps: int = 2, std: float = 0.3, kl: str = "gaussian") -> None:
        if steps < 1:
            raise ValueError(f"Parameter `steps` should be at least 1. Found {steps}.")
        if not std > 0:
            raise ValueError(f"Parameter `std` should be positive. Found {std}.")
        self.steps, self.std, self.kl = steps, std, kl
        # Points are [n, 3]: the same step as an image's, with one axis instead of three.
        column = torch.tensor([[1.0]])
        self._gaussian = Steps(x=column, v=column, std=column * std, length=column)
        self.drift = nn.Parameter(torch.zeros(steps, 3))

    def prepare(self, prompts: Sequence[str]) -> None:
        """Do nothing: prompts change nothing."""

    def expect(self, prompts: Sequence[str]) -> None:
        """Do nothing: prompts change nothing."""

    @torch.no_grad()
    def sample(self, requests: Sequence[Request], *, step: int) -> Rollout:
        """Draw random walks of a point, step by step; its end is the image's colour."""
        sources = generators([request.seed for request in requests])
        x = torch.zeros(len(requests), 3)
        points, log_probs = [x], []
        for i in range(self.steps):
            mean = x + self.drift[i]
            x = mean + self.std * noise(sources, (3,), x.device)
            points.append(x)
            log_probs.append(self._gaussian.log_prob(x, mean))
        recorded = torch.stack(log_probs, dim=1)  # [n, T]
        return Rollout(
            requests=tuple(requests),
            log_probs=recorded,
            mask=torch.ones_like(recorded, dtype=torch.bool),
            trace={"points": torch.stack(points, dim=1)},  # [n, T + 1, 3]
            images=self._image(x),
        )

    def trained_steps(self, step: int) -> range:
        """Return the numbers of all steps."""
        return range(self.steps)

    def log_probs(self, rollout: Rollout, steps: slice, *, with_kl: bool = False) -> Terms:
        """Return the Gaussian log-probs ``[n, t]`` of the points that were reached."""
        log_probs, kls = [], []
        for i in range(*steps.indices(self.steps)):
            x, x_next = rollout.trace["points"][:, i], rollout.trace["points"][:, i + 1]
            log_probs.append(self._gaussian.log_prob(x_next, x + self.drift[i]))
            if with_kl:
                drift = self.drift[i].expand_as(x)
                kls.append(self._gaussian.kl(drift, torch.zeros_like(x), self.kl))
        kl = torch.stack(kls, dim=1) if with_kl else None
        return Terms(torch.stack(log_probs, dim=1), kl)

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> Generated:
        """Return the image at the end of a walk without noise."""
        return Generated(outputs=self._image(self.drift.sum(0).expand(len(requests), 3)))

    def trainable(self) -> Mapping[str, nn.Parameter]:
        """Return the drift ``[T, 3]`` of all steps."""
        return {"drift": self.drift}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Have the walk drift nowhere within the block."""
        trained = self.drift.detach().clone()
        with torch.no_grad():
            self.drift.zero_()
        try:
            yield
        finally:
            with torch.no_grad():
                self.drift.copy_(trained)

    def tapped(self) -> Sequence[Any]:
        """Return nothing: there are no layers."""
        return ()

    def row_tokens(self, rollout: Rollout) -> int | None:
        """Return None: there are no tokens."""
        return None

    def step_chunks(self, decisions: int) -> list[slice]:
        """Return a slice for each step."""
        return [slice(i, i + 1) for i in range(decisions)]

    def save(self, folder: Path) -> None:
        """Write the drift as ``drift.json``."""
        text = json.dumps({"drift": self.drift.tolist()})
        (folder / "drift.json").write_text(text, encoding="utf-8")

    @staticmethod
    def _image(x: Tensor) -> Tensor:
        return torch.sigmoid(x)[:, :, None, None]  # [n, 3, 1, 1]
