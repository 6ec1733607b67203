"""From K advantages to better parameters: what an update is given, and the ordinary update.

An update weighs the objectives' advantages, combines them to one and takes the optimizer steps of
the rollout. ``PlainUpdate`` here weighs once per rollout; ``fused.py`` weighs at every optimizer
step, on the Gramian of that step's own gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moa_diffusion.config.schema import GradientsConfig
from moa_diffusion.distributed import Comm, local_slice
from moa_diffusion.objectives.base import Normalizer, Weighting, combine
from moa_diffusion.objectives.metrics import cosine_metrics
from moa_diffusion.training.critic import Credit
from moa_diffusion.training.gradient_check import GradientCheck
from moa_diffusion.training.gradients import ObjectiveGradients
from moa_diffusion.training.loss import clipped_surrogate
from moa_diffusion.training.stepper import TrainingError
from moa_diffusion.training.steps import RolloutSteps, old_log_probs, pass_sums
from moa_diffusion.types import ObjectiveStats, Rollout, take

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalarization:
    """K advantages of one rollout on their way to one: weighed, combined, normalized again."""

    normalizer: Normalizer
    weighting: Weighting
    comm: Comm
    step: int  # rollouts finished before this one
    credit: Credit  # [K, D] of all processes: rewards of samples, or estimates of decisions
    advantages: Tensor  # [K, D] float64, after the normalizer's first stage
    clip: float  # advantages are cut at +- this

    @property
    def names(self) -> tuple[str, ...]:
        """The K objectives."""
        return self.credit.matrix.names

    def weigh(self, gramian: Tensor | None) -> Tensor:
        """Ask the weighting; the answer of rank 0 counts on all processes.

        Args:
            gramian: Gramian ``[K, K]`` of the objectives' gradients; None if it is not measured.

        Returns:
            Weights ``[K]``, or ``[K, D]`` if each column has its own.

        Raises:
            TrainingError: If the weighting refuses what was measured.
        """
        stats = ObjectiveStats(
            step=self.step,
            rewards=self.credit.matrix,
            advantages=self.advantages,
            gramian=gramian,
            win_rates=self.normalizer.win_rates(self.credit.matrix),
        )
        try:
            weights = self._checked(self.weighting(stats)).clone()
        except ValueError as error:  # such as a target below the base level that was measured
            raise TrainingError(f"objectives.weighting: {error}") from error
        self.comm.broadcast_(weights)
        return weights

    def _checked(self, weights: Any) -> Tensor:
        """Return what a weighting has answered, which may be a user's.

        Raises:
            ValueError: Unless they are weights ``[K]`` or ``[K, D]``, finite where they count.
        """
        name, applies = type(self.weighting).__name__, ~torch.isnan(self.credit.matrix.values)
        K, D = applies.shape
        if not isinstance(weights, Tensor):
            raise ValueError(
                f"`{name}` should return a tensor of weights [{K}]. Found {type(weights).__name__}."
            )
        if weights.shape not in ((K,), (K, D)) or not weights.is_floating_point():
            raise ValueError(
                f"`{name}` should return floating weights [{K}], one for each objective, or "
                f"[{K}, {D}]. Found {list(weights.shape)} of {weights.dtype}."
            )
        bad = ~weights.isfinite() & (applies if weights.ndim == 2 else applies.any(dim=1))
        if bad.any():
            raise ValueError(
                f"`{name}` should return finite weights. Found {weights[bad][0].item():g} for "
                f"{self.names[int(bad.nonzero()[0, 0])]}."
            )
        return weights

    def combine(self, weights: Tensor) -> Tensor:
        """Return the one advantage of each sample ``[N]``, or of each decision ``[N, T]``."""
        applies = ~torch.isnan(self.credit.matrix.values)  # [K, D]
        advantage = combine(self.advantages, weights, applies)  # [D]
        advantage = self.normalizer.combined(advantage, self.credit.matrix)
        advantage = advantage.clamp(-self.clip, self.clip)
        return self.credit.placed(advantage)

    def rescaled(self, weights: Tensor) -> Tensor:
        """Return weights ``[K]`` of gradients: normalized, times stage 2's factor of the advantage.

        What stage 2 divides by becomes a factor of the weights, one for the whole batch. A sample
        to which few objectives apply counts less than in ``combine``, since weights cannot be
        renormalized, or whitened, for it alone.
        """
        weights = weights / weights.abs().sum()
        applies = ~torch.isnan(self.credit.matrix.values)  # [K, D]
        advantage = combine(self.advantages, weights, applies)  # [D]
        total = advantage.square().sum()
        normalized = self.normalizer.combined(advantage, self.credit.matrix)
        return weights * (normalized @ advantage / total) if total > 0 else weights

    def local_advantages(self) -> Tensor:
        """Return advantages ``[K, n]`` of this process's samples, after stage 1, not clipped."""
        return local_slice(self.advantages.T, self.comm).T

    def kl_scale(self) -> float:
        """Return the factor of the KL's weight that goes with the last combination."""
        return self.weighting.kl_scale() * self.normalizer.kl_scale()


@dataclass(frozen=True, slots=True, kw_only=True)
class Improvement:
    """What an update did."""

    weights: Tensor  # [K], or [K, D]; the mean over the optimizer steps if each had its own
    advantage: Tensor  # [N], or [N, T], of all processes: combined with these weights
    metrics: Mapping[str, float]  # averaged over all processes and optimizer steps


class Update(Protocol):
    """Improves the policy on one rollout."""

    steps: RolloutSteps
    fused: bool  # whether the weighting is asked at every optimizer step

    def improve(
        self, rollout: Rollout, scalarization: Scalarization, *, kl_scale: float = 1.0
    ) -> Improvement:
        """Weigh the objectives and take the rollout's optimizer steps.

        Args:
            rollout: The n samples of this process.
            scalarization: The objectives' advantages, and how they become one.
            kl_scale: A factor of the KL's weight.

        Raises:
            TrainingError: If the weighting refuses what was measured, or the gradients of single
                objectives cannot be told apart.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what the next rollout depends on besides parameters and optimizer."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""
        ...


class Probe:
    """Measures the objectives' gradients on a part of a rollout, before its optimizer steps.

    Args:
        steps: Takes the optimizer steps of the rollouts that are probed.
        settings: The rollouts between two probes, and the share of a rollout's micro-batches.

    Attributes:
        gramian: ``[K, K]`` float64, the last one measured; None before the first.
    """

    def __init__(self, steps: RolloutSteps, settings: GradientsConfig) -> None:
        self.steps, self.settings = steps, settings
        self.check = GradientCheck(steps.policy, steps.comm, seed=steps.seed)
        self.gramian: Tensor | None = None

    def __call__(
        self, rollout: Rollout, scalarization: Scalarization
    ) -> tuple[Tensor | None, dict[str, float]]:
        """Return the Gramian to weigh this rollout with, measured anew if that is due.

        Returns:
            The Gramian ``[K, K]``, and the metrics ``cosine/*`` of this rollout's own gradients;
            none if they were not measured.
        """
        metrics: dict[str, float] = {}
        if self.gramian is None or scalarization.step % self.settings.every == 0:
            with self.steps.progress.timed("probe"):
                measured = self.measure(rollout, scalarization.local_advantages())
            if measured.isfinite().all():
                self.gramian = measured
                metrics = cosine_metrics(scalarization.names, measured)
            else:  # the loss scale of float16 was too high, say: the update will lower it
                logger.warning("The probe's gradients are not finite; it does not count.")
        if self.gramian is None:  # the next rollout probes again
            return torch.eye(len(scalarization.names), dtype=torch.float64), metrics
        return self.gramian, metrics

    def measure(self, rollout: Rollout, advantages: Tensor) -> Tensor:
        """Measure the Gramian ``[K, K]`` of the objectives' gradients on a part of a fresh rollout.

        Args:
            rollout: The n samples of this process, drawn by the policy as it is.
            advantages: Advantages ``[K, n]`` of this process's samples.
        """
        steps, policy = self.steps, self.steps.policy
        advantages = advantages.to(steps.stepper.device, torch.float32)
        self.check(rollout, steps.geometry.micro_batch)
        rows = ObjectiveGradients.of(policy, len(advantages))
        # Processes differ by a pass or so in what they measure.
        by_rank = [
            steps.geometry.probe(
                self.settings.share, seed=steps.seed, step=steps.progress.completed, rank=rank
            )
            for rank in range(steps.comm.world_size)
        ]
        chosen = by_rank[steps.comm.rank]
        idle = max(map(len, by_rank)) - len(chosen) if policy.lockstep else 0
        index = [i for micro in chosen for i in micro.tolist()]  # perhaps none is ours
        decisions = take(rollout.mask, index).sum()[None]
        steps.comm.sum_([decisions])
        along = torch.arange(steps.geometry.micro_batch)  # passes that add nothing
        for micro, share in [*((micro, 1.0) for micro in chosen), *[(along, 0.0)] * idle]:
            part = rollout.select(micro, outputs=False)
            micro_advantages = share * take(advantages.T, micro.tolist()).T  # [K, m]
            for chunk in policy.step_chunks(part.log_probs.shape[1]):
                new = policy.log_probs(part, chunk).log_probs
                # The policy is the one that sampled: the ratio is 1, and nothing is clipped.
                coefficients = -micro_advantages[:, :, None]  # [K, m, 1]
                coefficients = torch.where(part.mask[:, chunk], coefficients, 0.0)  # [K, m, t]
                rows.backward(
                    new,
                    coefficients / decisions,
                    tokens=policy.row_tokens(part),
                    scale=steps.stepper.loss_scale,
                )
                del new  # and the graph, before the next one is made
        return rows.gramian(steps.comm)

    def state_dict(self) -> dict[str, Any]:
        """Return the Gramian measured last."""
        return {"gramian": self.gramian}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""
        self.gramian = state["gramian"]


class NoProbe:
    """Measures nothing, for weightings that do not look at gradients."""

    def __call__(
        self, rollout: Rollout, scalarization: Scalarization
    ) -> tuple[Tensor | None, dict[str, float]]:
        """Return no Gramian, and no metrics."""
        return None, {}

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: no Gramian is kept."""
        return {"gramian": None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state: there is none."""


class PlainUpdate:
    """Weighs once per rollout, and descends on the surrogate of the combined advantage.

    Args:
        steps: Takes the optimizer steps of a rollout.
        probe: Supplies the Gramian that the weighting looks at, if it does.
    """

    fused = False

    def __init__(self, steps: RolloutSteps, probe: Probe | NoProbe) -> None:
        self.steps, self.probe = steps, probe

    def improve(
        self, rollout: Rollout, scalarization: Scalarization, *, kl_scale: float = 1.0
    ) -> Improvement:
        """Weigh, combine, descend: see ``Update``."""
        gramian, cosines = self.probe(rollout, scalarization)
        weights = scalarization.weigh(gramian)  # [K], or [K, D]
        advantage = scalarization.combine(weights)  # [N], or [N, T]
        metrics = self.descend(
            rollout,
            local_slice(advantage, self.steps.comm),
            kl_scale=scalarization.kl_scale() * kl_scale,
        )
        return Improvement(weights=weights, advantage=advantage, metrics=cosines | metrics)

    def descend(
        self, rollout: Rollout, advantage: Tensor, *, kl_scale: float = 1.0
    ) -> dict[str, float]:
        """Take the rollout's optimizer steps on the clipped surrogate plus KL.

        Args:
            rollout: The n samples of this process.
            advantage: Advantages ``[n]``, or ``[n, T]`` if each decision has its own.
            kl_scale: A factor of the KL's weight.

        Returns:
            Metrics, averaged over all processes and optimizer steps.
        """
        with self.steps.progress.timed("update"):
            return self.steps.take(rollout, _Surrogate(self.steps, advantage, kl_scale))

    def state_dict(self) -> dict[str, Any]:
        """Return the Gramian that the weighting was given last."""
        return self.probe.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""
        self.probe.load_state_dict(state)


class _Surrogate:
    """The clipped surrogate of one advantage, plus KL: a ``MinibatchLoss``."""

    def __init__(self, steps: RolloutSteps, advantage: Tensor, kl_scale: float) -> None:
        self._steps, self._beta = steps, steps.reference.kl_weight * kl_scale
        self._advantage = advantage.to(steps.stepper.device, torch.float32)

    def backward(self, part: Rollout, index: Sequence[int], decisions: Tensor) -> Tensor:
        policy, clip, reference = self._steps.policy, self._steps.clip, self._steps.reference
        scaler = self._steps.stepper.scaler
        advantage = take(self._advantage, index)  # [m], or [m, T]
        sums = []
        for chunk in policy.step_chunks(part.log_probs.shape[1]):
            mask = part.mask[:, chunk]
            terms = policy.log_probs(part, chunk, with_kl=reference.compares)
            new = terms.log_probs
            old = old_log_probs(self._steps.settings, part, chunk, new)
            chunk_advantage = advantage if advantage.ndim == 1 else advantage[:, chunk]
            clipped = clip.clipped(new - old, chunk_advantage, terms.moved)
            losses = clipped_surrogate(new, old, chunk_advantage, clipped)  # [m, t]
            if (kl := reference.kl(terms)) is not None:
                losses = losses + self._beta * kl
            if (penalty := reference.penalty(terms)) is not None:
                losses = losses + penalty
            torch.autograd.backward(scaler.scale(torch.where(mask, losses, 0).sum() / decisions))
            sums.append(pass_sums(mask, new - old, clipped, terms))
        return torch.stack(sums)

    def finish(self) -> None:
        pass
