"""Processes, and waiting for what must come: the one clock that tests read, which only ends a hang.

A machine may be busy, so no test says how long something takes, and none fails because it took
long. What has to end before something else is shown by events and by the order of what happens.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HANG = 1200.0  # seconds; what takes longer hangs, however busy the machine is
# Seconds for tests of a deadline that some work has to meet: where the first is too short on a busy
# machine, the next is tried.
DEADLINES = (0.5, 5.0, 50.0, 500.0)


def wait_until(condition: Callable[[], object], failure: str) -> None:
    """Returns as soon as the condition holds; fails with these words if it never does."""
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, f"{failure} within {HANG:g} s"
        time.sleep(0.02)


def wait_for(path: Path, process: subprocess.Popen[Any]) -> None:
    """Returns as soon as a process has written a file."""
    wait_until(lambda: path.exists() or process.poll() is not None, f"{path} did not appear")
    assert path.exists(), "the process ended early"


@contextlib.contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the test, however that ends."""
    with subprocess.Popen(command, text=True, **options) as process:  # closes pipes at the end
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()  # a launcher ends its processes, which a kill would leave
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()


# For a test file that is run as a script: where it finds this module.
AS_SCRIPT = {
    "PYTHONPATH": os.pathsep.join(
        filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
    )
}


WARM = "WARM_PYTHON"  # names the program for the workers of one run of the tests


def warm_python() -> Path:
    """Starts what `python` returns, and does not wait until it is ready."""
    folder = Path(tempfile.mkdtemp(prefix="python-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    here = Path(__file__).parent
    server = subprocess.Popen(
        [sys.executable, str(here / "warm_server.py"), str(folder / "socket")],
        stdin=subprocess.PIPE,  # never written to: its end is the end of this process
        start_new_session=True,
    )
    program = folder / "python"
    words = (sys.executable, "-IS", str(here / "warm_client.py"), sys.executable, folder / "socket")
    program.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$0" "$@"\n')
    program.chmod(0o755)
    atexit.register(server.communicate)
    return program


@functools.cache
def python() -> str:
    """A program that does what `sys.executable` does, without the seconds of importing torch.

    On Linux its processes are forks of one that has imported it.
    """
    if sys.platform != "linux":
        return sys.executable
    program = Path(os.environ.get(WARM) or warm_python())
    socket, failed = (program.parent / name for name in ("socket", "failed"))
    wait_until(lambda: socket.exists() or failed.exists(), "the server did not start")
    assert not failed.exists(), "the process that tests fork could not import: see its traceback"
    return str(program)


def two_processes(script: str, folder: Path) -> list[str]:
    """Starts a script twice, as torchrun would, with the folder as argument; what each wrote.

    The store where they meet is this process's: a port that is free now may soon be another's.
    """
    from torch.distributed import TCPStore  # not by who hands out tests, who imports this module

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = (
        os.environ
        | AS_SCRIPT
        | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
    )
    logs = [folder / f"output-{rank}.txt" for rank in range(2)]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                running(
                    [python(), script, str(folder)],
                    env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    cwd=Path(__file__).parents[1],
                    stdout=stack.enter_context(log.open("w")),
                    stderr=subprocess.STDOUT,
                )
            )
            for rank, log in enumerate(logs)
        ]
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(HANG) == 0, log.read_text()
    return [log.read_text() for log in logs]
