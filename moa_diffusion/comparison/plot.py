"""The plot of a comparison: gains, the worst of them, a front, and who got the weight."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from moa_diffusion.comparison.read import RunData
from moa_diffusion.comparison.results import Comparison, MethodSummary, RunSummary, opposed
from moa_diffusion.report.palette import Mark, colours, marks
from moa_diffusion.statistics.bootstrap import LEVEL, Array, Estimate

OUTLIER = 4.0  # times the median reach
LINES = ("-", "--", "-.", ":")
COLUMNS = 5  # small multiples side by side
LINE = 11  # points between stacked labels


def plot_comparison(
    comparison: Comparison,
    runs: Sequence[RunData],
    target: Path,
    *,
    pair: tuple[str, str] | None = None,
) -> None:
    """Write a PNG.

    Args:
        comparison: The comparison of M methods and K objectives.
        runs: What it was made from.
        target: The PNG file that is written.
        pair: Objectives of the front plot; the two that oppose each other most if None.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(comparison.methods)
    style = marks(method.method for method in comparison.methods)
    columns = -(-count // -(-count // COLUMNS))  # rows as even as can be
    upper = 1.5 + 0.34 * count
    lower = max(4.6, 2.1 * -(-count // columns) + 1.2)
    width = max(13.0, 1.4 + 2.5 * (len(comparison.names) + 1))
    figure = pyplot.figure(figsize=(width, upper + lower + 0.4), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[upper, lower], hspace=0.04)
    above, below = parts
    _gains(above, comparison, style)
    left, right = below.subfigures(1, 2, width_ratios=[1.0, 1.75], wspace=0.03)
    _front(left, comparison, style, pair or opposed(comparison))
    _weights(right, comparison, runs, columns)
    figure.suptitle(
        "Gains over the start of training, in units of its spread within a prompt: "
        f"{comparison.prompts} held-out prompts, {comparison.images} samples"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def _gains(figure: Any, comparison: Comparison, style: Mapping[str, Mark]) -> None:
    """Draw a column per objective and the worst gain; a row per method."""
    names = comparison.names
    panels = figure.subplots(1, len(names) + 1, sharey=True, squeeze=False)[0]
    for name, panel in zip(names, panels, strict=False):
        _rows(panel, comparison, style, [method.gains[name] for method in comparison.methods])
        panel.set_title(name, fontsize=10)
    worst = panels[-1]
    _rows(worst, comparison, style, [method.worst for method in comparison.methods])
    worst.set_title("worst objective", fontsize=10, fontweight="bold")
    for row, method in enumerate(comparison.methods):
        said = "-" if math.isnan(method.worst.value) else f"{method.worst.value:+.2f}"
        worst.annotate(
            said, (1.02, row), xycoords=worst.get_yaxis_transform(), va="center", fontsize=9
        )
    panels[0].set_yticks(
        range(len(comparison.methods)), [method.method for method in comparison.methods]
    )
    panels[0].set_ylim(len(comparison.methods) - 0.4, -0.6)
    figure.supxlabel(
        f"gain over the start of training (0) with a {LEVEL:.0%} bootstrap interval, filled where "
        "that leaves 0 out (with several runs); worst: mean over runs of the smallest gain, with "
        "its number;\n◀ ▶: the mean, then with its number, or the interval lies beyond the axis",
        fontsize=9,
    )


def window(ends: Array) -> tuple[float, float]:
    """Return the range of an axis on which all but outliers are told apart.

    An outlier reaches more than ``OUTLIER`` times as far from 0 as the median: with it on the axis,
    all others would lie on one spot.

    Args:
        ends: The lower and the upper end of each row, ``[M, 2]``; NaN: none.
    """
    known = ends[~numpy.isnan(ends).any(1)]
    reach = numpy.abs(known).max(1, initial=0.0)  # [M]
    kept = known[reach <= OUTLIER * numpy.median(reach)] if len(known) else known
    low, high = float(kept.min(initial=0.0)), float(kept.max(initial=0.0))
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def _rows(
    panel: Any,
    comparison: Comparison,
    style: Mapping[str, Mark],
    estimates: Sequence[Estimate],
) -> None:
    """Draw one estimate per row: a marker with its interval, at the edge if it lies beyond."""
    panel.axvline(0, color="black", linewidth=0.8)
    left, right = window(numpy.array([[one.low, one.high] for one in estimates]))
    for row, (method, one) in enumerate(zip(comparison.methods, estimates, strict=True)):
        colour = style[method.method].colour
        if math.isnan(one.value):
            continue
        panel.plot([one.low, one.high], [row, row], color=colour, linewidth=2.2)
        beyond = {"<": one.low < left, ">": one.high > right}
        for arrow, edge in (("<", left), (">", right)):
            if beyond[arrow]:
                panel.plot(edge, row, arrow, color=colour, markersize=8, clip_on=False)
        if left <= one.value <= right:
            clear = method.tells_of_seeds and (one.low > 0 or one.high < 0)
            panel.plot(
                one.value,
                row,
                style[method.method].marker,
                color=colour,
                markerfacecolor=colour if clear else "white",
                markersize=7,
                markeredgewidth=1.5,
            )
        else:
            aside = {"ha": "left", "xytext": (8, 4)} if beyond["<"] else {"ha": "right"}
            panel.annotate(
                f"{one.value:+.2f}",
                (left if beyond["<"] else right, row),
                **{"xytext": (-8, 4), **aside},
                textcoords="offset points",
                fontsize=8,
            )
    panel.set_xlim(left, right)
    panel.grid(axis="x", color="0.92")
    panel.set_axisbelow(True)
    panel.tick_params(axis="y", length=0)
    panel.tick_params(axis="x", labelsize=8)
    panel.locator_params(axis="x", nbins=5)
    panel.spines[["top", "right", "left"]].set_visible(False)


def _front(
    figure: Any,
    comparison: Comparison,
    style: Mapping[str, Mark],
    pair: tuple[str, str],
) -> None:
    """Draw two objectives against each other: means with their path, and each seed's end."""
    panel = figure.subplots()
    panel.axhline(0, color="0.6", linewidth=0.8)
    panel.axvline(0, color="0.6", linewidth=0.8)
    ends = {
        method.method: numpy.array(
            [
                [run.gains[name] for name in pair]
                for run in comparison.runs
                if run.method == method.method
            ]
        )
        for method in comparison.methods
    }  # each [R, 2]
    every = numpy.concatenate(list(ends.values()))
    low, high = numpy.array([window(every[:, [axis, axis]]) for axis in (0, 1)]).T  # each [2]
    beyond: Counter[tuple[bool, bool]] = Counter()  # labels in each corner, which would overlap
    for method in comparison.methods:
        mark = style[method.method]
        mine = [run for run in comparison.runs if run.method == method.method]
        panel.plot(*ends[method.method].T, mark.marker, color=mark.colour, markersize=4, alpha=0.5)
        path = mean_path(mine, pair)
        panel.plot(path[:, 0], path[:, 1], color=mark.colour, linewidth=1, alpha=0.8)
        panel.plot(path[1:-1, 0], path[1:-1, 1], ".", color=mark.colour, markersize=4)
        place = numpy.clip(path[-1], low, high)
        panel.plot(
            *place,
            mark.marker,
            color=mark.colour,
            markersize=9,
            markeredgecolor="white",
            label=method.method,
            clip_on=False,
            zorder=4,
        )
        if (place != path[-1]).any() and not numpy.isnan(path[-1]).any():
            left, lower = (bool(side) for side in place < (low + high) / 2)
            above = beyond[left, lower] * LINE
            beyond[left, lower] += 1
            panel.annotate(
                f"{method.method}: {path[-1, 0]:+.1f}, {path[-1, 1]:+.1f}",
                place,
                (9 if left else -9, 6 + above if lower else -10 - above),
                textcoords="offset points",
                ha="left" if left else "right",
                fontsize=8,
            )
    panel.plot(0, 0, "+", color="black", markersize=12, markeredgewidth=2, zorder=5)
    panel.annotate("start", (0, 0), (6, -12), textcoords="offset points", fontsize=8)
    panel.set_xlim(low[0], high[0])
    panel.set_ylim(low[1], high[1])
    panel.locator_params(nbins=6)
    panel.set_xlabel(f"{pair[0]}, gain")
    panel.set_ylabel(f"{pair[1]}, gain")
    figure.suptitle(
        "large: mean; small: each seed; line: over the evaluations;\n"
        "at the edge, with its numbers: beyond the axes",
        fontsize=9,
    )
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def mean_path(runs: Sequence[RunSummary], pair: tuple[str, str]) -> Any:
    """Return the path from the start through the evaluations of all runs to the mean of the ends.

    Returns:
        ``[E + 1, 2]``, mean gains over runs; runs that end at different steps share only those
        before.
    """
    common = sorted(set.intersection(*(set(list(run.path)[:-1]) for run in runs)))
    points = [[[run.path[step][name] for name in pair] for run in runs] for step in common]
    points.append([[run.gains[name] for name in pair] for run in runs])
    return numpy.vstack([numpy.zeros((1, 2)), numpy.array(points).mean(1)])


def _weights(figure: Any, comparison: Comparison, runs: Sequence[RunData], columns: int) -> None:
    """Draw a panel per method: the weights over rollouts, as the mean over seeds."""
    methods = comparison.methods
    colour = colours(comparison.names)
    rows = -(-len(methods) // columns)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(methods) :]:
        panel.set_axis_off()
    for number, method in enumerate(methods):
        panel = panels.flat[number]
        mine = [run for run in runs if run.method == method.method]
        for k, name in enumerate(comparison.names):
            steps, mean = mean_weights(mine, name)
            panel.plot(
                steps,
                mean,
                color=colour[name],
                linestyle=LINES[k % len(LINES)],
                linewidth=1.6,
                label=name if number == 0 else None,
            )
        panel.set_title(_weights_title(method), fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="0.94")
        if number + columns >= len(methods):  # nothing below it
            panel.tick_params(labelbottom=True)
            panel.set_xlabel("rollouts", fontsize=8)
    panels[0, 0].locator_params(axis="x", integer=True)
    low, high = panels[0, 0].get_ylim()
    panels[0, 0].set_ylim(min(low, 0.0), high)
    figure.supylabel("weight (absolute sum 1)", fontsize=9)
    figure.suptitle(
        "weights, mean over seeds; under each name the biggest share of the advantage's variance",
        fontsize=9,
    )
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _weights_title(method: MethodSummary) -> str:
    name, share = method.biggest()
    return f"{method.method}\n{share:.0%} {name}" if name else method.method


def mean_weights(runs: Sequence[RunData], name: str) -> tuple[list[int], list[float]]:
    """Return rollouts, and an objective's weight there: the mean of the runs that got so far."""
    weights: dict[int, list[float]] = {}
    for run in runs:
        for row in run.metrics:
            if (weight := row.get(f"weight/{name}")) is not None:
                weights.setdefault(row["step"], []).append(weight)
    steps = sorted(weights)
    return steps, [sum(weights[step]) / len(weights[step]) for step in steps]
