"""Checkpoints that are either whole or not there, and the exact state of a run inside them.

``checkpoints/step-000100/`` holds ``pytorch_lora_weights.safetensors`` (what diffusers loads),
``ema/`` with the averaged weights in the same form, and ``state.pt``. All random choices derive
from (seed, step), so the step number is the state of every generator and of the prompt sampler.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa_diffusion.files.paths import usual_mode
from moa_diffusion.files.writing import writing
from moa_diffusion.types import ConfigError

logger = logging.getLogger(__name__)

STATE = "state.pt"
VERSION = 3  # grows with each change of the layout of ``state.pt``


def step_folder(run: Path, step: int) -> Path:
    """Return where the checkpoint after ``step`` rollouts lives."""
    return run / "checkpoints" / f"step-{step:06d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(path for path in run.glob("checkpoints/step-*") if (path / STATE).is_file())


def step_of(folder: Path) -> int:
    """Return the number of rollouts of a checkpoint, from the name of its folder."""
    return int(folder.name.removeprefix("step-"))


@contextmanager
def atomic_folder(
    target: Path, *, needed: int | None = None, writer: str = "partial"
) -> Iterator[Path]:
    """Fill a folder under a temporary name; it appears as ``target`` only when it is complete.

    Its files get the permissions of any new file. Files and folder are flushed to the disk before
    the rename. If the block raises, nothing remains, and an older folder of the same name is as it
    was.

    Args:
        target: The path of the finished folder; missing parents are made.
        needed: Bytes that it will take, if that is known.
        writer: Keeps processes that write the same folder out of each other's way.

    Raises:
        StorageError: If the system does not let it be written.
    """
    partial = target.with_name(f".{target.name}.{writer}")
    with writing(target, needed):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            mode = usual_mode(partial)
            for path in [*partial.rglob("*"), partial]:
                if path.is_file():
                    path.chmod(mode)
                _fsync(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _appear(partial, target)


def _appear(partial: Path, target: Path) -> None:
    if target.exists():
        replaced = target.with_name(f".{target.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
        partial.rename(target)
        shutil.rmtree(replaced)
    else:
        partial.rename(target)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def packed(state: dict[str, Any]) -> memoryview:
    """Return the bytes of ``state.pt``.

    They are written by Python, because torch forgets why a file could not be written.

    Args:
        state: The state of a run: tensors, numbers, strings, lists and dicts of them.
    """
    file = io.BytesIO()
    torch.save({"version": VERSION, **to_cpu(state)}, file)
    return file.getbuffer()


def to_cpu(state: Any) -> Any:
    """Return a copy of a nested state that later in-place changes leave alone, on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: to_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(to_cpu(value) for value in state)
    return state


def load_state(folder: Path) -> dict[str, Any]:
    """Read the bytes of ``packed``, without unpickling arbitrary objects, onto the CPU.

    Raises:
        ConfigError: If the file is missing, damaged, or of another version.
    """
    path = folder / STATE
    if not path.is_file():
        raise ConfigError(f"resume: should name a checkpoint. Found no {STATE} in `{folder}`.")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"resume: `{path}` is damaged ({type(error).__name__}: {error}). An older checkpoint "
            "of the run can be named instead."
        ) from error
    version = state.get("version") if isinstance(state, dict) else None
    if version != VERSION:
        raise ConfigError(f"resume: `{path}` should have version {VERSION}. Found {version}.")
    return state


def check_adapter(saved: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    """Compare the adapter in a checkpoint with the run's.

    Raises:
        ConfigError: Naming the first tensor whose name or shape differs.
    """
    before = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    now = {name: tuple(tensor.shape) for name, tensor in present.items()}
    differing = sorted(name for name in before | now if before.get(name) != now.get(name))
    if differing:
        first = differing[0]
        raise ConfigError(
            f"resume: the checkpoint's adapter differs from this run's in {len(differing)} "
            f"tensors, first {first}: saved {before.get(first)}, here {now.get(first)} (other "
            "`policy.lora` settings or another model)."
        )


def find(resume: str, run: Path) -> Path:
    """Return the checkpoint folder that ``--resume`` means: ``latest`` of this run, or a path.

    Raises:
        ConfigError: If there is none.
    """
    if resume != "latest":
        folder = Path(resume)
        if not (folder / STATE).is_file():
            raise ConfigError(
                "resume: should be 'latest' or a checkpoint folder such as "
                f"{step_folder(run, 100)}. Found no {STATE} in `{folder}`.{_meant(folder, run)}"
            )
        return folder
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise ConfigError(
            f"resume: 'latest' needs a checkpoint in `{run / 'checkpoints'}`. Found none. If the "
            "run was moved, --output_dir names its folder."
        )
    return checkpoints[-1]


def _meant(folder: Path, run: Path) -> str:
    """Return the checkpoints in or around a folder that is none, or in the run's own."""
    for place in (folder, *folder.parents[:3], run):  # up from step-000001/ema or its state.pt
        if checkpoints := list_checkpoints(place):
            names = ", ".join(f"`{path}`" for path in checkpoints[-5:])
            return f" In `{place}` there {'are' if checkpoints[1:] else 'is'} {names}" + (
                ", the newest last." if checkpoints[1:] else "."
            )
    return f" There is no checkpoint in `{folder}`, nor in `{run}`."


def forget_after(run: Path, step: int) -> None:
    """Delete checkpoints after ``step`` rollouts: a run resumed there takes another course."""
    for folder in list_checkpoints(run):
        if step_of(folder) > step:
            logger.warning("Deleting %s: the run continues from rollout %d.", folder, step)
            shutil.rmtree(folder)


def prune(run: Path, kept: Collection[int]) -> None:
    """Delete all checkpoints but those after ``kept`` rollouts, and half-written ones."""
    for folder in list_checkpoints(run):
        if step_of(folder) not in kept:
            shutil.rmtree(folder)
    for partial in run.glob("checkpoints/.step-*"):  # a process that was killed left it
        shutil.rmtree(partial)
