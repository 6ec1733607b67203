"""Parts of a batch, dispatched to several servers within a deadline.

Every server has some workers, tasks that take the next part as soon as they are free: so a fast
server does more than a slow one. A part whose request failed goes back, and the worker that is free
first takes it. A server that cannot be reached is asked again, at growing intervals, until the time
is up; one that will never score, or fails too often in a row, is left out. When none is left, when
a failure is that of the samples, or when the time is up, the whole batch fails.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

ResultT = TypeVar("ResultT")

_FIRST_PAUSE = 0.1  # seconds; doubled with every failure in a row
_DOUBLINGS = 6  # to at most 6.4 s

_log = logging.getLogger(__name__)


class SendError(Exception):
    """A request failed.

    Args:
        cause: What went wrong, with the server's address.
        samples: Positions within the part of the samples concerned; empty: the whole part.
        again: Whether the same request to the same server may succeed later.
        elsewhere: Where it may not: whether another server may do. Otherwise the batch fails.
        costs: Whether the failure counts as one of the bounded retries; what is bound to pass, or
            a server that is started, is waited for until the time is up.
        pause: Seconds that an overloaded server asks for.
    """

    def __init__(
        self,
        cause: str,
        *,
        samples: Sequence[int] = (),
        again: bool = False,
        elsewhere: bool = False,
        costs: bool = False,
        pause: float | None = None,
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.samples = tuple(samples)
        self.again = again
        self.elsewhere = elsewhere
        self.costs = costs
        self.pause = pause


class DispatchError(Exception):
    """The batch failed.

    Args:
        cause: What went wrong.
        parts: The parts concerned.
        samples: Positions within the one part concerned; empty: all of it.
    """

    def __init__(self, cause: str, parts: Sequence[int], samples: Sequence[int] = ()) -> None:
        super().__init__(cause)
        self.cause = cause
        self.parts = tuple(parts)
        self.samples = tuple(samples)


class Dispatch(Generic[ResultT]):
    """One batch that is being sent.

    Args:
        urls: The servers' addresses; each gets as many workers as it has requests at once.
        send: Called as ``send(url, part, seconds)`` by the workers; raises ``SendError``. With
            other servers at work, a request gets half of the time that is left, so that its part
            can still be sent elsewhere.
        parts: Number of parts.
        workers: Number of requests that one server gets at once.
        retries: Number of failures in a row, of those that cost one, after which a worker still
            goes on.
        seconds: Time limit of the batch.
    """

    def __init__(
        self,
        urls: Sequence[str],
        send: Callable[[str, int, float], Awaitable[ResultT]],
        *,
        parts: int,
        workers: int,
        retries: int,
        seconds: float,
    ) -> None:
        self._send = send
        self._parts = parts
        self._retries = retries
        self._seconds = seconds
        self._todo: asyncio.PriorityQueue[int] = asyncio.PriorityQueue()
        self._results: dict[int, ResultT] = {}
        self._workers = dict.fromkeys(urls, min(workers, parts))  # that go on, by server
        self._causes: dict[str, str] = {}  # by server: the last failure; none after a success
        self._warned: set[str] = set()  # servers, once in a batch; to be overloaded is no fault
        self._done = asyncio.Event()

    async def run(self) -> list[ResultT]:
        """Send all parts; when this ends, so have all requests.

        Returns:
            What ``send`` returned, in the order of the parts.

        Raises:
            DispatchError: If a part failed for good.
        """
        self._deadline = asyncio.get_running_loop().time() + self._seconds
        for part in range(self._parts):
            self._todo.put_nowait(part)
        try:
            async with asyncio.timeout_at(self._deadline), asyncio.TaskGroup() as group:
                workers = [
                    group.create_task(self._work(url))
                    for url, count in self._workers.items()
                    for _ in range(count)
                ]
                if workers:
                    await self._done.wait()
                for worker in workers:  # an idle one waits for a part that may come back
                    worker.cancel()
        except TimeoutError:
            raise self._failure(f"not scored within {self._seconds:g} s") from None
        except ExceptionGroup as failures:
            first = failures.exceptions[0]  # which ended the others
            raise first from first.__cause__
        return [self._results[part] for part in range(self._parts)]

    async def _work(self, url: str) -> None:
        failures = costs = 0
        while True:
            part = await self._todo.get()
            if not self._workers[url]:  # its server was left out meanwhile
                self._todo.put_nowait(part)
                return
            try:
                self._results[part] = await self._send(url, part, self._share(url))
            except SendError as error:
                if not error.again and not error.elsewhere:
                    raise DispatchError(error.cause, [part], error.samples) from error
                costs += error.costs
                if not self._give_back(url, part, error, last=costs > self._retries):
                    return
                pause = _FIRST_PAUSE * 2 ** min(failures, _DOUBLINGS)
                failures += 1
                await self._rest(pause if error.pause is None else error.pause)
            else:
                failures = costs = 0
                self._causes.pop(url, None)
                if len(self._results) == self._parts:
                    self._done.set()

    def _share(self, url: str) -> float:
        left = self._deadline - asyncio.get_running_loop().time()
        others = any(
            count and other != url and other not in self._causes
            for other, count in self._workers.items()
        )
        return left / 2 if others else left

    def _give_back(self, url: str, part: int, error: SendError, *, last: bool) -> bool:
        # Whether the worker goes on.
        if url not in self._warned and error.pause is None:
            self._warned.add(url)
            then = "Asking again." if error.again else "Leaving it out."
            _log.warning("%s. %s", error.cause.rstrip("."), then)
        self._todo.put_nowait(part)
        self._causes[url] = error.cause
        if not error.again:
            self._workers[url] = 0
        elif last and self._workers[url]:
            self._workers[url] -= 1
        if not any(self._workers.values()):
            raise self._failure("no server is left")
        return error.again and not last and self._workers[url] > 0

    def _failure(self, problem: str) -> DispatchError:
        missing = [part for part in range(self._parts) if part not in self._results]
        causes = "; ".join(self._causes.values()) or "the servers are still computing"
        return DispatchError(f"{problem}: {causes}", missing)

    async def _rest(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
