"""What a run takes of one card, phase by phase, and of the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moa_diffusion.planning.gpus import Gpu

# Shares of a card's rates that PyTorch reaches without a compiler: estimates, until `bench.py gpu`
# has measured them. Products in float32 are so slow that little else counts beside them.
EAGER, SINGLE = 0.25, 0.6
RESERVE = 2e9  # bytes that are not counted: CUDA's context, libraries' workspaces, fragmentation


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Operations of one kind."""

    kind: str  # the phase whose share of the card's rate they reach
    flops: float
    moved: float  # bytes that are read and written
    dtype: str
    convolutions: bool = False

    def seconds(self, card: Gpu, reached: Mapping[str, float]) -> float:
        """Return the time on a card, by its rate or its bandwidth, whichever is slower.

        Args:
            card: The card.
            reached: Share of its rate by kind, where it was measured; others reach ``EAGER``, or
                ``SINGLE`` without tensor cores.
        """
        rate = card.rate(self.dtype, convolutions=self.convolutions)
        if self.kind in reached:  # a time that was measured has all in it
            return self.flops / (rate * reached[self.kind])
        share = SINGLE if self.dtype == "float32" and not self.convolutions else EAGER
        return max(self.flops / (rate * share), self.moved / (card.bandwidth * 1e9))


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase of a run."""

    name: str
    times: float  # how often the run does it
    memory: Mapping[str, float]  # bytes at its peak, by part
    work: tuple[Work, ...]  # what it does each time

    @property
    def peak(self) -> float:
        """The bytes of all parts."""
        return sum(self.memory.values())

    def seconds(self, card: Gpu, reached: Mapping[str, float]) -> float:
        """Return the time of one such phase; see ``Work.seconds``."""
        return sum(work.seconds(card, reached) for work in self.work)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run takes; all of it computed."""

    gpus: int  # all nodes together
    phases: tuple[Phase, ...]
    disk: Mapping[str, float]  # bytes
    host: Mapping[str, float]  # bytes of a process's main memory

    @property
    def peak(self) -> Phase:
        """The phase that takes the most memory."""
        return max(self.phases, key=lambda phase: phase.peak)

    def headroom(self, card: Gpu) -> float:
        """Return the bytes of a card that the largest phase leaves beside ``RESERVE``."""
        return card.memory * 1e9 - RESERVE - self.peak.peak

    def fits(self, card: Gpu) -> bool:
        """Return whether every phase fits on a card."""
        return self.headroom(card) >= 0

    def hours(self, card: Gpu, reached: Mapping[str, float]) -> float:
        """Return the GPU-hours of the run; see ``Work.seconds``."""
        seconds = sum(phase.times * phase.seconds(card, reached) for phase in self.phases)
        return self.gpus * seconds / 3600
