"""Mood, politeness and length of a text, by rules that anybody can check.

The rules count known expressions wherever they stand, so they also hold for text that no grammar
would write: cut off, repeated, out of order, or with no known expression at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from moa_diffusion.tiny import phrases


def _any_of(expressions: Iterable[str]) -> str:
    longest_first = sorted(expressions, key=len, reverse=True)
    return "|".join(re.escape(e).replace(r"\ ", r"\s+") for e in longest_first)


_GOOD = (*phrases.GOOD, *(w for ws in phrases.GOOD_OF_KIND.values() for w in ws), *phrases.LIKED)
_BAD = (*phrases.BAD, *(w for ws in phrases.BAD_OF_KIND.values() for w in ws), *phrases.DISLIKED)
_DEGREE = _any_of(d.strip() for d in phrases.DEGREES if d)
_MOOD = re.compile(
    rf"\b(?P<not>not\s+)?(?:(?:{_DEGREE})\s+)*"
    rf"(?:(?P<good>{_any_of(_GOOD)})|(?P<bad>{_any_of(_BAD)}))\b",
    re.IGNORECASE,
)
_MANNERS = re.compile(
    rf"\b(?:(?P<polite>{_any_of(phrases.POLITE)})|(?P<blunt>{_any_of(phrases.BLUNT)}))\b",
    re.IGNORECASE,
)


def count_moods(text: str) -> tuple[int, int]:
    """Return how often the text praises and how often it blames.

    A "not" before a word turns its meaning round.
    """
    praised = [(m["good"] is None) == (m["not"] is not None) for m in _MOOD.finditer(text)]
    return sum(praised), len(praised) - sum(praised)


def count_manners(text: str) -> tuple[int, int]:
    """Return the number of polite and of blunt expressions in the text."""
    polite = [m["polite"] is not None for m in _MANNERS.finditer(text)]
    return sum(polite), len(polite) - sum(polite)


def mood(text: str) -> float:
    """Weigh praise against blame: (g - b) / (g + b), 0 if there is neither.

    Args:
        text: Any text.

    Returns:
        From -1 (blames only) to 1 (praises only).
    """
    good, bad = count_moods(text)
    return (good - bad) / (good + bad) if good + bad else 0.0


def politeness(text: str) -> float:
    """Weigh polite against blunt expressions: (p - b) / (p + b + 2).

    The 2 makes every further polite expression count, ever less: one gives 1/3, two give 1/2.

    Args:
        text: Any text.

    Returns:
        Between -1 and 1, both excluded; 0 if there is neither.
    """
    polite, blunt = count_manners(text)
    return (polite - blunt) / (polite + blunt + 2)


def words(text: str) -> int:
    """Return the number of pieces between white space."""
    return len(text.split())
