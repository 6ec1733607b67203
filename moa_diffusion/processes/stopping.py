"""Ctrl-C, SIGTERM and what schedulers send end a run at its next safe point, its state saved."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# SIGUSR1 and SIGUSR2 are what SLURM is asked to send before it ends a job (``--signal``), SIGXCPU
# comes at the limit of ``ulimit -t``. SIGQUIT is left to end a process that does not answer.
_ALWAYS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_UNLESS_HANDLED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
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
        self.number = 0  # the first signal's number; 0 if none has come
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
        with handled(self.ask):
            yield

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Have Ctrl-C end the run at once within the block, where there is nothing to save."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have a handler take the signals that ask a process to end, within the block.

    Signals that are ignored, as SIGHUP is under nohup, stay so; and SIGUSR1, SIGUSR2 and SIGXCPU
    stay with a handler that somebody has given them.

    Args:
        handler: As for ``signal.signal``.
    """
    before = {number: signal.getsignal(number) for number in (*_ALWAYS, *_UNLESS_HANDLED)}
    for number, present in list(before.items()):
        kept = present in (signal.SIG_IGN, None)  # None: a handler that is not Python's
        if kept or (number in _UNLESS_HANDLED and present != signal.SIG_DFL):
            del before[number]
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, present in before.items():
            signal.signal(number, present)
