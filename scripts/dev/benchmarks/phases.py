"""Accounts of time and memory by phase, and the machine that they were taken on."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

REST = "rest"
Label = str | Callable[[], str]  # a function is asked at each call


class Phases:
    """Accounts in which each second belongs to the innermost phase, so that they add up.

    Args:
        clock: Function that returns the time, in seconds.
        peak: Reads peaks of memory since the last reading, in bytes by name, and starts anew.

    Attributes:
        seconds: By phase, since they were taken.
        peaks: Bytes by phase and name, the largest over all of the phase's visits.
        interrupted: The innermost phase that an exception has left since seconds were taken.
    """

    def __init__(
        self, clock: Callable[[], float], peak: Callable[[], Mapping[str, int]] | None = None
    ) -> None:
        self._clock, self._peak = clock, peak
        self._open = [REST]
        self._mark = clock()
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, dict[str, int]] = {}
        self.interrupted: str | None = None

    def take(self) -> dict[str, float]:
        """Return the seconds by phase since the last call."""
        self._account()
        seconds, self.seconds, self.interrupted = self.seconds, {}, None
        return seconds

    def inside(self, label: str) -> bool:
        """Return whether the phase is open, innermost or not."""
        return label in self._open

    @contextmanager
    def phase(self, label: str) -> Iterator[None]:
        """Count time within the block for ``label``, or for a phase inside it."""
        self._account()
        self._open.append(label)
        try:
            yield
        except BaseException:
            self.interrupted = self.interrupted or label
            raise
        finally:
            self._account()
            self._open.pop()

    @contextmanager
    def watching(self, *targets: tuple[object, str, Label]) -> Iterator[None]:
        """Count every call of ``owner.name`` within the block as the phase ``label``.

        Args:
            targets: (owner, name, label), the owner an object or a module.
        """
        with ExitStack() as stack:
            for owner, name, label in targets:
                function = getattr(owner, name)
                stack.callback(setattr, owner, name, function)
                setattr(owner, name, self._timed(function, label))
            yield

    def _timed(self, function: Callable[..., Any], label: Label) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(label if isinstance(label, str) else label()):
                return function(*args, **kwargs)

        return timed

    def _account(self) -> None:
        now, label = self._clock(), self._open[-1]
        self.seconds[label] = self.seconds.get(label, 0.0) + now - self._mark
        self._mark = now
        if self._peak is not None:
            peaks = self.peaks.setdefault(label, {})
            for name, size in self._peak().items():
                peaks[name] = max(peaks.get(name, 0), size)


def machine() -> dict[str, Any]:
    """Return what the numbers were taken on, and how busy it is."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
