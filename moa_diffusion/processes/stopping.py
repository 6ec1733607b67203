"""SIGTERM, SIGHUP and Ctrl-C end a run at its next safe point, with its state saved."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
# torchrun passes on what the terminal has sent to its processes already: not a second Ctrl-C.
_SAME_PRESS_SECONDS = 2.0


class Interrupted(Exception):
    """The run was asked to stop; its state is saved.

    Args:
        message: The message that the user sees.
        number: The number of the signal.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.number = number


class StopRequest:
    """Whether this process was asked to stop, and by which signal.

    Args:
        announce: Whether this process writes on stderr that it is going to stop.
    """

    def __init__(self, *, announce: bool) -> None:
        self.number = 0  # of the first signal; 0 for none
        self._announce, self._at_once, self._since = announce, False, 0.0

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """Remember the first signal; a second Ctrl-C ends at once.

        Raises:
            KeyboardInterrupt: On a second Ctrl-C, or on the first within ``at_once``.
        """
        again = bool(self.number) and time.monotonic() - self._since > _SAME_PRESS_SECONDS
        if number == signal.SIGINT and (self._at_once or again):
            raise KeyboardInterrupt
        if self.number:
            return
        self.number, self._since = number, time.monotonic()
        if self._announce:  # not by the logger, which this signal may have interrupted
            message = "Stopping at the next safe point, and saving."
            more = " Ctrl-C again ends at once, without." if number == signal.SIGINT else ""
            os.write(2, f"\n{message}{more}\n".encode())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as requests within the block; what was ignored, as under nohup, still is."""
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self.ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Have Ctrl-C end the run at once within the block, where there is nothing to save."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
