"""What the charts of the page share."""

from __future__ import annotations

import plotly.graph_objects as go

from moa_diffusion.report.page.figures import INK, LOOK, colours, figure, plain, template
from moa_diffusion.report.pareto_plot import COLOURS


def test_a_series_has_a_colour_that_is_seen_on_a_dark_page():
    names = [f"run {i}" for i in range(len(COLOURS) + 1)]
    found = colours(names)
    assert list(found) == names
    assert "#000000" not in found.values()
    assert found[names[COLOURS.index("#000000")]] == INK
    assert found[names[-1]] == found[names[0]]


def test_a_figure_has_its_own_layout_alone_and_names_are_no_html():
    made = figure([go.Scatter(x=[1], name=plain("<b>&"))], {"xaxis": {"rangemode": "tozero"}})
    assert made == {
        "data": [{"type": "scatter", "x": [1], "name": "&lt;b&gt;&amp;"}],
        "layout": {"xaxis": {"rangemode": "tozero"}},
    }
    assert template() == {"layout": LOOK}
