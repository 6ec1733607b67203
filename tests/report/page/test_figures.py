"""What the charts of the page share."""

from __future__ import annotations

import plotly.graph_objects as go

from moa_diffusion.report.page.figures import LOOK, figure, plain, template


def test_a_figure_has_its_own_layout_alone_and_names_are_no_html():
    made = figure([go.Scatter(x=[1], name=plain("<b>&"))], {"xaxis": {"rangemode": "tozero"}})
    assert made == {
        "data": [{"type": "scatter", "x": [1], "name": "&lt;b&gt;&amp;"}],
        "layout": {"xaxis": {"rangemode": "tozero"}},
    }
    assert template() == {"layout": LOOK}
