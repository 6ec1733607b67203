"""An optimizer step on summed gradients: loss scale, clipping, non-finite norms, EMA, state."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch

from moa_diffusion.ema import EMA
from moa_diffusion.policies.base import Policy

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


class Stepper:
    """Steps on gradients that are already summed over the processes.

    Args:
        policy: whose parameters are trained.
        optimizer: over ``policy.trainable()``.
        lr: learning rate after so many optimizer steps.
        scaler: loss scaler; disabled except in float16.
        ema: average of the trained parameters.
        max_grad_norm: the gradient is clipped to this length.
        max_skipped: consecutive updates with non-finite gradients before giving up.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        lr: Callable[[int], float],
        scaler: torch.amp.GradScaler,
        ema: EMA,
        max_grad_norm: float,
        max_skipped: int,
    ) -> None:
        self.policy, self.optimizer, self.lr = policy, optimizer, lr
        self.scaler, self.ema = scaler, ema
        self.max_grad_norm, self.max_skipped = max_grad_norm, max_skipped
        self.updates = 0  # optimizer steps taken
        self.skipped_in_a_row = 0
        self._parameters = list(policy.trainable().values())

    def optimizer_step(self) -> float:
        """Clip the gradient, which all processes share, and step; returns its norm.

        A non-finite gradient skips the update and is counted.
        """
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self.max_grad_norm))
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr(self.updates)
            self.scaler.step(self.optimizer)
            self.updates += 1
            self.ema.update()
        else:
            self.skipped_in_a_row += 1
            logger.warning("Update skipped: the gradient norm is %s.", norm)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def check_health(self) -> None:
        """Give up after too many updates without a finite gradient.

        Raises:
            TrainingError: saying what may help.
        """
        if self.skipped_in_a_row >= self.max_skipped:
            raise TrainingError(
                f"The last {self.skipped_in_a_row} updates had non-finite gradients. "
                "A smaller `optimizer.lr` or `policy.dtype: bfloat16` may help."
            )

    def state_dict(self) -> dict[str, Any]:
        """Adapter, optimizer, EMA and counters, equal on every process."""
        return {
            "trainable": {n: p.detach() for n, p in self.policy.trainable().items()},
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state of the same adapter; rates and decays stay this run's."""
        for name, parameter in self.policy.trainable().items():
            parameter.copy_(state["trainable"][name])
        self.optimizer.zero_grad(set_to_none=True)
        options = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, options, strict=True):
            group.update(values)
        self.updates = state["updates"]
        if state["scaler"]:  # empty unless the run was in float16
            self.scaler.load_state_dict(state["scaler"])
        self.ema.load_state_dict(state["ema"])
        self.skipped_in_a_row = state["skipped_in_a_row"]
