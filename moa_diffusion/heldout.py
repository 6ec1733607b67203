"""Evaluation during training: held-out prompts, drawn and scored as deployment would."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from moa_diffusion import pictures
from moa_diffusion.distributed import Comm
from moa_diffusion.policies.base import Policy
from moa_diffusion.scoring import Scorer
from moa_diffusion.types import Request


class HeldOut:
    """Draws the same requests at every call, whatever the number of processes.

    Args:
        requests: M samples to draw; their seeds fix the pictures.
        policy: draws them.
        scorer: the K reward heads.
        comm: collectives over the processes.
        batch: samples per forward pass.
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
        folder: Path,
        shown: int,
        progress: bool,
    ) -> None:
        self.requests = tuple(requests)
        self.policy, self.scorer, self.comm = policy, scorer, comm
        self.batch, self.folder, self.shown, self.progress = batch, folder, shown, progress

    @torch.no_grad()
    def __call__(self, step: int, *, before_batch: Callable[[], None]) -> dict[str, float]:
        """Mean and standard error of every reward on the M samples.

        Every process draws each ``world_size``-th request; none is counted twice. Images of one
        prompt are alike, so the standard error is that of the mean over the prompts' means.

        Args:
            step: names the sheet of pictures.
            before_batch: called on all processes before each batch.
        """
        world, total = self.comm.world_size, len(self.requests)
        # A process without a share draws the first request, which does not count.
        mine = self.requests[self.comm.rank :: world] or self.requests[:1]
        share = -(-total // world)  # of the largest
        parts = []
        starts = range(0, share, self.batch)  # as many on every process
        for start in tqdm(starts, desc="evaluate", leave=False, disable=not self.progress):
            before_batch()
            if batch := mine[start : start + self.batch]:
                parts.append(self.policy.generate(batch))
        images = torch.cat(parts)
        local = self.scorer.together(lambda: self.scorer.score(mine, images=images))  # [K, m]
        values = self._gathered(local.T, share)[:total]  # [M, K]
        if self.shown:
            rows = min(share, -(-self.shown // world))
            shown = self._gathered(images, rows)[: min(self.shown, total)]
            if self.comm.rank == 0:
                sheet = pictures.grid(shown, columns=math.ceil(math.sqrt(len(shown))))
                pictures.save_png(sheet, self.folder / "samples" / f"step-{step:06d}.png")
        prompts = torch.tensor([request.group for request in self.requests])
        metrics: dict[str, float] = {}
        for name, row in zip(self.scorer.names, values.T, strict=True):
            mean, error = mean_and_error(row, prompts)
            metrics |= {f"eval_mean/{name}": mean, f"eval_sem/{name}": error}
        return metrics

    def _gathered(self, mine: Tensor, rows: int) -> Tensor:
        """The first ``rows`` of every process, in the order of the requests: ``[world rows, ...]``.

        Rows that a process lacks follow all others.
        """
        padded = mine.new_zeros(rows, *mine.shape[1:])
        padded[: min(rows, len(mine))] = mine[:rows]
        gathered = self.comm.gather(padded)
        return gathered.unflatten(0, (-1, rows)).transpose(0, 1).flatten(0, 1)


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
