"""Worker processes that read images. Both ends of the pipe stand in this file.

Why not ``multiprocessing``'s own processes: its spawned children import the main script again, and
with it torch and every model library, once per worker; its forked children inherit locks, threads
and signal handlers of a process that trains. Here a worker is this very file run as a program: it
starts in the time its engine takes to load, from any kind of parent (torchrun, accelerate, a
notebook). Why not threads: one that hangs could not be ended, and an engine that crashes would end
the process that trains. Why not loky: when a worker dies, it does not tell which image it read.

A worker ignores SIGINT and SIGTERM, because the parent decides when a batch is given up, and ends
when its pipe closes or its parent is gone, however the parent went. It has nothing to save, so it
is ended by SIGKILL.

The first request names the engine, each further one is an image; the answer is a list of lines,
or a text that says what went wrong.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

START_SECONDS = 120.0  # loading an engine takes 1 to 3 s on an idle machine
_DEATH_SECONDS = 2.0  # from the end of a worker's pipe to its own


class PoolError(RuntimeError):
    """Some images were not read.

    Args:
        cause: What went wrong.
        indices: Positions, in the list that was to be read, of the images concerned.
    """

    def __init__(self, cause: str, indices: Sequence[int]) -> None:
        super().__init__(cause)
        self.cause = cause
        self.indices = tuple(indices)


class WorkerPool:
    """Up to ``size`` processes with one engine each; they start with the first batch.

    Args:
        file: Python file that defines the engine; see ``rewards.heads.ocr.engines``.
        name: Name of the engine class in it.
        options: Keyword arguments of the class.
        size: Number of processes, at least 1.
    """

    def __init__(self, file: Path, name: str, options: Mapping[str, Any], size: int) -> None:
        self.size = size
        self._hello = {"file": str(file), "name": name, "options": dict(options)}
        self._workers: list[_Worker] = []
        self._owner = os.getpid()
        self._one_batch = threading.Lock()
        # Runs at interpreter exit too, unless `close` came first.
        self._finalizer = weakref.finalize(self, _end, self._workers, self._owner)

    def read(self, images: Sequence[np.ndarray], timeout: float) -> list[list[str]]:
        """Read images ``[H, W, 3]``, uint8, RGB.

        Args:
            images: The images to read.
            timeout: Seconds until the whole batch must be read; starting the workers comes on top.

        Returns:
            The lines in every image, in the order of the images.

        Raises:
            PoolError: If an engine does not start, fails on an image, dies or is late. After a
                death or a delay all workers are replaced at the next batch.
        """
        with self._one_batch:
            try:
                return self._read(images, timeout)
            except PoolError:
                raise
            except BaseException:  # Ctrl-C included: half-read pipes are of no use to a next batch
                self.close()
                raise

    def close(self) -> None:
        """End the workers. A later ``read`` starts new ones."""
        _end(self._workers, self._owner)

    def _read(self, images: Sequence[np.ndarray], timeout: float) -> list[list[str]]:
        self._start(min(self.size, len(images)))
        lines, failures, deaths = _exchange(self._workers, images, timeout)
        late = sorted(set(range(len(images))) - set(lines) - set(failures))
        if late:
            self.close()
        for causes in (deaths, failures):
            if causes:
                raise PoolError(_first(causes), sorted(causes))
        if late:
            raise PoolError(
                f"{len(late)} of {len(images)} images were not read within {timeout:g} s.", late
            )
        return [lines[index] for index in range(len(images))]

    def _start(self, count: int) -> None:
        if self._owner != os.getpid():  # after a fork: these workers answer to the parent process
            self._workers.clear()
            self._finalizer.detach()
            self._owner = os.getpid()
            self._finalizer = weakref.finalize(self, _end, self._workers, self._owner)
        new = [_Worker() for _ in range(count - len(self._workers))]
        self._workers.extend(new)
        # The parent's import path, so that both sides find the same packages.
        hello = {**self._hello, "path": sys.path, "parent": os.getpid()}
        greeted, failures, deaths = _exchange(new, [hello] * len(new), START_SECONDS)
        if len(greeted) < len(new):
            self.close()
            cause = _first(deaths | failures) or f"No answer within {START_SECONDS:g} s."
            raise PoolError(f"The OCR engine did not start: {cause}", [])


class _Worker:
    """The parent's end of one worker process. Its pipe closes with the last reference to it."""

    def __init__(self) -> None:
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                # -P: the folder of this file holds modules with common names; keep it off the path.
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # whatever a library prints
                env={**os.environ, **one_thread, "OPENCV_FOR_THREADS_NUM": "1"},
                pass_fds=[theirs.fileno()],
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def obituary(self) -> str:
        try:
            status = self._process.wait(timeout=_DEATH_SECONDS)
        except subprocess.TimeoutExpired:
            return f"OCR worker {self.pid} closed its pipe."
        if status < 0:
            return f"OCR worker {self.pid} was killed by signal {-status}."
        return f"OCR worker {self.pid} ended with exit status {status}."

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.wait()


def _exchange(
    workers: Sequence[_Worker], requests: Sequence[Any], seconds: float
) -> tuple[dict[int, list[str]], dict[int, str], dict[int, str]]:
    """Give each worker a request at a time, until all are answered, one died or the time is up.

    Returns:
        The lines, what engines raised and what ended workers, by the position of the request.
    """
    lines: dict[int, list[str]] = {}
    failures: dict[int, str] = {}
    deaths: dict[int, str] = {}
    deadline = time.monotonic() + seconds
    todo = deque(enumerate(requests))
    idle = list(workers)
    busy: dict[Connection, tuple[int, _Worker]] = {}
    while True:
        while idle and todo and not deaths:
            (index, request), worker = todo.popleft(), idle.pop()
            busy[worker.pipe] = index, worker
            with contextlib.suppress(OSError):  # that it is dead shows when it should answer
                worker.pipe.send(request)
        ready = wait(busy, max(0.0, deadline - time.monotonic())) if busy else []
        if not ready:
            return lines, failures, deaths
        for pipe in [pipe for pipe in busy if pipe in ready]:
            index, worker = busy.pop(pipe)
            try:
                answer = pipe.recv()
            except (EOFError, OSError):
                deaths[index] = worker.obituary()
                continue
            (lines if isinstance(answer, list) else failures)[index] = answer
            idle.append(worker)


def _end(workers: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:  # a forked child must not end the workers of its parent
        return
    ending, workers[:] = workers[:], []
    for worker in ending:
        worker.kill()
    for worker in ending:
        worker.wait()


def _first(causes: Mapping[int, str]) -> str:
    return " ".join(list(dict.fromkeys(causes[index] for index in sorted(causes)))[:3])


# --- the worker's end --------------------------------------------------------------------------


def _work(pipe: Connection) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):  # the parent hung up
        hello = pipe.recv()
        threading.Thread(target=_follow_parent, args=(hello["parent"],), daemon=True).start()
        try:
            engine = _load(hello)
        except Exception as error:  # told to the parent, which raises it
            pipe.send(f"{type(error).__name__}: {error}")
            os._exit(1)
        pipe.send([])
        while True:
            image = pipe.recv()
            answer: list[str] | str
            try:
                answer = [str(line) for line in engine.read(image)]
            except Exception as error:  # likewise, with the sample
                answer = f"{type(error).__name__}: {error}"
            pipe.send(answer)
    os._exit(0)  # engines keep threads; none of them has anything left to do


def _load(hello: Mapping[str, Any]) -> Any:
    sys.path[:] = hello["path"]
    spec = importlib.util.spec_from_file_location("_engine", hello["file"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)[hello["name"]](**hello["options"])


def _follow_parent(parent: int) -> None:
    # The pipe may outlive the parent in a process forked from it, and an engine may hang.
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    _work(Connection(int(sys.argv[1])))
