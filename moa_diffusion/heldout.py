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

        Every process draws a contiguous share; no sample is drawn or counted twice.

        Args:
            step: names the sheet of pictures.
            before_batch: called on all processes before each batch.
        """
        total = len(self.requests)
        share = -(-total // self.comm.world_size)
        mine = self.requests[self.comm.rank * share : (self.comm.rank + 1) * share]
        parts = []
        starts = range(0, share, self.batch)  # as many on every process
        for start in tqdm(starts, desc="evaluate", leave=False, disable=not self.progress):
            before_batch()
            if batch := mine[start : start + self.batch]:
                parts.append(self.policy.generate(batch))
        images = torch.cat(parts) if parts else None
        local = self.scorer.together(lambda: self._score(mine, images))  # [K, m]
        padded = torch.full((share, len(local)), torch.nan, dtype=torch.float64)
        padded[: len(mine)] = local.T
        values = self.comm.gather(padded)[:total].T  # [K, M]: padding is on the last ranks only
        if self.comm.rank == 0 and images is not None and self.shown:
            shown = images[: self.shown]
            sheet = pictures.grid(shown, columns=math.ceil(math.sqrt(len(shown))))
            pictures.save_png(sheet, self.folder / "samples" / f"step-{step:06d}.png")
        metrics: dict[str, float] = {}
        for name, row in zip(self.scorer.names, values, strict=True):
            scores = row[~row.isnan()]
            error = scores.std() / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
            metrics |= {
                f"eval_mean/{name}": float(scores.mean()),
                f"eval_sem/{name}": float(error),
            }
        return metrics

    def _score(self, requests: Sequence[Request], images: Tensor | None) -> Tensor:
        if images is None:  # fewer samples than processes
            return torch.empty(len(self.scorer.names), 0, dtype=torch.float64)
        return self.scorer.score(requests, images=images)
