"""The optimizer steps of one rollout: micro-batches, gradients over processes, clipping, EMA."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from moa_diffusion.distributed import Comm
from moa_diffusion.policies.base import Policy
from moa_diffusion.training.ema import EMA
from moa_diffusion.training.geometry import Geometry
from moa_diffusion.training.gradient_check import TOLERANCE, relative_errors
from moa_diffusion.training.gradient_sum import GradientSum
from moa_diffusion.training.gradients import ObjectiveGradients
from moa_diffusion.training.loss import clip_fraction, clipped_surrogate, surrogate_coefficients
from moa_diffusion.training.stepper import Stepper, TrainingError
from moa_diffusion.types import Rollout, take

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """Settings of the policy-gradient loss."""

    clip_range: float  # of the ratio
    advantage_clip: float  # advantages are cut at +- this
    kl_weight: float  # beta; 0 leaves the reference out altogether
    max_grad_norm: float
    ratio_tolerance: float  # largest |log ratio| of the on-policy check
    max_skipped: int  # consecutive updates with non-finite gradients before giving up


class Updater(Stepper):
    """Takes the optimizer steps of a rollout, on the clipped surrogate plus KL.

    Args:
        policy: gives log-probabilities.
        geometry: how a rollout is cut.
        comm: collectives over the processes.
        optimizer: over ``policy.trainable()``.
        lr: learning rate after so many optimizer steps.
        scaler: loss scaler; disabled except in float16.
        ema: average of the trained parameters.
        surrogate: settings of the loss.
        seed: of the order of the samples.
        progress: whether this process shows a progress bar.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        geometry: Geometry,
        comm: Comm,
        optimizer: torch.optim.Optimizer,
        lr: Callable[[int], float],
        scaler: torch.amp.GradScaler,
        ema: EMA,
        surrogate: Surrogate,
        seed: int,
        progress: bool = True,
    ) -> None:
        super().__init__(
            policy=policy,
            optimizer=optimizer,
            lr=lr,
            scaler=scaler,
            ema=ema,
            max_grad_norm=surrogate.max_grad_norm,
            max_skipped=surrogate.max_skipped,
        )
        self.geometry, self.comm, self.surrogate = geometry, comm, surrogate
        self.seed, self.progress = seed, progress
        self._checked: set[int] = set()  # decisions that were on-policy when first drawn
        self._gradients_checked = False
        self._off_policy = False  # whether it was said that a rollout was not on-policy

    def __call__(
        self,
        rollout: Rollout,
        advantage: Tensor,
        *,
        step: int,
        kl_scale: float = 1.0,
        before_batch: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Improve the policy on one rollout.

        Args:
            rollout: this process's n samples.
            advantage: ``[n]``, or ``[n, T]`` if each decision has its own.
            step: rollouts finished before this one; it decides the order of the samples.
            kl_scale: factor of the KL's weight.
            before_batch: called on all processes before each optimizer step, and where there is
                one process, which need not be asked, before each micro-batch. If it raises, the
                rollout's optimizer steps so far are not undone.

        Returns:
            metrics, averaged over all processes and optimizer steps.
        """
        advantage = advantage.to(self.device, torch.float32)
        beta = self.surrogate.kl_weight * kl_scale

        def backward(part: Rollout, index: Tensor, total: Tensor) -> Tensor:
            return self._backward(part, take(advantage, index.tolist()), total, beta)

        return self._run(rollout, backward, step=step, before_batch=before_batch)

    def fused(
        self,
        rollout: Rollout,
        advantages: Tensor,
        solve: Callable[[Tensor], Tensor],
        *,
        step: int,
        kl_scale: float = 1.0,
        kl_unit: Callable[[], float] = lambda: 1.0,
        before_batch: Callable[[], None] = lambda: None,
    ) -> tuple[dict[str, float], Tensor]:
        """Improve the policy; weights are found at every optimizer step from its own gradients.

        The gradients of all objectives come from the one backward pass that training makes anyway,
        each with its own clip mask, so they are exact also after the first step of a rollout. A
        KL term costs a backward pass of its own: its gradient is no combination of theirs.

        Args:
            rollout: this process's n samples.
            advantages: ``[K, n]``.
            solve: Gramian ``[K, K]`` of the objectives' gradients (float64, CPU, equal on every
                process) to their weights ``[K]``.
            step: as above.
            kl_scale: as above.
            kl_unit: a further factor of the KL's weight, which ``solve`` has settled: asked for
                after it, at every optimizer step.
            before_batch: as above.

        Returns:
            metrics, and the mean weights ``[K]``.
        """
        advantages = advantages.to(self.device, torch.float32)
        by_sample = advantages.T  # [n, K]
        count, beta = len(advantages), self.surrogate.kl_weight * kl_scale
        self.check_gradients(rollout)
        rows = self._rows(count)
        found: list[Tensor] = []

        def backward(part: Rollout, index: Tensor, total: Tensor) -> Tensor:
            return self._backward_rows(rows, part, take(by_sample, index.tolist()).T, total, beta)

        def mix() -> None:
            gramian = rows.gramian(self.comm)
            if gramian.isfinite().all():
                found.append(solve(gramian))
            else:  # the step will be skipped, and counted
                found.append(torch.full((count,), 1 / count, dtype=torch.float64))
            if beta > 0:  # so far there is nothing but the KL's gradient
                for parameter in self._parameters:
                    assert parameter.grad is not None
                    parameter.grad.mul_(kl_unit())
            rows.write(found[-1] * self.loss_scale)
            rows.clear()

        metrics = self._run(rollout, backward, mix, step=step, before_batch=before_batch)
        return metrics, torch.stack(found).mean(0)

    def measure(self, rollout: Rollout, advantages: Tensor, *, step: int, share: float) -> Tensor:
        """Gramian ``[K, K]`` of the objectives' gradients on a part of a fresh rollout.

        Args:
            rollout: this process's n samples, drawn by the policy as it is.
            advantages: ``[K, n]``.
            step: rollouts finished before this one; it decides the order of the samples.
            share: of the micro-batches that training will make of the rollout, in (0, 1].
        """
        advantages = advantages.to(self.device, torch.float32)
        self.check_gradients(rollout)
        rows = self._rows(len(advantages))
        chosen = self.geometry.probe(share, seed=self.seed, step=step, rank=self.comm.rank)
        index = [i for micro in chosen for i in micro.tolist()]  # perhaps none is ours
        decisions = take(rollout.mask, index).sum()[None]
        self.comm.sum_([decisions])
        for micro in chosen:
            part = rollout.select(micro, outputs=False)
            mine = take(advantages.T, micro.tolist()).T  # [K, m]
            for steps in self.policy.step_chunks(part.log_probs.shape[1]):
                new, _ = self.policy.log_probs(part, steps)
                # The policy is the one that sampled: the ratio is 1, and nothing is clipped.
                slopes = torch.where(part.mask[:, steps], -mine[:, :, None], 0.0)  # [K, m, t]
                rows.backward(
                    new,
                    slopes / decisions,
                    tokens=self.policy.row_tokens(part),
                    scale=self.loss_scale,
                )
                del new  # and the graph, before the next one is made
        return rows.gramian(self.comm)

    def _rows(self, count: int) -> ObjectiveGradients:
        return ObjectiveGradients(
            self.policy.trainable(),
            self.policy.tapped(),
            count,
            whole=self.policy.whole_rows,
            copies=self.policy.row_copies,
        )

    def _run(
        self,
        rollout: Rollout,
        backward: Callable[[Rollout, Tensor, Tensor], Tensor],
        finish: Callable[[], None] = lambda: None,
        *,
        step: int,
        before_batch: Callable[[], None],
    ) -> dict[str, float]:
        """The optimizer steps of a rollout.

        Nothing in the loop over micro-batches and steps waits for the device: sums stay there
        until the rollout's end, and each optimizer step reads the gradient's norm.

        Args:
            rollout: this process's n samples.
            backward: adds the gradients of a micro-batch, given its samples, their index, and the
                number of decisions in the whole minibatch (on the device); returns what
                ``_told`` says of each forward pass, ``[passes, 4]`` on the device.
            finish: adds to ``.grad``, which holds the sum over all micro-batches and processes,
                what ``backward`` kept elsewhere.
            step: rollouts finished before this one.
            before_batch: called in between.
        """
        minibatches = self.geometry.minibatches(seed=self.seed, step=step, rank=self.comm.rank)
        counts = rollout.mask.sum(1)  # [n]
        totals = torch.stack(
            [take(counts, index.flatten().tolist()).sum() for index in minibatches]
        )
        self.comm.sum_([totals])  # [updates], over all processes
        found: list[Tensor] = []
        norms, gradients = [], GradientSum(self._parameters)
        passes = self.geometry.updates * self.geometry.accumulation
        with tqdm(total=passes, desc="update", leave=False, disable=not self.progress) as bar:
            for index, total in zip(minibatches, totals, strict=True):
                for number, micro in enumerate(index):
                    if number == 0 or self.comm.world_size == 1:
                        before_batch()
                    found.append(backward(rollout.select(micro, outputs=False), micro, total))
                    gradients.take()
                    bar.update()
                gradients.write(self.comm)
                finish()
                norms.append(self.optimizer_step())
        table = torch.cat(found).cpu()  # waits for the device
        before = len(table) // self.geometry.updates  # passes before the first optimizer step
        gap = float(self.comm.gather(table[:before, 3].max()[None]).max())
        sums = table[:, :3].double().sum(0)
        self.comm.sum_([sums])
        decisions, clipped, kl = sums.tolist()
        self._watch(gap)
        return {
            "policy/clip_fraction": clipped / decisions,
            "policy/ratio_gap": gap,
            **({"policy/kl": kl / decisions} if self.surrogate.kl_weight else {}),
            **self.step_metrics(norms),
        }

    def _backward(self, part: Rollout, advantage: Tensor, total: Tensor, beta: float) -> Tensor:
        """Add the gradients of one micro-batch; returns what ``_told`` says of each pass."""
        clip_range = self.surrogate.clip_range
        sums = []
        for steps in self.policy.step_chunks(part.log_probs.shape[1]):
            mask, old = part.mask[:, steps], part.log_probs[:, steps]
            new, kl = self.policy.log_probs(part, steps, with_kl=self.surrogate.kl_weight > 0)
            mine = advantage if advantage.ndim == 1 else advantage[:, steps]
            losses = clipped_surrogate(new, old, mine, clip_range)  # [m, t]
            if kl is not None:
                losses = losses + beta * kl
            torch.autograd.backward(self.scaler.scale(torch.where(mask, losses, 0).sum() / total))
            clipped = clip_fraction(new.detach(), old, mine, clip_range)
            sums.append(_told(mask, new - old, clipped, kl))
        return torch.stack(sums)

    def _backward_rows(
        self,
        rows: ObjectiveGradients,
        part: Rollout,
        advantages: Tensor,
        total: Tensor,
        beta: float,
    ) -> Tensor:
        """As ``_backward``, but every objective's gradient goes to its own row, KL to ``.grad``."""
        sums = []
        with_kl = beta > 0
        says = advantages != 0  # [K, m]
        for steps in self.policy.step_chunks(part.log_probs.shape[1]):
            mask, old = part.mask[:, steps], part.log_probs[:, steps]
            new, kl = self.policy.log_probs(part, steps, with_kl=with_kl)
            by_objective = surrogate_coefficients(new, old, advantages, self.surrogate.clip_range)
            by_objective = torch.where(mask, by_objective, 0.0)  # [K, m, t]
            rows.backward(
                new,
                by_objective / total,
                tokens=self.policy.row_tokens(part),
                scale=self.loss_scale,
                retain_graph=with_kl,
            )
            if kl is not None:
                weighted = beta * torch.where(mask, kl, 0.0).sum() / total
                torch.autograd.backward(self.scaler.scale(weighted))
            unclipped = (by_objective != 0).sum(0) / says.sum(0).clamp(min=1)[:, None]
            # [m, t], share of the objectives that say something
            clipped = torch.where(says.any(0)[:, None], 1 - unclipped, 0.0)
            sums.append(_told(mask, new.detach() - old, clipped, kl))
            del new, kl  # and the graph, before the next one is made
        return torch.stack(sums)

    def _watch(self, gap: float) -> None:
        """Say it, once, if a rollout was not on-policy though the check had passed."""
        if not gap <= self.surrogate.ratio_tolerance and not self._off_policy:
            self._off_policy = True
            logger.warning(
                "Log-probs recomputed for training differ from those of sampling by up to %.2e "
                "before any update (`loss.ratio_tolerance` is %.0e): part of what the clip sees is "
                "rounding. `policy/ratio_gap` follows it.",
                *(gap, self.surrogate.ratio_tolerance),
            )

    @torch.no_grad()
    def check_ratio(self, rollout: Rollout, decisions: Sequence[int] | None = None) -> None:
        """Log-probs as trained must equal those of sampling, for every kind of decision.

        How far rounding moves a log-prob depends on the denoising step, 26 times more at the last
        than at the first, so each is looked at when a rollout first has it: one micro-batch,
        without gradient.

        Args:
            rollout: this process's n samples, drawn by the policy as it is.
            decisions: numbers of the T decisions, as ``Policy.trained_steps`` has them; those that
                were looked at before are left out. By default all are looked at.

        Raises:
            TrainingError: with a diagnosis, if they differ by more than the tolerance.
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
            again, _ = self.policy.log_probs(part, steps)
            gap[steps] = ((again - part.log_probs[:, steps]).abs() * part.mask[:, steps]).amax(0)
        worst = float(gap.max()) if gap.isfinite().all() else math.inf
        worst = float(self.comm.gather(torch.tensor([worst])).max())
        if worst > self.surrogate.ratio_tolerance:
            raise TrainingError(
                "The policy is not on-policy: before any update of this rollout, log-probs "
                f"recomputed for training differ from those of sampling by up to {worst:.2e} "
                f"(tolerance {self.surrogate.ratio_tolerance:.0e}, `loss.ratio_tolerance`). Likely "
                "causes: a half-precision kernel that depends on the batch size (make "
                "`trainer.sample_batch` equal `trainer.micro_batch` times `policy.step_batch`), "
                "dropout that is active, or latents rounded between sampling and training. By "
                f"decision, on this process: {[f'{value:.1e}' for value in gap.tolist()]}."
            )
        self._checked.update(decisions or ())

    def check_gradients(self, rollout: Rollout) -> None:
        """The objectives' gradients must add up to an ordinary one; done once per run.

        Args:
            rollout: this process's n samples.

        Raises:
            TrainingError: naming the layers whose gradients are not those of a backward pass.
        """
        if self._gradients_checked:
            return
        part = rollout.select(torch.arange(self.geometry.micro_batch))
        errors, separate = relative_errors(self.policy, part, seed=self.seed)
        tolerance = TOLERANCE[self.policy.dtype]
        wrong = {name: error for name, error in errors.items() if not error <= tolerance}
        if self.comm.any(bool(wrong)):
            worst = sorted(wrong, key=lambda name: -wrong[name])[:5]  # NaN in any place
            raise TrainingError(
                f"The gradients of single objectives are wrong in {len(wrong)} of {len(errors)} "
                "trained tensors on this process: they do not add up to an ordinary backward pass "
                f"(relative error above {tolerance:.0e}). Worst: "
                f"{', '.join(f'{name} ({wrong[name]:.1e})' for name in worst) or 'none'}. These "
                "layers take their samples in an order that is not known here. Leave them out of "
                "`policy.lora.target_modules`, or choose a method that weighs without gradients."
            )
        if separate:
            logger.warning(
                "The gradients of %d of %d trained tensors take a backward pass for each "
                "objective: their layers do not keep the samples apart.",
                separate,
                len(errors),
            )
        self._gradients_checked = True


def _told(mask: Tensor, log_ratio: Tensor, clipped: Tensor, kl: Tensor | None) -> Tensor:
    """Of the decisions ``[m, t]``: how many, sums of clipped and KL, largest ``|log ratio|``."""
    parts = [
        mask.sum().float(),
        torch.where(mask, clipped.float(), 0.0).sum(),
        mask.new_zeros((), dtype=torch.float32) if kl is None else torch.where(mask, kl, 0.0).sum(),
        torch.where(mask, log_ratio.abs(), 0.0).max(),
    ]
    return torch.stack(parts).detach()
