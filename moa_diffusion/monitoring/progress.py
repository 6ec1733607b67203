"""How far a run is, shared by the loop and by what learns in it: rounds, seconds, stop requests."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from moa_diffusion.distributed import Comm
from moa_diffusion.processes.stopping import Interrupted, StopRequest
from rewards.progress_bar import progress_bar


class Progress:
    """The rounds finished, the seconds of each phase, and whether the run was asked to stop.

    Args:
        comm: The collectives over the processes.
        bars: Whether this process shows progress bars.

    Attributes:
        completed: The number of rounds finished.
        stop: The request to stop, of this process.
    """

    def __init__(self, comm: Comm, *, bars: bool = True) -> None:
        self.comm, self.bars = comm, bars
        self.completed = 0
        self.stop = StopRequest(announce=comm.rank == 0)
        self._seconds: dict[str, float] = {}  # since they were taken last, by phase

    def leave_if_stopped(self) -> None:
        """Leave if any process was asked to stop; all processes have to call this.

        Raises:
            Interrupted: On all processes.
        """
        number = self.stop.number  # may change at any time
        if self.comm.any(number > 0):
            chosen = signal.Signals(int(self.comm.gather(torch.tensor([number])).max()))
            raise Interrupted(f"Stopped by {chosen.name}.", chosen)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of the block to those of the phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._seconds[phase] = self._seconds.get(phase, 0.0) + elapsed

    def note_seconds(self, seconds: Mapping[str, float]) -> None:
        """Take over the seconds of phases that were measured elsewhere."""
        self._seconds |= seconds

    def take_seconds(self) -> dict[str, float]:
        """Return ``seconds/<phase>`` of all phases, and start anew."""
        seconds = {f"seconds/{phase}": value for phase, value in self._seconds.items()}
        self._seconds = {}
        return seconds

    def bar(
        self, phase: str, items: Sequence[Any] | None = None, *, total: int | None = None
    ) -> tqdm[Any]:
        """Make a progress bar that disappears with the phase.

        Args:
            phase: What the bar is called.
            items: What it iterates over, if it does; a single one is not worth a bar.
            total: The number of its steps; that of the items if None.
        """
        short = items is not None and len(items) < 2
        shown = self.bars and not short
        return progress_bar(items, title=phase, total=total, leave=False, shown=shown)
