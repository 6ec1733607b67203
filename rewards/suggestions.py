"""Suggestions for names that nobody knows: the known name that the writer probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question for the end of a message, with a space before it: the most similar name.

    Args:
        name: The name as it was written.
        known: All valid names. One that differs only in upper and lower case is the most similar.

    Returns:
        The question; an empty text if no known name is similar.
    """
    names = list(known)
    same = [one for one in names if one.casefold() == name.casefold()]
    similar = same or get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean {similar[0]!r}?" if similar else ""
