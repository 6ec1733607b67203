"""The chart of the front: means of two rewards, a point per model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from moa_diffusion.files.captions import score_text
from moa_diffusion.report.page.figures import INK, PAPER, SOFT, figure, plain
from moa_diffusion.report.palette import Mark
from moa_diffusion.report.pareto_plot import CROWDED
from moa_diffusion.report.summary import Summary
from moa_diffusion.report.table import Column, Table
from moa_diffusion.statistics.bootstrap import Array
from moa_diffusion.statistics.pareto import nondominated

# Pixels between the outermost points, across and up: on a phone and on a screen.
SIZES = numpy.array([[240, 370], [780, 370]])
BESIDE = 36  # pixels beyond the outermost points, up to the edge of the chart
LETTER, HEIGHT, POINT = 7, 13, 12  # pixels: width of a letter, height of a line, a point; roughly
# Where a name stands beside its point, the first choice first: pixels across and up, and by which
# part of the name's width its middle lies to the right.
PLACES = {
    "top center": (0, 16, 0.0),
    "bottom center": (0, -16, 0.0),
    "middle right": (10, 0, 0.5),
    "middle left": (-10, 0, -0.5),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What the chart shows with two rewards on its axes."""

    known: bool  # whether any model has a mean of both
    words: str  # what is read out in place of the chart
    titles: tuple[str, str]  # those of the axis across and of the axis up
    traces: Sequence[Mapping[str, Any]]  # what each trace of the figure has of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontChart:
    """A figure, and what differs in it between pairs of rewards."""

    figure: Mapping[str, Any]  # shows the first view; the E points are its last trace
    views: Sequence[Sequence[View]]  # [K][K], by the reward across and the reward up


def front_chart(table: Table, summary: Summary, marks: Mapping[str, Mark]) -> FrontChart:
    """Return the chart of E models in K rewards.

    Args:
        table: The E models with their scores in K rewards.
        summary: The means of that table and their intervals.
        marks: Marks by series.
    """
    points = _points(table, summary, marks)
    if len(table.rewards) == 1:
        return _rows(table, summary, points)
    return _plane(table, summary, points, marks)


def _plane(
    table: Table, summary: Summary, points: Mapping[str, Any], marks: Mapping[str, Mark]
) -> FrontChart:
    import plotly.graph_objects as go

    names = [
        _short(model) if len(table.models) <= CROWDED or one.nondominated else ""
        for model, one in zip(table.models, summary.models, strict=True)
    ]
    # A run's line starts at the base model.
    paths = {
        name: [0, *(e for e, model in enumerate(table.models) if model.series == name)]
        for name in dict.fromkeys(one.series for one in table.models if one.step is not None)
    }
    means = numpy.array(
        [[one.rewards[name].mean.value for name in table.rewards] for one in summary.models]
    )  # [E, K]
    bars = [_bars(summary, name) for name in table.rewards]
    count = len(table.rewards)
    views = [
        [_pair(table, means, bars, (across, up), paths.values(), names) for up in range(count)]
        for across in range(count)
    ]
    line = {"mode": "lines", "hoverinfo": "skip"}
    traces = [
        go.Scatter(**line, line={"dash": "dash", "width": 1, "color": SOFT}),
        *(
            go.Scatter(**line, opacity=0.8, line={"width": 1, "color": marks[n].colour})
            for n in paths
        ),
        go.Scatter(**points, mode="markers+text", text=[plain(name) for name in names]),
    ]
    return _chart(traces, views, views[0][1], {})


def _pair(
    table: Table,
    means: Array,
    bars: Sequence[Mapping[str, Any]],
    axes: tuple[int, int],
    paths: Iterable[Sequence[int]],
    names: Sequence[str],
) -> View:
    """Return what the plane of two rewards shows."""
    pair = means[:, axes]  # [E, 2]
    known = ~numpy.isnan(pair).any(1)  # [E]
    front = pair[known][nondominated(torch.from_numpy(pair[known]))]
    front = front[numpy.argsort(front[:, 0])]
    shown = [front, *(pair[path] for path in paths), pair]
    traces = [{"x": one[:, 0].tolist(), "y": one[:, 1].tolist()} for one in shown]
    across, up = (table.rewards[k] for k in axes)
    own = {
        "textposition": _positions(pair, names),
        "error_x": bars[axes[0]],
        "error_y": bars[axes[1]],
    }
    return View(
        known=bool(known.any()),
        words=f"Means of {across} and {up} for every model; the table below has the same numbers.",
        titles=(_title(table, across), _title(table, up)),
        traces=[*traces[:-1], traces[-1] | own],
    )


def _rows(table: Table, summary: Summary, points: Mapping[str, Any]) -> FrontChart:
    """One reward has no plane: means with their intervals, a row per model."""
    import plotly.graph_objects as go

    (name,) = table.rewards
    means = [one.rewards[name].mean for one in summary.models]
    errors = _bars(summary, name)
    places = list(range(len(means)))
    view = View(
        known=any(math.isfinite(mean.value) for mean in means),
        words=f"Means of {name} for every model; the table below has the same numbers.",
        titles=(_title(table, name), ""),
        traces=[{"x": [mean.value for mean in means], "y": places}],
    )
    rows = {
        "tickvals": places,
        "ticktext": [plain(model.label) for model in table.models],
        "autorange": "reversed",
    }
    return _chart([go.Scatter(**points, mode="markers", error_x=errors)], [[view]], view, rows)


def _bars(summary: Summary, reward: str) -> dict[str, Any]:
    """Return error bars of a reward: intervals of the gain, which pairs samples with the base's.

    Those of the means would be wider, by how much prompts differ, which all models share.
    """
    gains = [one.rewards[reward].gain for one in summary.models]
    return {
        "type": "data",
        "symmetric": False,
        "array": [gain.high - gain.value for gain in gains],
        "arrayminus": [gain.value - gain.low for gain in gains],
        "color": SOFT,
        "thickness": 1,
        "width": 3,
    }


def _chart(
    traces: Sequence[Any], views: Sequence[Sequence[View]], first: View, rows: Mapping[str, Any]
) -> FrontChart:
    for trace, arrays in zip(traces, first.traces, strict=True):
        trace.update(arrays)
    titles = [{"title": {"text": title, "standoff": 8}} for title in first.titles]
    layout = {
        "margin": {"l": 56, "r": 24, "t": 24, "b": 48},
        "xaxis": titles[0],
        "yaxis": titles[1] | dict(rows),
    }
    return FrontChart(figure=figure(traces, layout), views=views)


def _points(table: Table, summary: Summary, marks: Mapping[str, Mark]) -> dict[str, Any]:
    """Return what the points of all models have in common, whatever the axes."""
    own = [marks[model.series].colour if model.series else INK for model in table.models]
    better = [one.nondominated for one in summary.models]
    return {
        "hovertext": [_hover(table, summary, e) for e in range(len(table.models))],
        "hoverinfo": "text",
        "cliponaxis": False,
        "marker": {
            "symbol": [
                marks[model.series].symbol if model.series else "cross-thin"
                for model in table.models
            ],
            "color": [c if filled else PAPER for c, filled in zip(own, better, strict=True)],
            "size": 11,
            "line": {"width": 2, "color": own},
        },
        # One model is selected, on the page.
        "selected": {"marker": {"size": 16}},
        "unselected": {"marker": {"opacity": 1}, "textfont": {"color": INK}},
    }


def _hover(table: Table, summary: Summary, e: int) -> str:
    lines = []
    for name in table.rewards:
        mean = summary.models[e].rewards[name].mean
        gain = summary.models[e].rewards[name].gain_in_stds
        if math.isnan(mean.value):
            lines.append(f"{name}: does not apply")
            continue
        value, low, high = map(score_text, (mean.value, mean.low, mean.high))
        gained = f", gain {gain.text('+.2f')} stds" if e and math.isfinite(gain.value) else ""
        lines.append(f"{name}: {value} [{low}, {high}]{gained}")
    return "<br>".join([f"<b>{plain(table.models[e].label)}</b>", *map(plain, lines)])


def _short(model: Column) -> str:
    """Return a model's name beside others of its series."""
    return model.label.removeprefix(f"{model.series}/").rsplit(" ", 1)[-1]


def _title(table: Table, reward: str) -> str:
    unit = table.units[reward]
    return plain(f"{reward} ({unit})" if unit else reward)


def _positions(pair: Array, names: Sequence[str]) -> list[str]:
    """Return where each name stands, so that it covers no point and no name before it.

    Args:
        pair: ``[E, 2]``, the points; NaN: none.
        names: E texts; empty: none.
    """
    known = ~numpy.isnan(pair).any(1)  # [E]
    chosen = ["top center"] * len(pair)
    if not known.any():
        return chosen
    low, high = pair[known].min(0), pair[known].max(0)
    extent = numpy.where(high > low, high - low, 1.0)
    pixels = (pair - low) / extent * SIZES[:, None]  # [sizes, E, 2]
    # Middles [sizes, T, 2] of what stands there already, and half the widths [T].
    taken, halves = pixels[:, known], numpy.full(known.sum(), POINT / 2)
    for e in numpy.flatnonzero(known).tolist():
        if not names[e]:
            continue
        half = len(names[e]) * LETTER / 2
        middles = {
            place: pixels[:, e] + [right + 2 * part * half, up]
            for place, (right, up, part) in PLACES.items()
        }  # each [sizes, 2]
        free = {}
        for place, middle in middles.items():
            apart = abs(taken - middle[:, None]) > numpy.stack(
                [halves + half, numpy.full_like(halves, HEIGHT)], 1
            )
            inside = abs(middle[:, 0] - SIZES[:, 0] / 2) + half < SIZES[:, 0] / 2 + BESIDE
            free[place] = int((apart.any(2).all(1) & inside).sum())
        chosen[e] = max(free, key=lambda place: free[place])
        taken = numpy.concatenate([taken, middles[chosen[e]][:, None]], 1)
        halves = numpy.append(halves, half)
    return chosen
