"""An optimizer step on summed gradients: loss scale, clipping, non-finite norms, EMA, state."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moa_diffusion.policies.base import Policy
from moa_diffusion.storage import checkpoint
from moa_diffusion.training.ema import EMA
from moa_diffusion.types import ConfigError

logger = logging.getLogger(__name__)


USUAL_SCALE = 2.0**16  # what GradScaler starts from, as do others who train in float16
GROWTH_INTERVAL = 50  # optimizer steps: a run has some thousand, torch's own 2,000 are all of them
PACE = ("growth_factor", "backoff_factor", "growth_interval")  # settings, not state


def first_scale(dimensions: int) -> float:
    """Return the loss scale that a run in float16 starts from: one that lets nothing vanish.

    A log-probability that is a mean over D numbers hands each of them 1/D of its gradient, on top
    of the division by the decisions of a minibatch. At D = 65,536 (512 pixels) most of the
    gradient of an early denoising step is then lost at the usual scale (`scripts/bench.py
    precision`). Where the scale is too large, it falls by itself within a few optimizer steps.

    Args:
        dimensions: Number D of dimensions over which a log-prob is averaged; 1 for a text's tokens.
    """
    return max(USUAL_SCALE, 2.0**12 * dimensions)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


class Stepper:
    """Steps on gradients that are already summed over the processes.

    Args:
        policy: The policy whose parameters are trained.
        optimizer: An optimizer of ``policy.trainable()``.
        lr: Learning rate after so many optimizer steps.
        scaler: Loss scaler; disabled except in float16.
        ema: Average of the trained parameters.
        max_grad_norm: The gradient is clipped to this length.
        max_skipped: Consecutive updates with non-finite gradients before giving up.
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
        for copy in policy.copies.values():
            copy.restart()
        self.scaler, self.ema = scaler, ema
        self.max_grad_norm, self.max_skipped = max_grad_norm, max_skipped
        self.updates = 0  # optimizer steps taken
        self.skipped_in_a_row = 0
        self.proven_scale = USUAL_SCALE  # the loss scale that has given finite gradients
        self.parameters = list(policy.trainable().values())
        self.device = self.parameters[0].device
        self._scale: float | None = None  # what the scaler has on the device

    @property
    def loss_scale(self) -> float:
        """The GradScaler's, read from the device once per optimizer step; 1 if it is disabled."""
        if not self.scaler.is_enabled():
            return 1.0
        if self._scale is None:  # it comes into being with the first tensor that is scaled
            self._scale = float(self.scaler.scale(torch.ones((), device=self.device)))
        return self._scale

    def optimizer_step(self) -> float:
        """Clip the gradient, which all processes share, and step; return its norm.

        A non-finite gradient skips the update. It counts against ``max_skipped``, unless the loss
        scale is larger than one that has worked (or that all start from): then the skip is how
        the scaler finds out that it is too large.
        """
        scale = self.loss_scale
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            self.proven_scale = scale
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr(self.updates)
            self.scaler.step(self.optimizer)
            self.updates += 1
            self.ema.update()
        elif self.scaler.is_enabled() and scale > self.proven_scale:
            logger.info("Loss scale %g is too large for these gradients: update skipped.", scale)
        else:
            self.skipped_in_a_row += 1
            logger.warning("Update skipped: the gradient norm is %s.", norm)
        self.scaler.update()
        self._scale = None
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def finish_rollout(self) -> None:
        """Have the policy's copies follow its parameters, after the last step of a rollout."""
        for copy in self.policy.copies.values():
            copy.follow(self.updates)

    def step_metrics(self, norms: Sequence[float]) -> dict[str, float]:
        """Return what the optimizer steps of a round tell.

        Args:
            norms: Norms of the gradients, as ``optimizer_step`` returned them.
        """
        finite = [norm for norm in norms if math.isfinite(norm)]
        norm = sum(finite) / len(finite) if finite else math.nan
        elements = sum(parameter.numel() for parameter in self.parameters)
        return {
            "policy/grad_norm": norm,
            "policy/grad_rms": norm / math.sqrt(elements),
            "policy/skipped_updates": float(len(norms) - len(finite)),
            "policy/lr": self.optimizer.param_groups[0]["lr"],
            **({"policy/loss_scale": self.loss_scale} if self.scaler.is_enabled() else {}),
        }

    def check_health(self) -> None:
        """Give up after too many updates without a finite gradient.

        Raises:
            TrainingError: Saying what may help.
        """
        if self.skipped_in_a_row >= self.max_skipped:
            raise TrainingError(
                f"The last {self.skipped_in_a_row} updates had non-finite gradients. "
                "A smaller `optimizer.lr` or `policy.dtype: bfloat16` may help."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return adapter, optimizer, EMA and counters, equal on every process."""
        return {
            "trainable": {n: p.detach() for n, p in self.policy.trainable().items()},
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict(),
            "copies": {name: copy.state_dict() for name, copy in self.policy.copies.items()},
            "skipped_in_a_row": self.skipped_in_a_row,
            "proven_scale": self.proven_scale,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state; rates and decays stay this run's.

        Raises:
            ConfigError: If it is of another adapter.
        """
        checkpoint.check_adapter(state["trainable"], self.policy.trainable())
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
        if state["scaler"] and self.scaler.is_enabled():  # empty unless the run was in float16
            own = {name: self.scaler.state_dict()[name] for name in PACE}
            self.scaler.load_state_dict(state["scaler"] | own)
        self._scale = None
        self.ema.load_state_dict(state["ema"])
        saved = state.get("copies", {})  # older ones lack it
        if missing := set(self.policy.copies) - set(saved):
            raise ConfigError(
                "resume: loss.forward has other copies than the checkpoint, which lacks "
                f"{', '.join(sorted(missing))}."
            )
        for name, copy in self.policy.copies.items():
            copy.load_state_dict(saved[name])
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.proven_scale = state.get("proven_scale", USUAL_SCALE)  # older ones lack it
