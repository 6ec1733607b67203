"""What a benchmark of a GPU leaves: one JSON file that is whole whenever it is looked at."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.phases import machine
from moa_diffusion.files.json_values import without_nan
from moa_diffusion.files.writing import write_text
from moa_diffusion.types import ConfigError

LIBRARIES = ("moa-diffusion", "diffusers", "transformers", "peft", "accelerate")
NO_MEMORY = ("out of memory", "ALLOC_FAILED")  # of CUDA itself, and of cuBLAS and cuDNN
LONGEST = 500  # characters of an error that are kept


class Report:
    """Numbers by name in a JSON file, which is replaced with every addition.

    A run that is killed has lost nothing that was added before.

    Args:
        file: The file; its folder is made if missing.

    Attributes:
        values: What was added. ``stage`` names what is at work, ``problems`` holds what failed, and
            ``finished`` says whether the benchmark came to its end.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values: dict[str, Any] = {"finished": False, "problems": []}

    def add(self, **values: Any) -> None:
        """Add values and write the file anew."""
        self.values |= values
        write_text(self.file, json.dumps(without_nan(self.values), indent=2) + "\n")

    def problem(self, stage: str, error: BaseException) -> None:
        """Add a failure.

        Args:
            stage: What failed.
            error: Why.
        """
        entry = {"stage": stage, "error": described(error)}
        print(f"{stage} failed: {entry['error']}", flush=True)
        self.add(problems=[*self.values["problems"], entry])

    def begin(self, stage: str) -> None:
        """Say what is at work from now on."""
        print(f"{stage} ...", flush=True)
        self.add(stage=stage)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Begin a stage; a failure of the block is added, and what follows goes on.

        Args:
            name: What the block does.

        Raises:
            ConfigError: If the configuration is wrong: nothing could be measured with it.
        """
        self.begin(name)
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # on a card that nobody here has seen, anything may fail
            self.problem(name, error)
            forget(error)


def described(error: BaseException) -> str:
    """Return an error's class and words, in one line of limited length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST]


def out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, is that the device has no memory left.

    Libraries beneath torch say it in words.
    """
    while error is not None:
        words = str(error)
        in_words = isinstance(error, RuntimeError) and any(said in words for said in NO_MEMORY)
        if isinstance(error, torch.OutOfMemoryError) or in_words:
            return True
        error = error.__cause__ or error.__context__
    return False


def forget(error: BaseException | None) -> None:
    """Clear the frames that an error and what caused it went through: they hold a card's memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def versions(root: Path, device: str) -> dict[str, Any]:
    """Return the machine, the card, and the versions of what computes.

    Args:
        root: The checkout whose commit is named, if it is one.
        device: 'cuda' or 'cpu'.
    """
    found: dict[str, Any] = machine() | {
        "device": device,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": _said("git", "-C", str(root), "rev-parse", "HEAD"),
    }
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[name] = None
    if device == "cuda":
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {"device": card.name, "memory_bytes": card.total_memory}
        found |= {"capability": f"{card.major}.{card.minor}"}
    return found


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large matrix product: the best of several.

    Args:
        device: 'cuda' or 'cpu'.
        dtype: Data type of the factors.
    """
    side, times = (8192, 20) if device == "cuda" else (256, 2)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    clock = clock_of(device)
    seconds = []
    for _ in range(5):  # the first warms up
        start = clock()
        for _ in range(times):
            a @ b
        seconds.append(clock() - start)
    return 2 * side**3 * times / min(seconds)


def clock_of(device: str) -> Any:
    """Return a clock in seconds that waits for the device."""
    return _synchronised if device == "cuda" else time.perf_counter


def peak_bytes() -> dict[str, int]:
    """Return the card's peaks since the last call, in bytes: of tensors, and of all that is kept.

    Where torch has no card to itself there are none.
    """
    if not torch.cuda.is_initialized():
        return {}
    peaks = {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }
    torch.cuda.reset_peak_memory_stats()
    return peaks


def _synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _said(*command: str) -> str | None:
    """Return the first line that a command prints, if there is such a command and it succeeds."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
