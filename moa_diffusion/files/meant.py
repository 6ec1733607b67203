"""The name that a writer meant, for messages about names that nobody knows."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that looks most like a name, or None if none is near.

    Args:
        name: The name as it was written.
        known: All valid names. One that differs in upper and lower case alone is the nearest.
    """
    names = list(known)
    same = [one for one in names if one.casefold() == name.casefold()]
    return next(iter(same or get_close_matches(name, names, n=1, cutoff=0.5)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question that ends a message, with a blank before it.

    It is empty if no known name is near.
    """
    near = nearest(name, known)
    return "" if near is None else f" Did you mean {near!r}?"
