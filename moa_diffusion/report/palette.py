"""How a run, a method or a reward is drawn: one colour and one marker in all plots and the page.

The ten colours were searched for in sRGB, the first two fixed to Okabe and Ito's blue and
vermilion. Any two of them lie at least 25 apart (CIE76 Delta E in CIELAB, D65), for normal vision
and for protanopia, deuteranopia and tritanopia as Machado, Oliveira and Fernandes simulate them
(2009, severity 1), and all of them stand out from a white and from a dark page.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

COLOURS = (
    *("#0072b2", "#d55e00", "#00d2b4", "#780069", "#ffb40f"),
    *("#5a3c3c", "#96d278", "#d2b4ff", "#78875a", "#870f00"),
)
# Markers of matplotlib, symbols of Plotly, and outlines in a box of 16 x 16 for HTML.
SHAPES = (
    ("o", "circle", "M2 8a6 6 0 1 0 12 0a6 6 0 1 0-12 0z"),
    ("s", "square", "M3 3h10v10h-10z"),
    ("D", "diamond", "M8 1l7 7l-7 7l-7-7z"),
    ("v", "triangle-down", "M1.5 3h13l-6.5 11z"),
    ("^", "triangle-up", "M1.5 13h13l-6.5-11z"),
    ("P", "cross", "M6 2h4v4h4v4h-4v4h-4v-4h-4v-4h4z"),
    ("*", "star", "M8 1l1.8 5h5.2l-4.2 3.1l1.6 5l-4.4-3.1l-4.4 3.1l1.6-5l-4.2-3.1h5.2z"),
    ("X", "x", "M4.5 2l3.5 3.5l3.5-3.5l2.5 2.5l-3.5 3.5l3.5 3.5l-2.5 2.5l-3.5-3.5l-3.5 3.5"
     "l-2.5-2.5l3.5-3.5l-3.5-3.5z"),
)  # fmt: skip

PLUS = "M7 1h2v6h6v2h-6v6h-2v-6h-6v-2h6z"  # outline of the base model, which has no colour


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What stands for one name."""

    colour: str  # "#rrggbb"
    marker: str  # matplotlib's
    symbol: str  # Plotly's
    outline: str  # path of SVG in a box of 16 x 16


def marks(names: Iterable[str]) -> dict[str, Mark]:
    """Return a mark by name.

    Marks go by the order of the alphabet, so that a name keeps its mark when a list is ranked
    otherwise. With more than ten names colours come back, with other markers.
    """
    return {
        name: Mark(
            colour=COLOURS[i % len(COLOURS)],
            **dict(zip(("marker", "symbol", "outline"), SHAPES[i % len(SHAPES)], strict=True)),
        )
        for i, name in enumerate(sorted(set(names)))
    }


def colours(names: Iterable[str]) -> dict[str, str]:
    """Return the colours of ``marks`` by name."""
    return {name: mark.colour for name, mark in marks(names).items()}
