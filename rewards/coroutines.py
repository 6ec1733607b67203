"""Coroutines run to their end from blocking code, wherever that code runs."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

T = TypeVar("T")


class LoopRunner:
    """An event loop, in a thread of its own, for coroutines that are called from blocking code.

    It is the same loop until ``close``: a client that keeps connections open, as those of httpx and
    aiohttp do, cannot be used on another loop. Any thread may call, also one that runs a loop of
    its own, as a notebook does: it waits.
    """

    def __init__(self) -> None:
        self._portal: BlockingPortal | None = None
        self._end: Callable[[], object] = lambda: None
        self._lock = threading.Lock()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end; an interruption of the waiting cancels it.

        Returns:
            What it returns.

        Raises:
            RuntimeError: If it was cancelled from within.
            Exception: Whatever the coroutine raises.
        """
        future = self._opened().start_task_soon(lambda: coroutine)
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise RuntimeError("The coroutine was cancelled.") from error
        finally:
            future.cancel()  # where it is not done: Ctrl-C

    def close(self) -> None:
        """Close the loop, and cancel what still runs on it; the next coroutine opens another."""
        with self._lock:
            self._portal = None
            self._end()

    def _opened(self) -> BlockingPortal:
        with self._lock:
            if self._portal is None:
                from anyio.from_thread import start_blocking_portal

                context = start_blocking_portal()
                self._portal = context.__enter__()
                # For those who never call `close`; nothing happens the second time.
                self._end = weakref.finalize(self, _end, self._portal, context)
                device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
                self._portal.call(_begin, device)
            return self._portal


async def gather(calls: Sequence[Callable[[], Awaitable[T]]], *, concurrency: int) -> list[T]:
    """Await all calls, at most ``concurrency`` of them at a time; a failure cancels the others.

    Returns:
        The results, in the order of the calls.

    Raises:
        ExceptionGroup: With the failures of all calls that had failed before the others were
            cancelled.
    """
    results: dict[int, T] = {}
    rest = iter(enumerate(calls))

    async def work() -> None:
        for index, call in rest:  # every worker takes from the same
            results[index] = await call()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(calls))):
            group.create_task(work())
    return [results[index] for index in range(len(calls))]


def _begin(device: int | None) -> None:
    # Gradients are switched off by thread, and a thread begins on the first accelerator.
    torch.set_grad_enabled(False)
    if device is not None:
        torch.cuda.set_device(device)


def _end(portal: BlockingPortal, context: AbstractContextManager[BlockingPortal]) -> None:
    portal.call(portal.stop, True)
    context.__exit__(None, None, None)
