"""What it costs to have images scored by a reward server on the same machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.phases import machine
from benchmarks.remote_ends import HEAD

ROOT = Path(__file__).parents[3]
ENDS = Path(__file__).with_name("remote_ends.py")
SIDE = 256  # pixels
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def measure_remote(images: int, *, rounds: int, against: Path | None = None) -> dict[str, Any]:
    """Score images in a process and through a server, interleaved.

    Args:
        images: Number of images in a batch.
        rounds: Measured rounds, after one that warms up.
        against: Another checkout, measured in turns with this one.

    Returns:
        A list ``rows`` by ``tree`` and ``way``, ``local`` or ``remote``, with medians of the
        images ``per_second`` and of the CPU milliseconds per image of the process that asks,
        ``client``, and of the server's, ``server``.

    Raises:
        RuntimeError: If a process ends early; it has said why.
    """
    trees = [ROOT, *([against.expanduser().resolve()] if against else [])]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(_program(tree, "serve", tree / "scripts" / "heads.py"))
            for tree in trees
        ]
        clients = [stack.enter_context(_program(tree, "score", images, SIDE)) for tree in trees]
        for server, client in zip(servers, clients, strict=True):
            url = next(word for word in _heard(server, "Serving") if word.startswith("http"))
            _say(client, url)
        for client in clients:
            _heard(client, "ready")
        found: dict[tuple[Path, str], list[tuple[float, float, float]]] = {}
        for _ in range(rounds):
            for tree, server, client in zip(trees, servers, clients, strict=True):
                for way in ("local", "remote"):
                    before = _cpu_seconds(server)
                    _say(client, way)
                    seconds, cpu = map(float, _heard(client, "took"))
                    numbers = (seconds, cpu, _cpu_seconds(server) - before)
                    found.setdefault((tree, way), []).append(numbers)
    return {
        "head": HEAD,
        "images": images,
        "side": SIDE,
        "rounds": rounds,
        "machine": machine(),
        "rows": [
            {
                "tree": str(tree),
                "way": way,
                "per_second": images / median(seconds),
                "client": 1e3 * median(asks) / images,
                "server": 1e3 * median(serves) / images,
            }
            for (tree, way), numbers in found.items()
            for seconds, asks, serves in [zip(*numbers, strict=True)]
        ],
    }


@contextmanager
def _program(tree: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    # -P: the folder of the program holds modules with common names.
    command = [sys.executable, "-P", str(ENDS), *map(str, arguments)]
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": str(tree)}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=tree
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.communicate()  # a server says goodbye


def _say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    print(line, file=process.stdin, flush=True)


def _heard(process: subprocess.Popen[str], begins: str) -> list[str]:
    """Wait for a line that begins so; return its further words."""
    assert process.stdout is not None
    for line in process.stdout:
        first, *words = line.split()
        if first == begins:
            return words
    raise RuntimeError(f"A process ended early, with exit status {process.wait()}.")


def _cpu_seconds(server: subprocess.Popen[str]) -> float:
    _say(server, "")
    return float(_heard(server, "cpu")[0])
