"""Parts of a batch, dispatched to several servers within a deadline.

Every server has some workers, threads that take the next part as soon as they are free: so a fast
server does more than a slow one. A part whose request failed goes back, and the worker that is free
first takes it. A server that cannot be reached is asked again, at growing intervals, until the time
is up; one that will never score, or fails too often in a row, is left out. When none is left, when
a failure is that of the samples, or when the time is up, the whole batch fails.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
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
        urls: The servers.
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
        send: Callable[[str, int, float], ResultT],
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
        self._deadline = time.monotonic() + seconds
        self._todo = deque(range(parts))
        self._results: dict[int, ResultT] = {}
        self._workers = dict.fromkeys(urls, min(workers, parts))  # that go on, by server
        self._causes: dict[str, str] = {}  # of the last failure, by server; none after a success
        self._warned: set[str] = set()  # servers, once in a batch; to be overloaded is no fault
        self._fatal: tuple[int, Exception] | None = None  # part, error
        self._over = False
        self._changed = threading.Condition()

    def run(self) -> list[ResultT]:
        """Send all parts.

        Returns:
            What ``send`` returned, in the order of the parts.

        Raises:
            SpreadError: If a part failed for good.
        """
        for url, count in list(self._workers.items()):
            for _ in range(count):
                threading.Thread(target=self._work, args=(url,), daemon=True).start()
        with self._changed:
            try:
                self._changed.wait_for(self._settled, timeout=self._left())
                return self._outcome()
            finally:
                self._over = True
                self._changed.notify_all()

    def _settled(self) -> bool:
        done = len(self._results) == self._parts
        return done or self._fatal is not None or not any(self._workers.values())

    def _outcome(self) -> list[ResultT]:
        if self._fatal is not None:
            part, error = self._fatal
            if isinstance(error, SendError):
                raise DispatchError(error.cause, [part], error.samples) from error
            raise error
        missing = [part for part in range(self._parts) if part not in self._results]
        if not missing:
            return [self._results[part] for part in range(self._parts)]
        problem = "no server is left" if self._left() else f"not scored within {self._seconds:g} s"
        causes = "; ".join(self._causes.values()) or "the servers are still computing"
        raise DispatchError(f"{problem}: {causes}", missing)

    def _work(self, url: str) -> None:
        failures = costs = 0
        while (part := self._take(url)) is not None:
            try:
                result = self._send(url, part, self._share(url))
            except SendError as error:
                pause = _FIRST_PAUSE * 2 ** min(failures, _DOUBLINGS)
                failures += 1
                costs += error.costs
                if not self._give_back(url, part, error, last=costs > self._retries):
                    return
                self._rest(pause if error.pause is None else error.pause)
            except Exception as error:  # raised by `run`, in the thread that can handle it
                self._stop(part, error)
                return
            else:
                failures = costs = 0
                with self._changed:
                    self._results[part] = result
                    self._causes.pop(url, None)
                    self._changed.notify_all()

    def _take(self, url: str) -> int | None:
        with self._changed:
            # An idle worker stays: a part may come back from another.
            self._changed.wait_for(
                lambda: self._todo or self._over or not self._workers[url], timeout=self._left()
            )
            if self._over or not self._todo or not self._workers[url] or not self._left():
                return None
            return self._todo.popleft()

    def _share(self, url: str) -> float:
        with self._changed:
            others = any(
                count and other != url and other not in self._causes
                for other, count in self._workers.items()
            )
        return self._left() / 2 if others else self._left()

    def _give_back(self, url: str, part: int, error: SendError, *, last: bool) -> bool:
        # Whether the worker goes on.
        if not error.again and not error.elsewhere:
            self._stop(part, error)
            return False
        with self._changed:
            if url not in self._warned and error.pause is None and not self._over:
                self._warned.add(url)
                then = "Asking again." if error.again else "Leaving it out."
                _log.warning("%s. %s", error.cause.rstrip("."), then)
            self._todo.appendleft(part)
            self._causes[url] = error.cause
            if not error.again:
                self._workers[url] = 0
            elif last and self._workers[url]:
                self._workers[url] -= 1
            going = error.again and not last and self._workers[url] > 0
            self._changed.notify_all()
        return going

    def _stop(self, part: int, error: Exception) -> None:
        with self._changed:
            self._fatal = self._fatal or (part, error)
            self._changed.notify_all()

    def _rest(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._over, timeout=min(seconds, self._left()))

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())
