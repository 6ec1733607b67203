"""Evaluation during training: held-out prompts, drawn and scored as deployment would."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moa_diffusion import pictures
from moa_diffusion.distributed import Comm, deal, gather_dealt
from moa_diffusion.metrics import RunLog
from moa_diffusion.objectives.normalize import rms_group_std
from moa_diffusion.policies.base import Policy
from moa_diffusion.scoring import Scorer
from moa_diffusion.types import Request, RewardMatrix


class HeldOut:
    """Draws the same requests at every call, whatever the number of processes.

    Args:
        requests: M samples to draw; their seeds fix the pictures.
        policy: draws them.
        scorer: the K reward heads.
        comm: collectives over the processes.
        batch: samples per forward pass.
        log: where every sample's rewards go.
        folder: where sheets of pictures go.
        shown: pictures per sheet, the first of the requests; 0 for none.
        progress: whether this process shows a progress bar.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        policy: Policy,
        scorer: Scorer,
        comm: Comm,
        batch: int,
        log: RunLog,
        folder: Path,
        shown: int,
        progress: bool,
    ) -> None:
        self.requests = tuple(requests)
        self.policy, self.scorer, self.comm = policy, scorer, comm
        self.batch, self.log, self.folder = batch, log, folder
        self.shown, self.progress = shown, progress
        # [K], of the base model: mean, and RMS of the spread within a prompt.
        self.base = self.unit = torch.full((len(scorer.names),), torch.nan, dtype=torch.float64)

    @torch.no_grad()
    def __call__(self, step: int, *, before_batch: Callable[[], None]) -> dict[str, float]:
        """Mean and standard error of every reward on the M samples, and its gain.

        Images of one prompt are alike, so the standard error is that of the mean over prompts.
        The gain is in units of the base model's spread within a prompt: of one scale for all
        rewards, whatever their unit.

        Args:
            step: rollouts finished; at 0 the policy is the base model.
            before_batch: called on all processes before each batch.
        """
        found = self.scorer.survey(
            self.requests,
            self.policy.generate,
            batch=self.batch,
            title="evaluate",
            before_batch=before_batch,
            progress=self.progress,
        )
        if shown := min(self.shown, len(self.requests)):
            dealt = deal(len(self.requests), self.batch, self.comm)
            wanted = [[i for i in items if i < shown] for items in dealt]
            first = gather_dealt(found.images, wanted, self.comm)
            if self.comm.rank == 0:
                sheet = pictures.grid(first, columns=math.ceil(math.sqrt(shown)))
                pictures.save_png(sheet, self.folder / "samples" / f"step-{step:06d}.png")
        values = found.values.T  # [K, M]
        self.log.write_evaluation(step, self.requests, self.scorer.names, values, found.extra)
        prompts = torch.tensor([request.group for request in self.requests])
        if step == 0:
            self.base = values.nanmean(1)
            self.unit = rms_group_std(self._matrix(values, prompts))
        gains = (values.nanmean(1) - self.base) / self.unit
        metrics: dict[str, float] = {}
        for name, row, gain in zip(self.scorer.names, values, gains.tolist(), strict=True):
            mean, error = mean_and_error(row, prompts)
            metrics |= {f"eval_mean/{name}": mean, f"eval_sem/{name}": error}
            if step:
                metrics[f"eval_gain/{name}"] = gain
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        """What gains are measured against."""
        return {"base": self.base, "unit": self.unit}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.base, self.unit = state["base"], state["unit"]

    def _matrix(self, values: Tensor, prompts: Tensor) -> RewardMatrix:
        texts = tuple(request.prompt for request in self.requests)
        return RewardMatrix(names=self.scorer.names, values=values, groups=prompts, prompts=texts)


def mean_and_error(values: Tensor, prompts: Tensor) -> tuple[float, float]:
    """Mean of the samples, and its standard error with prompts as the independent units.

    Args:
        values: ``[M]``, NaN where a reward does not apply.
        prompts: ``[M]`` int64, the prompt of each.

    Returns:
        both NaN where nothing applies; the error also with fewer than two prompts.
    """
    known = ~values.isnan()
    values, prompts = values[known].double(), prompts[known]
    _, index = torch.unique(prompts, return_inverse=True)
    count = torch.bincount(index).double()  # [P]
    mean = values.mean()
    # Of a ratio of two sums over prompts (linearised), for prompts of unequal size.
    deviations = torch.zeros_like(count).index_add_(0, index, values - mean)  # [P]
    units = len(count)
    if units < 2:
        return float(mean), math.nan
    error = (deviations.square().sum() * units / (units - 1)).sqrt() / len(values)
    return float(mean), float(error)
