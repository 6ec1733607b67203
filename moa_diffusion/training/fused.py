"""The fused update: weights solved at every optimizer step, on that step's own gradients.

The gradients of all objectives come from the one backward pass that training makes anyway, each
with its own clip mask, so they are exact also after the first step of a rollout. A KL term costs a
backward pass of its own: its gradient is no combination of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moa_diffusion.objectives.metrics import cosine_metrics
from moa_diffusion.training.gradient_check import GradientCheck
from moa_diffusion.training.gradients import ObjectiveGradients
from moa_diffusion.training.loss import surrogate_coefficients
from moa_diffusion.training.stepper import TrainingError
from moa_diffusion.training.steps import RolloutSteps, old_log_probs, pass_sums
from moa_diffusion.training.update import Improvement, Scalarization
from moa_diffusion.types import Rollout, take


class FusedUpdate:
    """Weighs at every optimizer step, for weightings that depend on the Gramian alone.

    Two things differ from weighing advantages: the clip of advantages acts on each objective's, and
    stage 2 of the normalizer is one factor for the whole batch (``Scalarization.rescaled``).

    Args:
        steps: Takes the optimizer steps of a rollout.
    """

    fused = True

    def __init__(self, steps: RolloutSteps) -> None:
        self.steps = steps
        self.check = GradientCheck(steps.policy, steps.comm, seed=steps.seed)

    def improve(
        self, rollout: Rollout, scalarization: Scalarization, *, kl_scale: float = 1.0
    ) -> Improvement:
        """Take the optimizer steps, each with weights of its own: see ``Update``."""
        with self.steps.progress.timed("update"):
            self.check(rollout, self.steps.geometry.micro_batch)
            rows = _ObjectiveRows(self.steps, scalarization, kl_scale)
            metrics = self.steps.take(rollout, rows)
        weights = torch.stack(rows.weights).mean(0)  # [K]
        if rows.gramian is not None:
            metrics = cosine_metrics(scalarization.names, rows.gramian) | metrics
        return Improvement(
            weights=weights, advantage=scalarization.combine(weights), metrics=metrics
        )

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: no Gramian outlives its optimizer step."""
        return {"gramian": None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state: there is none."""


class _ObjectiveRows:
    """The surrogates of all objectives in rows of their own, mixed once a minibatch is summed."""

    def __init__(self, steps: RolloutSteps, scalarization: Scalarization, kl_scale: float) -> None:
        self._steps, self._scalarization = steps, scalarization
        self._beta = steps.reference.kl_weight * kl_scale
        clip = scalarization.clip
        advantages = scalarization.local_advantages().clamp(-clip, clip)  # [K, n]
        self._advantages = advantages.to(steps.stepper.device, torch.float32).T  # [n, K]
        self._rows = ObjectiveGradients.of(steps.policy, len(advantages))
        self._penalised = False  # whether there are losses that are weighted already
        self.weights: list[Tensor] = []  # [K] of each optimizer step
        self.gramian: Tensor | None = None  # [K, K], the last one that was finite

    def backward(self, part: Rollout, index: Sequence[int], decisions: Tensor) -> Tensor:
        """Add every objective's gradient to its own row, and that of the KL to ``.grad``."""
        policy, stepper = self._steps.policy, self._steps.stepper
        clip, reference = self._steps.clip, self._steps.reference
        advantages = take(self._advantages, index).T  # [K, m]
        nonzero = advantages != 0  # [K, m]
        sums = []
        for chunk in policy.step_chunks(part.log_probs.shape[1]):
            mask = part.mask[:, chunk]
            terms = policy.log_probs(part, chunk, with_kl=reference.compares)
            new, kl, penalty = terms.log_probs, reference.kl(terms), reference.penalty(terms)
            old = old_log_probs(self._steps.settings, part, chunk, new)
            coefficients = surrogate_coefficients(new, old, advantages, clip, terms.moved)
            coefficients = torch.where(mask, coefficients, 0.0)  # [K, m, t]
            self._rows.backward(
                new,
                coefficients / decisions,
                tokens=policy.row_tokens(part),
                scale=stepper.loss_scale,
                retain_graph=kl is not None or penalty is not None,
            )
            held = [self._beta * kl] if kl is not None else []
            held += [penalty] if penalty is not None else []
            self._penalised = penalty is not None
            if held:
                weighted = torch.where(mask, sum(held), 0.0).sum() / decisions
                torch.autograd.backward(stepper.scaler.scale(weighted))
            unclipped = (coefficients != 0).sum(0) / nonzero.sum(0).clamp(min=1)[:, None]
            # [m, t], the share of the objectives with an advantage that are clipped
            clipped = torch.where(nonzero.any(0)[:, None], 1 - unclipped, 0.0)
            sums.append(pass_sums(mask, new.detach() - old, clipped, terms))
            del terms, new, kl, penalty  # and the graph, before the next one is made
        return torch.stack(sums)

    def finish(self) -> None:
        """Solve for the weights, and add the weighted rows to ``.grad``."""
        gramian = self._rows.gramian(self._steps.comm)
        if gramian.isfinite().all():
            self.gramian = gramian
            self.weights.append(self._scalarization.rescaled(self._scalarization.weigh(gramian)))
        else:  # the step will be skipped, and counted
            count = len(gramian)
            self.weights.append(torch.full((count,), 1 / count, dtype=torch.float64))
        factor = self._scalarization.kl_scale()
        if factor != 1 and self._penalised:
            raise TrainingError(
                "loss: norm_weight and pulls to copies of the adapter have the unit of normalized "
                "advantages. Found a normalizer that keeps the unit of the rewards, with weights "
                "from every optimizer step's gradients."
            )
        if self._beta > 0 and factor != 1:  # so far there is nothing but the KL's gradient
            for parameter in self._steps.stepper.parameters:
                assert parameter.grad is not None
                parameter.grad.mul_(factor)
        self._rows.write(self.weights[-1] * self._steps.stepper.loss_scale)
        self._rows.clear()
