"""Charts of the page: Plotly's figures, in colours that the page looks up when it draws one."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Variables of the style sheet: they differ between a light and a dark page.
INK, SOFT, LINE, PAPER, PANEL = (
    f"var(--{name})" for name in ("ink", "soft", "line", "paper", "panel")
)
AXIS = {
    "showline": True,
    "linecolor": LINE,
    "gridcolor": LINE,
    "zerolinecolor": LINE,
}
LOOK = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
    "margin": {"l": 48, "r": 12, "t": 10, "b": 36},
    "showlegend": False,
    "hovermode": "closest",
    "hoverlabel": {
        "bgcolor": PANEL,
        "bordercolor": LINE,
        "font": {"color": INK, "size": 12},
        "align": "left",
    },
    # Room for labels across the axis alone: with more, Plotly may go back and forth without end.
    "xaxis": {**AXIS, "automargin": "height"},
    "yaxis": {**AXIS, "automargin": "width"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One chart among others."""

    title: str
    words: str  # what is read out in place of the chart
    figure: Mapping[str, Any]  # see ``figure``


def figure(traces: Sequence[Any], layout: Mapping[str, Any]) -> dict[str, Any]:
    """Return a figure as Plotly's script takes it: ``{"data": [...], "layout": {...}}``.

    Args:
        traces: Traces of ``plotly.graph_objects``.
        layout: What the layout has beyond, or other than, the template.
    """
    import plotly.graph_objects as go

    return {
        "data": [trace.to_plotly_json() for trace in traces],
        "layout": go.Layout(layout).to_plotly_json(),
    }


def template() -> dict[str, Any]:
    """Return the template that all figures share; the page has it once."""
    import plotly.graph_objects as go

    made: dict[str, Any] = go.layout.Template(layout=LOOK).to_plotly_json()
    return made


def plain(text: str) -> str:
    """Return a text that Plotly, which reads a little HTML, shows as it is."""
    return html.escape(text, quote=False)
