"""The optimizer steps of one rollout: micro-batches, gradients over processes, clipping, EMA."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from moa_diffusion.data import Geometry
from moa_diffusion.distributed import Comm
from moa_diffusion.ema import EMA
from moa_diffusion.gradient_sum import GradientSum
from moa_diffusion.gradients import ObjectiveGradients
from moa_diffusion.loss import clip_fraction, clipped_surrogate, surrogate_coefficients
from moa_diffusion.policies.base import Policy
from moa_diffusion.stepper import Stepper, TrainingError
from moa_diffusion.types import Rollout


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
        self._device = self._parameters[0].device

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
            before_batch: called on all processes before each micro-batch. If it raises, the
                rollout's optimizer steps so far are not undone.

        Returns:
            metrics, averaged over all processes and optimizer steps.
        """
        advantage = advantage.to(self._device, torch.float32)
        beta = self.surrogate.kl_weight * kl_scale

        def backward(part: Rollout, index: Tensor, total: int) -> Tensor:
            return self._backward(part, advantage[index], total, beta)

        return self._run(rollout, backward, step=step, before_batch=before_batch)

    def fused(
        self,
        rollout: Rollout,
        advantages: Tensor,
        solve: Callable[[Tensor], Tensor],
        *,
        step: int,
        kl_scale: float = 1.0,
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
            before_batch: as above.

        Returns:
            metrics, and the mean weights ``[K]``.
        """
        advantages = advantages.to(self._device, torch.float32)
        count, beta = len(advantages), self.surrogate.kl_weight * kl_scale
        rows = self._rows(count)
        found: list[Tensor] = []

        def backward(part: Rollout, index: Tensor, total: int) -> Tensor:
            return self._backward_rows(rows, part, advantages[:, index], total, beta)

        def mix() -> None:
            gramian = rows.gramian(self.comm)
            if gramian.isfinite().all():
                found.append(solve(gramian))
            else:  # the step will be skipped, and counted
                found.append(torch.full((count,), 1 / count, dtype=torch.float64))
            rows.write(found[-1] * self._loss_scale())
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
        advantages = advantages.to(self._device, torch.float32)
        rows = self._rows(len(advantages))
        chosen = self.geometry.probe(share, seed=self.seed, step=step, rank=self.comm.rank)
        index = torch.cat([*chosen, torch.zeros(0, dtype=torch.int64)])  # perhaps none is ours
        decisions = rollout.mask[index].sum()[None]
        self.comm.sum_([decisions])
        for micro in chosen:
            part, total = rollout.select(micro), int(decisions)
            self._backward_rows(rows, part, advantages[:, micro], total, 0.0)
        return rows.gramian(self.comm)

    def _rows(self, count: int) -> ObjectiveGradients:
        return ObjectiveGradients(
            self.policy.trainable(),
            self.policy.tapped(),
            count,
            whole=self.policy.whole_rows,
        )

    def _run(
        self,
        rollout: Rollout,
        backward: Callable[[Rollout, Tensor, int], Tensor],
        finish: Callable[[], None] = lambda: None,
        *,
        step: int,
        before_batch: Callable[[], None],
    ) -> dict[str, float]:
        """The optimizer steps of a rollout.

        Args:
            rollout: this process's n samples.
            backward: adds the gradients of a micro-batch, given its samples, their index, and the
                number of decisions in the whole minibatch; returns sums of decisions, clipped, KL.
            finish: adds to ``.grad``, which holds the sum over all micro-batches and processes,
                what ``backward`` kept elsewhere.
            step: rollouts finished before this one.
            before_batch: called before each micro-batch.
        """
        minibatches = self.geometry.minibatches(seed=self.seed, step=step, rank=self.comm.rank)
        decisions = torch.stack([rollout.mask[index.flatten()].sum() for index in minibatches])
        self.comm.sum_([decisions])  # [updates], over all processes
        sums = torch.zeros(3, dtype=torch.float64)  # decisions, clipped, KL
        norms, gradients = [], GradientSum(self._parameters)
        passes = self.geometry.updates * self.geometry.accumulation
        with tqdm(total=passes, desc="update", leave=False, disable=not self.progress) as bar:
            for index, total in zip(minibatches, decisions.tolist(), strict=True):
                for micro in index:
                    before_batch()
                    sums += backward(rollout.select(micro), micro, total)
                    gradients.take()
                    bar.update()
                gradients.write(self.comm)
                finish()
                norms.append(self.optimizer_step())
        self.comm.sum_([sums])
        finite = [norm for norm in norms if math.isfinite(norm)]
        return {
            "policy/clip_fraction": float(sums[1] / sums[0]),
            **({"policy/kl": float(sums[2] / sums[0])} if self.surrogate.kl_weight else {}),
            "policy/grad_norm": sum(finite) / len(finite) if finite else math.nan,
            "policy/skipped_updates": float(len(norms) - len(finite)),
            "policy/lr": self.optimizer.param_groups[0]["lr"],
        }

    def _backward(self, part: Rollout, advantage: Tensor, total: int, beta: float) -> Tensor:
        """Add the gradients of one micro-batch; returns its decisions, clipped and KL sums."""
        clip_range = self.surrogate.clip_range
        sums = torch.zeros(3, dtype=torch.float64)
        for steps in self.policy.step_chunks(part.log_probs.shape[1]):
            mask, old = part.mask[:, steps], part.log_probs[:, steps]
            new, kl = self.policy.log_probs(part, steps, with_kl=self.surrogate.kl_weight > 0)
            mine = advantage if advantage.ndim == 1 else advantage[:, steps]
            losses = clipped_surrogate(new, old, mine, clip_range)  # [m, t]
            if kl is not None:
                losses = losses + beta * kl
                sums[2] += float((kl.detach() * mask).sum())
            torch.autograd.backward(self.scaler.scale(torch.where(mask, losses, 0).sum() / total))
            clipped = clip_fraction(new.detach(), old, mine, clip_range)
            sums[0] += float(mask.sum())
            sums[1] += float((clipped & mask).sum())
        return sums

    def _backward_rows(
        self,
        rows: ObjectiveGradients,
        part: Rollout,
        advantages: Tensor,
        total: int,
        beta: float,
    ) -> Tensor:
        """As ``_backward``, but every objective's gradient goes to its own row, KL to ``.grad``."""
        sums = torch.zeros(3, dtype=torch.float64)
        with_kl = beta > 0
        for steps in self.policy.step_chunks(part.log_probs.shape[1]):
            mask, old = part.mask[:, steps], part.log_probs[:, steps]
            new, divergence = self.policy.log_probs(part, steps, with_kl=with_kl)
            by_objective = surrogate_coefficients(new, old, advantages, self.surrogate.clip_range)
            by_objective = torch.where(mask, by_objective, 0.0)  # [K, m, t]
            rows.backward(new, by_objective / total, scale=self._loss_scale(), retain_graph=with_kl)
            if divergence is not None:
                term = torch.where(mask, divergence, 0.0).sum()
                weighted = beta * term / total
                torch.autograd.backward(self.scaler.scale(weighted))
                sums[2] += float(term.detach())
            unclipped = (by_objective != 0).sum(0) / (advantages != 0).sum(0).clamp(min=1)[:, None]
            clipped = 1 - unclipped  # [m, t], share of the objectives that say something
            clipped[~(advantages != 0).any(0)] = 0
            sums[0] += float(mask.sum())
            sums[1] += float((clipped * mask).sum())
        return sums

    def _loss_scale(self) -> float:
        """Of the GradScaler, which comes into being with the first loss that it scales."""
        return float(self.scaler.scale(torch.ones((), device=self._device)))

    @torch.no_grad()
    def check_ratio(self, rollout: Rollout) -> None:
        """Log-probs as trained must equal those of sampling.

        Args:
            rollout: this process's n samples, drawn by the policy as it is.

        Raises:
            TrainingError: with a diagnosis, if they differ by more than the tolerance.
        """
        part = rollout.select(torch.arange(self.geometry.micro_batch))
        chunks = self.policy.step_chunks(part.log_probs.shape[1])
        new = torch.cat([self.policy.log_probs(part, steps)[0] for steps in chunks], dim=1)
        gap = ((new - part.log_probs).abs() * part.mask).amax(0)  # [T]
        worst = float(gap.max()) if gap.isfinite().all() else math.inf
        worst = float(self.comm.gather(torch.tensor([worst])).max())
        if worst > self.surrogate.ratio_tolerance:
            raise TrainingError(
                "The policy is not on-policy at the start: log-probs recomputed for training "
                f"differ from those of sampling by up to {worst:.2e} (tolerance "
                f"{self.surrogate.ratio_tolerance:.0e}, `loss.ratio_tolerance`). Likely causes: "
                "a half-precision kernel that depends on the batch size (make "
                "`trainer.sample_batch` equal `trainer.micro_batch`), dropout that is active, or "
                "latents rounded between sampling and training. By decision, on this process: "
                f"{[f'{value:.1e}' for value in gap.tolist()]}."
            )
