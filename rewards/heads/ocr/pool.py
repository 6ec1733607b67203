"""Worker processes that read pictures. Both ends of the pipe stand in this file.

Why not ``multiprocessing``: its spawned children import the main script again, and with it torch
and every model library, once per worker; its forked children inherit locks, threads and signal
handlers of a process that trains. Here a worker is this very file run as a program: it starts in
the time its engine takes to load, from any kind of parent (torchrun, accelerate, a notebook).

A worker ignores SIGINT and SIGTERM, because the parent decides when a batch is given up, and ends
when its pipe closes or its parent is gone, however the parent went.

The protocol: two lengths, a JSON header, raw bytes. The first request names the engine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

START_SECONDS = 120.0  # loading an engine takes 1 to 3 s on an idle machine
_CLOSE_SECONDS = 2.0
_LENGTHS = struct.Struct("<II")


class PoolError(RuntimeError):
    """Some pictures were not read.

    Args:
        cause: What went wrong.
        indices: Positions, in the list that was to be read, of the pictures concerned.
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
        options: Keyword arguments of the class; they travel as JSON.
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
        """Read pictures ``[H, W, 3]``, uint8, RGB.

        Args:
            images: The pictures.
            timeout: Seconds until the whole batch must be read; starting the workers comes on top.

        Returns:
            The lines in every picture, in the order of the pictures.

        Raises:
            PoolError: If an engine does not start, fails on a picture, dies or is late. After a
                death or a delay all workers are replaced at the next batch.
        """
        with self._one_batch:
            try:
                return self._read(images, timeout)
            except PoolError:
                raise
            except BaseException:  # Ctrl-C included: half-read pipes are of no use to a next batch
                _end(self._workers, self._owner, at_once=True)
                raise

    def close(self) -> None:
        """End the workers. A later ``read`` starts new ones."""
        _end(self._workers, self._owner)

    def _read(self, images: Sequence[np.ndarray], timeout: float) -> list[list[str]]:
        self._start(min(self.size, len(images)))
        answers: list[list[str] | None] = [None] * len(images)
        failures: list[tuple[int, str]] = []  # index, cause
        deaths: list[tuple[int, str]] = []
        todo = deque(range(len(images)))

        def serve(worker: _Worker) -> None:
            while not deaths:
                try:
                    index = todo.popleft()
                except IndexError:
                    return
                try:
                    image = images[index]
                    reply = worker.ask({"shape": image.shape}, image)
                except (OSError, EOFError, ValueError):  # ValueError: the pool was closed
                    deaths.append((index, worker.obituary()))
                    return
                if "error" in reply:
                    failures.append((index, reply["error"]))
                else:
                    answers[index] = reply["lines"]

        in_time = _in_threads(serve, self._workers, timeout)
        died = list(deaths)  # before the workers are killed, which is a death of its own
        if not in_time or died:
            _end(self._workers, self._owner, at_once=True)
        if died:
            raise PoolError(_first_causes(died), sorted(index for index, _ in died))
        if failures:
            raise PoolError(_first_causes(failures), sorted(index for index, _ in failures))
        if not in_time:
            late = [index for index, answer in enumerate(answers) if answer is None]
            raise PoolError(
                f"{len(late)} of {len(images)} pictures were not read within {timeout:g} s.", late
            )
        return [answer for answer in answers if answer is not None]

    def _start(self, count: int) -> None:
        if self._owner != os.getpid():  # after a fork: these workers answer to the parent process
            for worker in self._workers:
                worker.let_go()
            self._workers.clear()
            self._finalizer.detach()
            self._owner = os.getpid()
            self._finalizer = weakref.finalize(self, _end, self._workers, self._owner)
        new = [_Worker() for _ in range(count - len(self._workers))]
        self._workers.extend(new)
        causes: list[str] = []

        def greet(worker: _Worker) -> None:
            try:
                # The parent's import path, so that both sides find the same packages.
                reply = worker.ask({**self._hello, "path": sys.path, "parent": os.getpid()})
            except (OSError, EOFError, ValueError):
                causes.append(worker.obituary())
                return
            if "error" in reply:
                causes.append(reply["error"])

        if not _in_threads(greet, new, START_SECONDS):
            causes.append(f"No answer within {START_SECONDS:g} s.")
        if causes:
            _end(self._workers, self._owner, at_once=True)
            raise PoolError(f"The OCR engine did not start: {causes[0]}", [])


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self) -> None:
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            # -P: the folder of this file holds modules with common names; keep it off the path.
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **one_thread, "OPENCV_FOR_THREADS_NUM": "1"},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, header: Mapping[str, Any], image: np.ndarray | None = None) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        payload = b"" if image is None else np.ascontiguousarray(image).data.cast("B")
        _send(self._process.stdin, header, payload)
        return _receive(self._process.stdout)[0]

    def obituary(self) -> str:
        try:
            status = self._process.wait(timeout=_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            return f"OCR worker {self.pid} closed its pipe."
        if status < 0:
            return f"OCR worker {self.pid} was killed by signal {-status}."
        return f"OCR worker {self.pid} ended with exit status {status}."

    def hang_up(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died with a request half written
            self._process.stdin.close()

    def let_go(self) -> None:
        # Closes this process's copies of the pipes; the worker goes on.
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def end(self, deadline: float) -> None:
        try:
            self._process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def kill(self) -> None:
        self._process.kill()


def _end(workers: list[_Worker], owner: int, at_once: bool = False) -> None:
    if os.getpid() != owner:  # a forked child must not end the workers of its parent
        return
    ending, workers[:] = workers[:], []
    for worker in ending:
        if at_once:
            worker.kill()
        worker.hang_up()
    deadline = time.monotonic() + _CLOSE_SECONDS
    for worker in ending:
        worker.end(deadline)


def _in_threads(
    function: Callable[[_Worker], None], workers: Sequence[_Worker], seconds: float
) -> bool:
    """Call the function for every worker at once; say whether all calls ended in time."""
    threads = [threading.Thread(target=function, args=(w,), daemon=True) for w in workers]
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def _first_causes(failures: Sequence[tuple[int, str]]) -> str:
    causes = list(dict.fromkeys(cause for _, cause in sorted(failures)))
    return " ".join(causes[:3])


# --- both ends ---------------------------------------------------------------------------------


def _send(stream: Any, header: Mapping[str, Any], payload: bytes | memoryview = b"") -> None:
    text = json.dumps(header).encode()
    stream.write(_LENGTHS.pack(len(text), len(payload)))
    stream.write(text)
    stream.write(payload)
    stream.flush()


def _receive(stream: Any) -> tuple[dict[str, Any], bytes]:
    text_length, payload_length = _LENGTHS.unpack(_exactly(stream, _LENGTHS.size))
    header = json.loads(_exactly(stream, text_length))
    return header, _exactly(stream, payload_length)


def _exactly(stream: Any, length: int) -> bytes:
    data: bytes = stream.read(length)
    if len(data) < length:
        raise EOFError("The other end of the pipe was closed.")
    return data


# --- the worker's end --------------------------------------------------------------------------


def _work() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # The pipes get numbers of their own: whatever a library prints then goes to stderr.
    requests: BinaryIO = os.fdopen(os.dup(0), "rb")
    replies: BinaryIO = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        hello, _ = _receive(requests)
        threading.Thread(target=_follow_parent, args=(hello["parent"],), daemon=True).start()
        engine, reply = _load(hello)
        _send(replies, reply)
        while engine is not None:
            header, payload = _receive(requests)
            image = np.frombuffer(payload, dtype=np.uint8).reshape(header["shape"])
            try:
                _send(replies, {"lines": [str(line) for line in engine.read(image)]})
            except (EOFError, BrokenPipeError):
                raise
            except Exception as error:  # told to the parent, which raises it with the sample
                _send(replies, {"error": f"{type(error).__name__}: {error}"})
    except (EOFError, BrokenPipeError):  # the parent hung up
        pass
    os._exit(0)  # engines keep threads; none of them has anything left to do


def _load(hello: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
    sys.path[:] = hello["path"]
    try:
        spec = importlib.util.spec_from_file_location("_engine", hello["file"])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return vars(module)[hello["name"]](**hello["options"]), {}
    except Exception as error:  # told to the parent, which raises it
        return None, {"error": f"{type(error).__name__}: {error}"}


def _follow_parent(parent: int) -> None:
    # The pipe may outlive the parent in a process forked from it, and an engine may hang.
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    _work()
