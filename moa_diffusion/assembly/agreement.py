"""What processes have to share before they train together: settings, data, versions, a state."""

from __future__ import annotations

import functools
import socket
from collections.abc import Mapping
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moa_diffusion.assembly.defaults import flat
from moa_diffusion.config import Config
from moa_diffusion.distributed import Comm
from moa_diffusion.storage import checkpoint
from moa_diffusion.types import ConfigError

# Those whose versions decide what a process draws and how it learns.
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


def facts(settings: Config, resumed: Path | None, read: Mapping[str, Any]) -> dict[str, str]:
    """Return what is equal on all processes of one run, by name.

    Args:
        settings: The run's configuration; every key of it counts.
        resumed: The folder of the checkpoint to go on from; None for a new run.
        read: What was read from files, by name; compared by its ``repr``.
    """
    shared = {key: str(value) for key, value in flat(settings).items()}
    shared |= _versions()
    shared |= {f"contents of {name}": _digest(repr(value).encode()) for name, value in read.items()}
    files = {"objectives.calibration": settings.objectives.calibration}
    if resumed is not None:
        shared["checkpoint"] = str(resumed)
        files["checkpoint"] = str(resumed / checkpoint.STATE)
    for name, file in files.items():
        if file is not None:
            shared[f"contents of {name}"] = _digest(Path(file).read_bytes())
    return shared


@functools.cache
def _versions() -> dict[str, str]:
    """Return the versions of the packages that matter; each is parsed from a file, so once."""
    return {f"version of {name}": version(name) for name in _PACKAGES}


def check_same(comm: Comm, mine: Mapping[str, str]) -> None:
    """Compare with the other processes.

    Args:
        comm: Collectives over the processes.
        mine: The facts of this process, by name.

    Raises:
        ConfigError: On all processes, naming the first thing in which they differ, and where.
    """
    everyone = comm.gather_objects([[socket.gethostname(), dict(mine)]])
    first_host, first = everyone[0]
    for rank, (host, other) in enumerate(everyone):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                raise ConfigError(
                    f"{name}: should be the same on all processes, which have to see the same "
                    f"files. Found {first.get(name)} on process 0 ({first_host}) and "
                    f"{other.get(name)} on process {rank} ({host})."
                )


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=8).hexdigest()
