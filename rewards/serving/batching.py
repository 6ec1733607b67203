"""Requests of several clients, scored by one head in one call: each gets its own scores back.

A head is called by one thread only, since heads need not bear more. While it computes, requests
queue up and become the next batch; when it is idle, the first request waits a few milliseconds for
company. Requests for images of one size, or for texts, share a batch.

Scores may differ in the last digits from those of a smaller batch: matrix products are summed in
another order.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

import torch

from rewards.base import RewardHead, Scores
from rewards.serving.wire import Samples, sliced

_WINDOW_SECONDS = 0.005
_GOODBYE_SECONDS = 30.0


class Overloaded(RuntimeError):
    """More samples wait than the queue holds, or the server is stopping."""


class Batcher:
    """One head, its thread and its queue.

    Args:
        head: The head; called by the batcher alone from now on.
        max_batch: Samples scored in one call; a larger request is scored by itself.
        max_queue: Samples that may be under way at once.
        max_batch_pixels: As ``max_batch``, for the pixels of its images.
        max_queue_pixels: As ``max_queue``, for their pixels.
    """

    def __init__(
        self,
        head: RewardHead,
        *,
        max_batch: int,
        max_queue: int,
        max_batch_pixels: int,
        max_queue_pixels: int,
    ) -> None:
        self.head = head
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.max_batch_pixels = max_batch_pixels
        self.max_queue_pixels = max_queue_pixels
        self._samples = 0  # admitted and not finished
        self._pixels = 0  # pixels of these samples
        self._jobs: deque[_Job] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"head {head.name}", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether requests are being scored."""
        return self._thread.is_alive() and not self._closed

    def admit(self, count: int, pixels: int) -> None:
        """Make room for samples with so many pixels, before anything is spent on decoding them.

        Raises:
            Overloaded: If there is none, or the batcher is closed.
        """
        with self._changed:
            if self._closed:
                raise Overloaded("The server is stopping.")
            if self._samples + count > self.max_queue:
                raise Overloaded(f"{self._samples} samples wait already.")
            if self._pixels + pixels > self.max_queue_pixels:
                raise Overloaded(f"Images of {self._pixels} pixels wait already.")
            self._samples += count
            self._pixels += pixels

    def release(self, count: int, pixels: int) -> None:
        """Give back room that was made and is not needed."""
        with self._changed:
            self._samples -= count
            self._pixels -= pixels

    def submit(self, samples: Samples) -> Future[Scores]:
        """Queue samples that were admitted; their room is given back when the future is done.

        Returns:
            The scores; or a ``RewardError``, whose samples are counted within these; or
            ``Overloaded``, if the batcher is closed. What is cancelled in time is not scored.
        """
        job = _Job(samples)
        with self._changed:
            if self._closed:
                job.future.set_exception(Overloaded("The server is stopping."))
            else:
                self._jobs.append(job)
            self._changed.notify()
        # Outside the lock: the callback of a future that is done already runs at once.
        job.future.add_done_callback(lambda _: self._forget(job))
        return job.future

    def close(self) -> None:
        """Let the batch under way finish, fail those that wait, and close the head."""
        with self._changed:
            self._closed = True
            waiting, self._jobs = self._jobs, deque()
            self._changed.notify()
        for job in waiting:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(Overloaded("The server is stopping."))
        self._thread.join(_GOODBYE_SECONDS)
        if not self._thread.is_alive():  # a head must not be closed under a thread that it holds up
            self.head.close()

    def _forget(self, job: _Job) -> None:
        with self._changed:
            self._samples -= len(job.samples)
            self._pixels -= job.pixels
            if job in self._jobs:  # cancelled: its images must not wait behind a slow head
                self._jobs.remove(job)

    def _work(self) -> None:
        while (jobs := self._next()) is not None:
            self._score([job for job in jobs if job.future.set_running_or_notify_cancel()])
            del jobs  # the images, while waiting for others

    def _next(self) -> list[_Job] | None:
        # The next jobs to score together; None once the batcher is closed.
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if self._closed:
                return None
            kind = self._jobs[0].kind
            most = self._most(kind)
            until = time.monotonic() + _WINDOW_SECONDS
            while self._waiting(kind) < most and not self._closed:
                if not self._changed.wait(max(0.0, until - time.monotonic())):
                    break
            chosen: list[_Job] = []
            total = 0
            for job in [job for job in self._jobs if job.kind == kind]:
                if chosen and total + len(job.samples) > most:
                    break
                chosen.append(job)
                total += len(job.samples)
            for job in chosen:
                self._jobs.remove(job)
        return chosen

    def _most(self, kind: tuple[int, ...]) -> int:
        # Samples of a batch; images of one kind have equally many pixels.
        if not kind:
            return self.max_batch
        return min(self.max_batch, self.max_batch_pixels // math.prod(kind))

    def _waiting(self, kind: tuple[int, ...]) -> int:
        return sum(len(job.samples) for job in self._jobs if job.kind == kind)

    def _score(self, jobs: Sequence[_Job]) -> None:
        if not jobs:
            return
        try:
            scores = self.head.evaluate(_merged([job.samples for job in jobs]).batch())
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            for job in jobs:  # one bad sample must not fail the requests of others
                self._score([job])
            return
        start = 0
        for job in jobs:
            stop = start + len(job.samples)
            job.future.set_result(sliced(scores, start, stop))
            start = stop


class _Job:
    """Samples that wait for their scores."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        # Height and width of the images; empty for texts.
        self.kind = () if samples.images is None else tuple(samples.images.shape[2:])
        self.pixels = len(samples) * math.prod(self.kind) if self.kind else 0
        self.future: Future[Scores] = Future()


def _merged(parts: Sequence[Samples]) -> Samples:
    if len(parts) == 1:
        return parts[0]
    prompts = [prompt for part in parts for prompt in part.prompts]
    # Empty stands for no metadata at all, and here others may have some.
    metadata = [entry for part in parts for entry in part.metadata or [{}] * len(part)]
    texts = [text for part in parts for text in part.texts or ()]
    images = [part.images for part in parts if part.images is not None]
    if not images:
        return Samples(prompts=prompts, metadata=metadata, texts=texts)
    return Samples(prompts=prompts, metadata=metadata, images=torch.cat(images))
