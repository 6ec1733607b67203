"""Failures of an evaluation, which keep what is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moa_diffusion.distributed import Comm, agreed


class EvaluationError(RuntimeError):
    """An evaluation that could not be finished; what it has drawn and scored is in the cache."""


@contextmanager
def working(comm: Comm) -> Iterator[None]:
    """Do as ``agreed``; of a disk's failure say that what is done is kept."""
    with agreed(comm):
        try:
            yield
        except OSError as error:
            reason = str(error).rstrip(".")
            raise EvaluationError(
                f"{reason}. What is done is saved; the same command continues."
            ) from error
