"""Coroutines run to their end from blocking code, wherever that code runs."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class LoopRunner:
    """An event loop for coroutines that are called from blocking code.

    It is the same loop until ``close``: a client that keeps connections open, as those of httpx and
    aiohttp do, cannot be used on another loop. Where the calling thread runs a loop of its own, as
    a notebook does, the coroutine runs in another thread, and this one waits.
    """

    def __init__(self) -> None:
        self._runner: asyncio.Runner | None = None

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end.

        Returns:
            What it returns.

        Raises:
            RuntimeError: If it was cancelled from within.
            Exception: Whatever the coroutine raises.
        """
        if self._runner is None:
            self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
            weakref.finalize(self, _close, self._runner)  # for those who never call `close`
        try:
            if _in_a_loop():
                return _run_in_thread(self._runner, coroutine)
            return self._runner.run(coroutine)
        except asyncio.CancelledError as error:  # no `Exception`, so it would pass for an exit
            raise RuntimeError("The coroutine was cancelled.") from error

    def close(self) -> None:
        """Close the loop; the next coroutine opens another."""
        runner, self._runner = self._runner, None
        if runner is not None:
            _close(runner)


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


def _close(runner: asyncio.Runner) -> None:
    """Close the loop; nothing happens the second time."""
    if _in_a_loop():
        with ThreadPoolExecutor(1) as executor:
            executor.submit(runner.close).result()
    else:
        runner.close()


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _run_in_thread(runner: asyncio.Runner, coroutine: Coroutine[Any, Any, T]) -> T:
    loop = runner.get_loop()

    ended = threading.Event()

    def work() -> T:
        try:
            with torch.no_grad():  # gradients are switched off by thread
                return runner.run(coroutine)
        finally:
            ended.set()

    def cancel() -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel()

    with ThreadPoolExecutor(1) as executor:
        try:
            return executor.submit(work).result()
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(cancel)  # or leaving the block would wait for the coroutine
            ended.wait()  # leaving it does not, if the signal came while the thread was started
            raise
