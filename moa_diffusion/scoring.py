"""Rollout to reward matrix: the one place where the trainer and the reward heads meet."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from moa_diffusion.distributed import Comm, agreed, gather_shard_objects, gather_shards, shard
from moa_diffusion.processes.randomness import undisturbed
from moa_diffusion.types import Outputs, Request, RewardMatrix
from rewards import RewardBatch, RewardError, RewardHead, Scores
from rewards import create as create_head
from rewards.blame import cause_of
from rewards.option_types import UnknownOption
from rewards.progress_bar import progress_bar
from rewards.registry import defaults_of as defaults_of_head

__all__ = [
    "RewardError",
    "RewardHead",
    "Scorer",
    "UnknownOption",
    "cause_of",
    "create_head",
    "defaults_of_head",
]

logger = logging.getLogger(__name__)

WAITING = 2  # batches per head beside the one in work, before drawing waits
POLL_SECONDS = 0.5  # between two looks whether the run was asked to stop

R = TypeVar("R", bound=Request)
Extra = dict[str, Any]  # one sample's "<objective>/<column>" to a JSON value


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredOutputs:
    """What ``Scorer.draw_and_score`` returns for M requests."""

    values: Tensor  # [K, M] float64, equal on every process
    extra: list[Extra]  # M, equal on every process
    outputs: Outputs  # m, of this process in the order of ``shard``


class Scorer:
    """Runs every head on this process's samples and gathers the rewards of all processes.

    Every head has a thread of its own, in which it scores one batch after the other, while the next
    batch is drawn. A head that draws from a global random generator is then not reproducible;
    ``overlap=False`` makes it so.

    Args:
        heads: K reward heads by the objective's name.
        comm: Collectives over the processes.
        overlap: Whether heads work beside each other and beside the drawing of the next batch.
        offload: Whether heads free the accelerator's memory when a rollout is scored.
    """

    def __init__(
        self,
        heads: Mapping[str, RewardHead],
        comm: Comm,
        *,
        overlap: bool = True,
        offload: bool = False,
    ) -> None:
        self.heads = dict(heads)
        self.comm, self.overlap, self.offload = comm, overlap, offload
        self.seconds: dict[str, float] = {}  # by objective: the last scoring on this process
        self._threads = {
            name: ThreadPoolExecutor(1, f"reward-{name}", *_on_this_threads_device())
            for name in heads
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives, in the order of the matrix's rows."""
        return tuple(self.heads)

    def load(self, prompts: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
        """Have every head load what it needs, and say what it cannot judge.

        Args:
            prompts: The prompts that samples will be drawn from.

        Returns:
            By objective what its scores depend on: the head's class, its unit, and the provenance
            that it reports.

        Raises:
            RewardError: If a head failed, or processes would score with different weights.
            ProcessError: If a head failed on another process.
        """
        with agreed(self.comm):
            for head in self.heads.values():
                head.load()
                for remark in head.remarks(list(dict.fromkeys(prompts))):
                    logger.warning("Reward %s: %s", head.name, remark)
                if self.offload:
                    head.offload()
            facts = {
                name: {"head": type(head).__name__, "unit": head.unit, **head.provenance()}
                for name, head in self.heads.items()
            }
        first, *others = self.comm.gather_objects([facts])
        with agreed(self.comm):
            for rank, other in enumerate(others, start=1):
                for name in self.names:
                    if other[name] != first[name]:
                        raise RewardError(
                            f"Processes 0 and {rank} score differently: {first[name]} and "
                            f"{other[name]}.",
                            head=name,
                        )
        return facts

    @contextmanager
    def begin(self) -> Iterator[Scoring]:
        """Open a scoring that batches are added to.

        What no head has begun at the end is dropped; a head that is at work is not waited for.
        """
        scoring = Scoring(self.heads, self._threads, overlap=self.overlap)
        try:
            yield scoring
        finally:
            scoring.drop()

    def collect(
        self,
        scoring: Scoring,
        requests: Sequence[Request],
        *,
        while_waiting: Callable[[], None],
    ) -> RewardMatrix:
        """Return the rewards of a rollout whose batches were added, on every process.

        Args:
            scoring: The scoring of this process's n samples.
            requests: All N requests, in the order in which the processes hold them.
            while_waiting: Called on all processes now and then until the last head is done.

        Raises:
            RewardError: If a head failed; nothing is scored 0.
            ProcessError: If a head failed on another process.
        """
        local, extra = self._wait(scoring, while_waiting)
        return RewardMatrix(
            names=self.names,
            values=self.comm.gather(local.T.contiguous()).T,  # [K, N]
            groups=torch.tensor([request.group for request in requests]),
            prompts=tuple(request.prompt for request in requests),
            extra=tuple(self.comm.gather_objects(extra)),
        )

    def draw_and_score(
        self,
        requests: Sequence[R],
        draw: Callable[[Sequence[R]], Outputs],
        *,
        batch: int,
        title: str,
        before_batch: Callable[[], None],
        bars: bool,
        lockstep: bool = False,
    ) -> ScoredOutputs:
        """Draw and score any requests; each is drawn once, in the same batch of any process.

        Args:
            requests: The M >= 1 requests, equal on every process; these take whole batches in turn.
            draw: Outputs of n requests.
            batch: Requests per call of ``draw``.
            title: The title of the progress bar.
            before_batch: Called on all processes before each batch.
            bars: Whether this process shows a progress bar.
            lockstep: Whether ``draw`` has collective operations inside. A process that has fewer
                batches than another then draws its first once more, and drops it.

        Raises:
            RewardError, ProcessError: As ``collect``.
        """
        shards = shard(len(requests), batch, self.comm)
        # A process without a share draws the first request, which does not count.
        mine = [requests[i] for i in shards[self.comm.rank] or [0]]
        images: list[Tensor] = []
        texts: list[str] = []
        starts = range(0, len(shards[0]), batch)  # as many on every process
        with self.begin() as scoring:
            for start in progress_bar(starts, title=title, leave=False, shown=bars):
                before_batch()
                if part := mine[start : start + batch]:
                    drawn = draw(part)
                    if isinstance(drawn, Tensor):
                        images.append(drawn)
                        scoring.add(part, images=drawn)
                    else:
                        texts += drawn
                        scoring.add(part, texts=drawn)
                elif lockstep:
                    draw(mine[:batch])
            local, extra = self._wait(scoring, before_batch)  # [K, m]
        return ScoredOutputs(
            values=gather_shards(local.T, shards, self.comm).T,
            extra=gather_shard_objects(extra, shards, self.comm),
            outputs=torch.cat(images) if images else tuple(texts),
        )

    def score(
        self,
        requests: Sequence[Request],
        *,
        images: Tensor | None = None,
        texts: Sequence[str] | None = None,
    ) -> Tensor:
        """Return raw rewards ``[K, n]`` float64 of n outputs of this process; NaN = does not apply.

        Args:
            requests: The n requests, whose prompts and metadata heads see.
            images: Their images ``[n, 3, H, W]``; None if they are texts.
            texts: Their n texts; None if they are images.

        Raises:
            RewardError: If a head failed.
        """
        with self.begin() as scoring:
            scoring.add(requests, images=images, texts=texts)
            return self._finish(scoring)[0]

    def try_out(
        self, requests: Sequence[Request], outputs: Outputs, names: Sequence[str] | None = None
    ) -> None:
        """Have heads score a few outputs, for nothing but to see whether they can.

        Random numbers that later outputs or scores depend on stay as they are.

        Args:
            requests: The N requests of this process.
            outputs: The outputs that were drawn for them.
            names: The names of the heads; all by default.

        Raises:
            RewardError: If a head failed.
            ProcessError: If a head failed on another process.
        """
        chosen = {name: self.heads[name] for name in (self.names if names is None else names)}
        images = outputs if isinstance(outputs, Tensor) else None
        texts = None if isinstance(outputs, Tensor) else outputs

        with undisturbed(), agreed(self.comm):
            scoring = Scoring(chosen, self._threads, overlap=self.overlap)
            try:
                scoring.add(requests, images=images, texts=texts)
                scoring.finish()
            finally:
                scoring.drop()
            if self.offload:
                for head in chosen.values():
                    head.offload()

    def close(self) -> None:
        """Release worker processes, threads and models of all heads."""
        for thread in self._threads.values():
            thread.shutdown(wait=False, cancel_futures=True)
        for head in self.heads.values():
            head.close()

    def _wait(
        self, scoring: Scoring, while_waiting: Callable[[], None]
    ) -> tuple[Tensor, list[Extra]]:
        while self.comm.any(not scoring.ended(within=POLL_SECONDS)):
            while_waiting()
        with agreed(self.comm):
            return self._finish(scoring)

    def _finish(self, scoring: Scoring) -> tuple[Tensor, list[Extra]]:
        values, extra, self.seconds = scoring.finish()
        if self.offload:
            for head in self.heads.values():
                head.offload()
        return values, extra


class Scoring:
    """Batches on their way through the heads; made by ``Scorer.begin``."""

    def __init__(
        self,
        heads: Mapping[str, RewardHead],
        threads: Mapping[str, ThreadPoolExecutor],
        *,
        overlap: bool,
    ) -> None:
        self._heads, self._threads, self._overlap = heads, threads, overlap
        self._results: dict[str, list[Future[tuple[Scores, float]]]] = {name: [] for name in heads}
        self._added = 0  # samples
        self._lost = threading.Event()  # a failure or a stop: no further batch is begun
        self._failure: RewardError | None = None  # the first

    def add(
        self,
        requests: Sequence[Request],
        *,
        images: Tensor | None = None,
        texts: Sequence[str] | None = None,
    ) -> None:
        """Hand n outputs to every head; wait while ``WAITING`` earlier batches are not begun.

        A failure waits for ``finish``, where all processes meet.

        Args:
            requests: The n requests, whose prompts and metadata heads see.
            images: Their images ``[n, 3, H, W]``; None if they are texts.
            texts: Their n texts; None if they are images.
        """
        first, self._added = self._added, self._added + len(requests)
        for name, head in self._heads.items():
            results = self._results[name]
            wait(results[:-WAITING])
            if self._lost.is_set():
                return
            try:
                batch = RewardBatch(
                    prompts=[request.prompt for request in requests],
                    metadata=[request.metadata for request in requests],
                    # A copy each: what one head does to its images is no other's business.
                    images=None if images is None else images.clone(),
                    texts=texts,
                )
            except ValueError as error:  # NaN pixels, say
                self._failure = self._failure or RewardError(
                    f"No head can score what the policy drew: {error}"
                )
                self._lost.set()
                return
            results.append(self._threads[name].submit(self._evaluate, head, batch, first))
            if not self._overlap:
                wait(results)

    def ended(self, *, within: float) -> bool:
        """Return whether all is scored, or something failed, after at most so many seconds."""
        results = [result for of_head in self._results.values() for result in of_head]
        pending = wait(results, within, return_when=FIRST_EXCEPTION).not_done
        return not pending or self._lost.is_set()

    def finish(self) -> tuple[Tensor, list[Extra], dict[str, float]]:
        """Wait for the heads, or for the first failure.

        Returns:
            Raw rewards ``[K, n]`` float64, what heads add to each of the n samples, and seconds
            by objective.

        Raises:
            RewardError: If a head failed.
        """
        results = [result for of_head in self._results.values() for result in of_head]
        wait(results, return_when=FIRST_EXCEPTION)
        if self._failure is not None:
            raise self._failure
        rows, columns, seconds = [], {}, {}
        for name, results in self._results.items():
            parts = [result.result() for result in results]
            rows.append(torch.cat([scores.values.double() for scores, _ in parts]))
            seconds[name] = sum(spent for _, spent in parts)
            for column in {column for scores, _ in parts for column in scores.extra}:
                columns[f"{name}/{column}"] = [
                    cell
                    for scores, _ in parts
                    for cell in scores.extra.get(column, [None] * len(scores.values))
                ]
        extra = [
            {column: cells[i] for column, cells in sorted(columns.items())}
            for i in range(len(rows[0]))
        ]
        return torch.stack(rows), extra, seconds

    def drop(self) -> None:
        """Take back what no head has begun."""
        self._lost.set()

    def _evaluate(self, head: RewardHead, batch: RewardBatch, first: int) -> tuple[Scores, float]:
        """Return the scores and the seconds they took; ``first`` is the batch's first sample."""
        if self._lost.is_set():
            raise _Skipped
        start = time.perf_counter()
        try:
            return head.evaluate(batch), time.perf_counter() - start
        except BaseException as error:  # a user's code may even call `sys.exit`
            if not isinstance(error, RewardError):
                failure = RewardError(cause_of(error), head=head.name)
            else:
                samples = [(first + index, prompt) for index, prompt in error.samples]
                failure = RewardError(error.cause, head=error.head, samples=samples)
            failure.__cause__ = error
            self._failure = self._failure or failure
            self._lost.set()  # after the failure is known: this is what others wait for
            raise


class _Skipped(Exception):
    """The scoring was lost before this batch began."""


def _on_this_threads_device() -> tuple[Callable[[int], None], tuple[int]] | tuple[()]:
    """Have a thread begin on the accelerator of this one; threads begin on the first."""
    if not torch.cuda.is_available():
        return ()
    return torch.cuda.set_device, (torch.cuda.current_device(),)
