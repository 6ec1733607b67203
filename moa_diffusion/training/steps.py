"""The optimizer steps of one rollout: micro-batches, summed gradients, and their metrics."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from moa_diffusion.config.schema import LossConfig
from moa_diffusion.monitoring.progress import Progress
from moa_diffusion.policies.base import Policy, Terms
from moa_diffusion.training.geometry import Geometry
from moa_diffusion.training.gradient_sum import GradientSum
from moa_diffusion.training.loss import Clip, ReferencePull
from moa_diffusion.training.stepper import Stepper, TrainingError
from moa_diffusion.types import Rollout, take

logger = logging.getLogger(__name__)


class MinibatchLoss(Protocol):
    """What the optimizer steps of a rollout descend on."""

    def backward(self, part: Rollout, index: Sequence[int], decisions: Tensor) -> Tensor:
        """Add the gradients of one micro-batch.

        Args:
            part: The m samples of the micro-batch, without their outputs.
            index: Their places among the n samples of this process.
            decisions: The number of decisions in the minibatch of all processes, a scalar on the
                device.

        Returns:
            ``pass_sums`` of each forward pass, ``[passes, 6]`` on the device.
        """
        ...

    def finish(self) -> None:
        """Add what ``backward`` kept elsewhere to ``.grad``, once all of a minibatch is summed."""
        ...


class RolloutSteps:
    """Takes the optimizer steps of a rollout, and checks that the rollout is on-policy.

    Args:
        policy: The policy, which gives log-probabilities.
        stepper: Takes one optimizer step on summed gradients.
        geometry: How a rollout is cut into minibatches and micro-batches.
        settings: The section ``loss``: the clip, what holds the policy to the reference, and the
            tolerance of the on-policy check.
        progress: How far the run is; the number of the rollout decides the order of the samples.
        seed: The run's seed, which the order of the samples depends on.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        stepper: Stepper,
        geometry: Geometry,
        settings: LossConfig,
        progress: Progress,
        seed: int,
    ) -> None:
        self.policy, self.stepper, self.geometry = policy, stepper, geometry
        self.settings, self.progress, self.seed = settings, progress, seed
        self.clip = Clip(settings.clip_range, settings.clip)
        self.reference = ReferencePull(settings)
        self.comm = progress.comm
        self._checked: set[int] = set()  # decisions that were on-policy when first drawn
        self._off_policy = False  # whether a rollout that was not on-policy has been reported

    def take(self, rollout: Rollout, loss: MinibatchLoss) -> dict[str, float]:
        """Take all optimizer steps of a rollout.

        Nothing in the loop over micro-batches and steps waits for the device: sums stay there
        until the rollout's end, and each optimizer step reads the gradient's norm.

        A stop request is honoured before each optimizer step, and where there is one process, which
        need not ask others, before each micro-batch. The steps so far are not undone then.

        Args:
            rollout: The n samples of this process.
            loss: What is descended on.

        Returns:
            Metrics, averaged over all processes and optimizer steps.
        """
        step, rank = self.progress.completed, self.comm.rank
        minibatches = self.geometry.minibatches(seed=self.seed, step=step, rank=rank)
        counts = rollout.mask.sum(1)  # [n]
        decisions = torch.stack(
            [take(counts, index.flatten().tolist()).sum() for index in minibatches]
        )
        self.comm.sum_([decisions])  # [updates], over all processes
        decisions.clamp_(min=1)  # where no sample has a reward
        sums: list[Tensor] = []
        norms, gradients = [], GradientSum(self.stepper.parameters)
        passes = self.geometry.updates * self.geometry.accumulation
        with self.progress.bar("update", total=passes) as bar:
            for index, count in zip(minibatches, decisions, strict=True):
                for number, micro in enumerate(index):
                    if number == 0 or self.comm.world_size == 1:
                        self.progress.leave_if_stopped()
                    part = rollout.select(micro, outputs=False)
                    sums.append(loss.backward(part, micro.tolist(), count))
                    gradients.take()
                    bar.update()
                gradients.write(self.comm)
                loss.finish()
                norms.append(self.stepper.optimizer_step())
        self.stepper.finish_rollout()
        return self._metrics(torch.cat(sums), norms)

    def _metrics(self, sums: Tensor, norms: Sequence[float]) -> dict[str, float]:
        """Return metrics from the sums of all passes ``[passes, 6]`` and the norms of all steps."""
        table = sums.cpu()  # waits for the device
        before = len(table) // self.geometry.updates  # passes before the first optimizer step
        gap = float(self.comm.gather(table[:before, 3].max()[None]).max())
        totals = torch.cat([table[:, :3], table[:, 4:]], dim=1).double().sum(0)
        self.comm.sum_([totals])
        decisions, clipped, kl, pull, norm = totals.tolist()
        decisions = max(decisions, 1.0)  # there are none where no sample has a reward
        compared: dict[str, float] = {}
        if self.settings.kl_weight:
            compared = {"policy/kl": kl / decisions, "policy/kl_weight": self.reference.kl_weight}
            self.reference.follow(kl / decisions)
        if self.reference.compares and norm:
            compared["policy/velocity_norm"] = norm / decisions
        if self.settings.kind == "forward":
            own = {"policy/pull": pull / decisions} if self.policy.copies else {}
        else:
            self._report_gap(gap)
            own = {"policy/clip_fraction": clipped / decisions, "policy/ratio_gap": gap}
        return {
            **own,
            **compared,
            **self.stepper.step_metrics(norms),
        }

    def _report_gap(self, gap: float) -> None:
        """Report, once, if a rollout was not on-policy though the check had passed."""
        if not gap <= self.settings.tolerance and not self._off_policy:
            self._off_policy = True
            logger.warning(
                "Log-probs recomputed for training differ from those of sampling by up to %.2e "
                "before any update (`loss.ratio_tolerance` is %.0e): part of what the clip sees is "
                "rounding. `policy/ratio_gap` follows it.",
                *(gap, self.settings.tolerance),
            )

    @torch.no_grad()
    def check_ratio(self, rollout: Rollout, decisions: Sequence[int] | None = None) -> None:
        """Check that log-probs as trained equal those of sampling, for every kind of decision.

        How far rounding moves a log-prob depends on the denoising step, 26 times more at the last
        than at the first, so each is checked when a rollout first has it: one micro-batch,
        without gradient.

        Args:
            rollout: The n samples of this process, drawn by the policy as it is.
            decisions: The numbers of the T decisions, as ``Policy.trained_steps`` has them; those
                that were checked before are left out. By default all are checked.

        Raises:
            TrainingError: With a diagnosis, if they differ by more than the tolerance.
        """
        count = rollout.log_probs.shape[1]
        new = (
            set(range(count))
            if decisions is None
            else {i for i, number in enumerate(decisions) if number not in self._checked}
        )
        chunks = [
            steps
            for steps in self.policy.step_chunks(count)
            if not new.isdisjoint(range(*steps.indices(count)))
        ]
        if not chunks:
            return
        part = rollout.select(torch.arange(self.geometry.micro_batch), outputs=False)
        gap = torch.zeros(count, device=part.log_probs.device)  # [T]
        for steps in chunks:
            again = self.policy.log_probs(part, steps).log_probs
            gap[steps] = ((again - part.log_probs[:, steps]).abs() * part.mask[:, steps]).amax(0)
        worst = float(gap.max()) if gap.isfinite().all() else math.inf
        worst = float(self.comm.gather(torch.tensor([worst])).max())
        if worst > self.settings.tolerance:
            raise TrainingError(
                "The policy is not on-policy: before any update of this rollout, log-probs "
                f"recomputed for training differ from those of sampling by up to {worst:.2e} "
                f"(tolerance {self.settings.tolerance:.0e}, `loss.ratio_tolerance`). Likely "
                "causes: a half-precision kernel that depends on the batch size (make "
                "`trainer.sample_batch` equal `trainer.micro_batch` times `policy.step_batch`), "
                "dropout that is active, or latents rounded between sampling and training. By "
                f"decision, on this process: {[f'{value:.1e}' for value in gap.tolist()]}."
            )
        self._checked.update(decisions or ())


def old_log_probs(settings: LossConfig, part: Rollout, chunk: slice, new: Tensor) -> Tensor:
    """Return what ratios are taken to: log-probs ``[m, t]`` of sampling.

    Along the forward process nothing was sampled that has a probability: the ratio is 1 always.
    """
    return new.detach() if settings.kind == "forward" else part.log_probs[:, chunk]


def pass_sums(mask: Tensor, log_ratio: Tensor, clipped: Tensor, terms: Terms) -> Tensor:
    """Sum over the decisions of one forward pass, for the metrics.

    Args:
        mask: Which decisions there are, ``[m, t]`` bool.
        log_ratio: Log ratios ``[m, t]``, new minus old log-probability.
        clipped: Clipping ``[m, t]``, whether the clip acts, or for which share of the objectives.
        terms: What the policy returned.

    Returns:
        ``[6]``: the number of decisions, the sums of ``clipped`` and of the KL, the largest
        ``|log_ratio|``, and the sums of the pull to copies and of the norm.
    """

    def total(values: Tensor | None) -> Tensor:
        if values is None:
            return mask.new_zeros((), dtype=torch.float32)
        return torch.where(mask, values.float(), 0.0).sum()

    parts = [
        mask.sum().float(),
        total(clipped),
        total(terms.kl),
        torch.where(mask, log_ratio.abs(), 0.0).max(),
        total(terms.pull),
        total(terms.norm),
    ]
    return torch.stack(parts).detach()
