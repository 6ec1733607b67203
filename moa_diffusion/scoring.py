"""Rollout to reward matrix: the one place where the trainer and the reward heads meet."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from moa_diffusion.distributed import Comm, deal, gather_dealt
from moa_diffusion.types import Request, RewardMatrix, Rollout
from rewards import RewardBatch, RewardError, RewardHead
from rewards import create as create_head

__all__ = ["RewardError", "RewardHead", "Scorer", "create_head"]


class Scorer:
    """Runs every head on this process's samples and gathers the rewards of all processes.

    Args:
        heads: K reward heads by the objective's name.
        comm: collectives over the processes.
    """

    def __init__(self, heads: Mapping[str, RewardHead], comm: Comm) -> None:
        self.heads = dict(heads)
        self.comm = comm
        self.seconds: dict[str, float] = {}  # of the last call, this process, by objective

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives, in the order of the matrix's rows."""
        return tuple(self.heads)

    def __call__(self, rollout: Rollout, requests: Sequence[Request]) -> RewardMatrix:
        """Score a rollout.

        Args:
            rollout: this process's n samples.
            requests: all N requests, in the order in which the processes hold them.

        Raises:
            RewardError: on every process, if a head failed on one of them; nothing is scored 0.
        """
        local = self.together(
            lambda: self.score(rollout.requests, images=rollout.images, texts=rollout.texts)
        )
        return RewardMatrix(
            names=self.names,
            values=self.comm.gather(local.T.contiguous()).T,  # [K, N]
            groups=torch.tensor([request.group for request in requests]),
            prompts=tuple(request.prompt for request in requests),
        )

    def survey(
        self,
        requests: Sequence[Request],
        draw: Callable[[Sequence[Request]], Tensor],
        *,
        batch: int,
        title: str,
        before_batch: Callable[[], None],
        progress: bool,
    ) -> tuple[Tensor, Tensor]:
        """Draw and score any requests; each is drawn once, in the same batch of any process.

        Args:
            requests: M >= 1, equal on every process; these take whole batches in turn.
            draw: images ``[n, 3, H, W]`` of n requests.
            batch: requests per call of ``draw``.
            title: of the progress bar.
            before_batch: called on all processes before each batch.
            progress: whether this process shows the bar.

        Returns:
            rewards ``[M, K]`` float64 on every process, and this process's images ``[m, ...]`` in
            the order of ``deal``.
        """
        dealt = deal(len(requests), batch, self.comm)
        # A process without a share draws the first request, which does not count.
        mine = [requests[i] for i in dealt[self.comm.rank] or [0]]
        parts = []
        starts = range(0, len(dealt[0]), batch)  # as many on every process
        for start in tqdm(starts, desc=title, leave=False, disable=not progress):
            before_batch()
            if part := mine[start : start + batch]:
                parts.append(draw(part))
        images = torch.cat(parts)
        local = self.together(lambda: self.score(mine, images=images))  # [K, m]
        return gather_dealt(local.T, dealt, self.comm), images

    def score(
        self,
        requests: Sequence[Request],
        *,
        images: Tensor | None = None,
        texts: Sequence[str] | None = None,
    ) -> Tensor:
        """Raw rewards ``[K, n]`` float64 of n outputs of this process; NaN = does not apply."""
        try:
            batch = RewardBatch(
                prompts=[request.prompt for request in requests],
                metadata=[request.metadata for request in requests],
                images=images,
                texts=texts,
            )
        except ValueError as error:  # NaN pixels, say: no head can score them
            raise RewardError(str(error)) from error
        rows = []
        for name, head in self.heads.items():
            start = time.perf_counter()
            rows.append(head(batch).double())
            self.seconds[name] = time.perf_counter() - start
        return torch.stack(rows)

    def together(self, work: Callable[[], Tensor]) -> Tensor:
        """Do the work on every process; if one fails, all raise instead of waiting for it."""
        failure: Exception | None = None
        result = torch.empty(0)
        try:
            result = work()
        except Exception as caught:  # raised below, once the other processes know
            failure = caught
        if self.comm.any(failure is not None):
            raise failure or RewardError("a head failed on another process; its log says which.")
        return result

    def close(self) -> None:
        """Release worker processes and models of all heads."""
        for head in self.heads.values():
            head.close()
