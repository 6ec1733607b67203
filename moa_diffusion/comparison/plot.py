"""The plot of a comparison: gains, the worst of them, a front, and who got the weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from moa_diffusion.comparison.read import RunData
from moa_diffusion.comparison.results import Comparison, MethodSummary, RunSummary, opposed
from moa_diffusion.statistics.bootstrap import LEVEL, Estimate

# Paul Tol's "muted" scheme with black, for methods, and Okabe and Ito's, for objectives: both are
# told apart with any colour vision, and by markers and lines besides.
METHODS = (
    *("#332288", "#cc6677", "#117733", "#ddaa33", "#88ccee"),
    *("#882255", "#44aa99", "#000000", "#999933", "#aa4499"),
)
MARKERS = "osD^vP*X<>"
OBJECTIVES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LINES = ("-", "--", "-.", ":")
COLUMNS = 5  # small multiples side by side


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
    # By name, so that a method keeps its colour when others rank differently.
    names = sorted(method.method for method in comparison.methods)
    style = {
        name: (METHODS[i % len(METHODS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)
    }
    columns = -(-count // -(-count // COLUMNS))  # rows as even as can be
    upper = 1.5 + 0.34 * count
    lower = max(4.6, 2.1 * -(-count // columns) + 1.2)
    width = max(13.0, 1.4 + 2.25 * (len(comparison.names) + 2))
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


def _gains(figure: Any, comparison: Comparison, style: Mapping[str, tuple[str, str]]) -> None:
    """Draw a column per objective, the worst gain and the hypervolume; a row per method."""
    names = comparison.names
    panels = figure.subplots(1, len(names) + 2, sharey=True, squeeze=False)[0]
    for name, panel in zip(names, panels, strict=False):
        _rows(panel, comparison, style, [method.gains[name] for method in comparison.methods])
        panel.set_title(name, fontsize=10)
    worst, volume = panels[-2:]
    estimates = [method.worst for method in comparison.methods]
    _rows(worst, comparison, style, estimates, bars=True)
    worst.set_title("worst objective", fontsize=10, fontweight="bold")
    estimates = [method.hypervolume for method in comparison.methods]
    _rows(volume, comparison, style, estimates, bars=True)
    volume.set_title("hypervolume", fontsize=10, fontweight="bold")
    volume.set_xlim(left=0)
    panels[0].set_yticks(
        range(len(comparison.methods)), [method.method for method in comparison.methods]
    )
    panels[0].set_ylim(len(comparison.methods) - 0.4, -0.6)
    figure.supxlabel(
        f"gain over the start of training (0) with a {LEVEL:.0%} bootstrap interval, filled where "
        "that leaves 0 out (with several runs); worst: mean over runs of the smallest gain",
        fontsize=9,
    )


def _rows(
    panel: Any,
    comparison: Comparison,
    style: Mapping[str, tuple[str, str]],
    estimates: Sequence[Estimate],
    *,
    bars: bool = False,
) -> None:
    """Draw one estimate per row: a marker or a bar, with its interval."""
    panel.axvline(0, color="black", linewidth=0.8)
    for row, (method, one) in enumerate(zip(comparison.methods, estimates, strict=True)):
        colour, marker = style[method.method]
        if math.isnan(one.value):
            continue
        if bars:
            panel.barh(row, one.value, 0.62, color=colour, alpha=0.55)
        line = "black" if bars else colour
        panel.plot([one.low, one.high], [row, row], color=line, linewidth=1.2 if bars else 2.2)
        if not bars:
            clear = method.tells_of_seeds and (one.low > 0 or one.high < 0)
            panel.plot(
                one.value,
                row,
                marker,
                color=colour,
                markerfacecolor=colour if clear else "white",
                markersize=7,
                markeredgewidth=1.5,
            )
    panel.grid(axis="x", color="0.92")
    panel.set_axisbelow(True)
    panel.tick_params(axis="y", length=0)
    panel.tick_params(axis="x", labelsize=8)
    panel.locator_params(axis="x", nbins=5)
    panel.spines[["top", "right", "left"]].set_visible(False)


def _front(
    figure: Any,
    comparison: Comparison,
    style: Mapping[str, tuple[str, str]],
    pair: tuple[str, str],
) -> None:
    """Draw two objectives against each other: means with their path, and each seed's end."""
    panel = figure.subplots()
    panel.axhline(0, color="0.6", linewidth=0.8)
    panel.axvline(0, color="0.6", linewidth=0.8)
    for method in comparison.methods:
        colour, marker = style[method.method]
        mine = [run for run in comparison.runs if run.method == method.method]
        ends = [[run.gains[name] for name in pair] for run in mine]
        panel.plot(*zip(*ends, strict=True), marker, color=colour, markersize=4, alpha=0.5)
        path = mean_path(mine, pair)
        panel.plot(path[:, 0], path[:, 1], color=colour, linewidth=1, alpha=0.8)
        panel.plot(path[1:-1, 0], path[1:-1, 1], ".", color=colour, markersize=4)
        panel.plot(
            *path[-1],
            marker,
            color=colour,
            markersize=9,
            markeredgecolor="white",
            label=method.method,
            zorder=4,
        )
    panel.plot(0, 0, "+", color="black", markersize=12, markeredgewidth=2, zorder=5)
    panel.annotate("base", (0, 0), (6, -12), textcoords="offset points", fontsize=8)
    panel.locator_params(nbins=6)
    panel.set_xlabel(f"{pair[0]}, gain")
    panel.set_ylabel(f"{pair[1]}, gain")
    figure.suptitle("large: mean; small: each seed; line: over the evaluations", fontsize=9)
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
                color=OBJECTIVES[k % len(OBJECTIVES)],
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
