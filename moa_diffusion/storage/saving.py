"""Saves a run's state: where it belongs, or after a failure wherever there is room for it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from moa_diffusion.distributed import Comm
from moa_diffusion.files.writing import StorageError, remove
from moa_diffusion.storage import checkpoint

logger = logging.getLogger(__name__)


class Savable(Protocol):
    """A policy that can write its adapter."""

    def trainable(self) -> Mapping[str, Tensor]:
        """Return the trained parameters by name."""
        ...

    def save(self, folder: Path) -> None:
        """Write the adapter as its parameters are."""
        ...


class Average(Protocol):
    """The averaged weights."""

    def applied(self) -> AbstractContextManager[None]:
        """Have the policy's parameters hold the average within the block."""
        ...


class Saver:
    """Writes checkpoints of a policy and what trains it.

    Args:
        folder: The run's folder.
        policy: The policy, whose adapter is written twice: as it is, and averaged.
        ema: Its averaged weights.
        state: Returns everything else, equal on every process.
        comm: The collectives over the processes.
        title: What a round is called.
    """

    def __init__(
        self,
        folder: Path,
        policy: Savable,
        ema: Average,
        state: Callable[[], dict[str, Any]],
        comm: Comm,
        title: str,
    ) -> None:
        self.folder, self.policy, self.ema, self.state = folder, policy, ema, state
        self.comm, self.title = comm, title

    def write(self, target: Path) -> bool:
        """Write a checkpoint unless it is there.

        Returns:
            Whether it was written.

        Raises:
            StorageError: If it cannot be; an older folder is as it was.
        """
        if (target / checkpoint.STATE).is_file():
            return False
        state = checkpoint.packed(self.state())
        adapter = sum(parameter.nbytes for parameter in self.policy.trainable().values())
        with checkpoint.atomic_folder(
            target, needed=len(state) + 2 * adapter, writer=f"partial-{self.comm.rank}"
        ) as partial:
            self.policy.save(partial)
            (partial / "ema").mkdir()
            with self.ema.applied():
                self.policy.save(partial / "ema")
            (partial / checkpoint.STATE).write_bytes(state)
        return True

    def rescue(self, step: int, failure: BaseException, *, alone: bool) -> str:
        """Save the state after a failure, outside of the run's folder if that takes nothing.

        Args:
            step: Number of rounds that are finished.
            failure: What ended the run; what it says is not said again.
            alone: Whether other processes may not know of the failure and wait for this one. It
                then writes by itself; the state is the same on all.

        Returns:
            A sentence on where the state is.
        """
        if alone:
            return self._rescued(step, failure)
        note = self._rescued(step, failure) if self.comm.rank == 0 else ""
        return str(self.comm.gather_objects([note])[0])

    def _rescued(self, step: int, failure: BaseException) -> str:
        target, done = checkpoint.step_folder(self.folder, step), f"{step} {self.title}"
        try:
            self.write(target)
        except Exception as error:  # the folder takes nothing, or what has failed is in the way
            place = f"The state after {done} {self._elsewhere(target)}"
            known = isinstance(error, StorageError) and f": {error.cause or error}" in str(failure)
            return place if known else f"{error}\n{place}"
        logger.warning("Stopped after %s; saved %s", done, target)
        return f"The state after {done} is in {target}."

    def _elsewhere(self, target: Path) -> str:
        """Write to the system's place for temporary files; the end of a sentence about it."""
        place = Path(tempfile.gettempdir())
        try:
            place = Path(tempfile.mkdtemp(prefix=f"{self.folder.name}-"))
            spare = place / target.name
            self.write(spare)
        except Exception as error:
            if place != Path(tempfile.gettempdir()):
                remove(place)
            whole = checkpoint.list_checkpoints(self.folder)
            last = f" The last whole checkpoint is {whole[-1]}." if whole else ""
            return f"is lost, as there is no other place for it. {error}{last}"
        return (
            f"is in {spare} instead. When there is room: `mkdir -p {target.parent} && mv {spare} "
            f"{target.parent}/`, then the same command with --resume latest."
        )
