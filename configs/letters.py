"""Exact rewards of letters, by the rules that the tiny classifiers were taught."""

from __future__ import annotations

from collections.abc import Sequence

from moa_diffusion.tiny import rules


def mood(texts: Sequence[str], prompts: Sequence[str]) -> list[float]:
    """Praise against blame, from -1 to 1, of each of N texts."""
    return [rules.mood(text) for text in texts]


def politeness(texts: Sequence[str], prompts: Sequence[str]) -> list[float]:
    """Polite against blunt expressions, between -1 and 1, of each of N texts."""
    return [rules.politeness(text) for text in texts]
