"""The chart of the front, as data."""

from __future__ import annotations

import math

import numpy
import pytest

from moa_diffusion.report.page.figures import INK, PAPER
from moa_diffusion.report.page.front_chart import FrontChart, front_chart
from moa_diffusion.report.palette import marks
from moa_diffusion.report.summary import summarise
from moa_diffusion.report.table import Column, Table


def chart_of(means: list[list[float]]) -> FrontChart:
    """Return the chart of a base model and checkpoints of a run <a>, by their means ``[E, K]``."""
    values = numpy.repeat(numpy.array(means)[:, :, None, None], 2, axis=3)
    models = [("base", "", None)]
    models += [(f"<a>/step-{e}", "<a>", e) for e in range(1, len(means))]
    table = Table(
        models=tuple(
            Column(
                label=label,
                series=series,
                step=step,
                weights=None,
                model_digest="m",
                adapter_digest="",
            )
            for label, series, step in models
        ),
        prompts=("p",),
        seeds=(0, 1),
        rewards=("text", "colour", "shape")[: values.shape[1]],
        values=values,
        images=None,
        texts=None,
        units={"text": "", "colour": "points", "shape": ""},
        scorers={},
        sampler={},
    )
    return front_chart(table, summarise(table, resamples=20), marks(["<a>"]))


def test_every_pair_of_rewards_has_its_points_and_its_front():
    means = [[0.0, 3.0, 1.0], [1.0, 1.0, 0.0], [2.0, 2.0, math.nan]]
    chart = chart_of(means)
    for k in range(3):
        for j in range(3):
            points = chart.views[k][j].traces[-1]
            numpy.testing.assert_array_equal(points["x"], [row[k] for row in means])
            numpy.testing.assert_array_equal(points["y"], [row[j] for row in means])
    edge, run, _ = chart.views[0][1].traces
    assert (edge["x"], edge["y"]) == ([0.0, 2.0], [3.0, 2.0])
    assert run["x"] == [0.0, 1.0, 2.0], "the line of a run starts at the base model"
    # Where a mean is unknown the others still have a front.
    assert chart.views[0][2].traces[0]["x"] == [0.0, 1.0]
    assert chart.views[1][0].titles == ("colour (points)", "text")
    first = chart.views[0][1]
    assert [trace["x"] for trace in chart.figure["data"]] == [one["x"] for one in first.traces]


def test_a_name_covers_no_other_and_leaves_room_for_points():
    near = chart_of([[0.0, 0.0], [0.001, 0.001], [1.0, 1.0]]).views[0][1].traces[-1]
    far = chart_of([[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]).views[0][1].traces[-1]
    assert far["textposition"] == ["top center"] * 3
    assert near["textposition"][0] != near["textposition"][1]


def test_points_say_what_they_are():
    chart = chart_of([[0.0, 0.0], [1.0, 1.0], [0.5, math.nan]])
    points = chart.figure["data"][-1]
    assert points["hovertext"][0].startswith("<b>base</b><br>text: 0.000 [")
    assert points["hovertext"][1].startswith("<b>&lt;a&gt;/step-1</b><br>text: 1.000 [")
    assert points["hovertext"][2].endswith("colour: does not apply")
    assert points["text"] == ["base", "step-1", "step-2"]
    assert points["marker"]["line"]["color"] == [INK, "#0072b2", "#0072b2"]
    assert points["marker"]["color"][0] == PAPER, "a dominated model is hollow"
    assert points["marker"]["color"][1] == "#0072b2"


def test_of_many_models_only_those_of_the_front_are_named():
    chart = chart_of([[float(e), float(e)] for e in range(20)])
    assert chart.figure["data"][-1]["text"] == [""] * 19 + ["step-19"]


def test_one_reward_has_a_row_per_model():
    chart = chart_of([[0.0], [1.0]])
    ((view,),) = chart.views
    assert view.known
    assert view.traces == [{"x": [0.0, 1.0], "y": [0, 1]}]
    assert chart.figure["layout"]["yaxis"]["ticktext"] == ["base", "&lt;a&gt;/step-1"]
    assert chart.figure["data"][0]["error_x"]["array"] == [0.0, 0.0]


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_a_pair_without_any_mean_of_both_is_said_to_be_unknown():
    chart = chart_of([[0.0, math.nan], [1.0, math.nan]])
    assert chart.views[0][0].known
    assert not chart.views[0][1].known
