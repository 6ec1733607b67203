"""``pareto.png``: every pair of rewards, with the models that no other dominates."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from moa_diffusion.files.writing import replaced
from moa_diffusion.report.palette import Mark, marks
from moa_diffusion.report.summary import RewardSummary, Summary
from moa_diffusion.report.table import Table
from moa_diffusion.statistics.bootstrap import LEVEL, Array
from moa_diffusion.statistics.pareto import nondominated

COLUMNS = 3
CROWDED = 16  # models beyond which only those of the front are named


def write_pareto(table: Table, summary: Summary, target: Path) -> None:
    """Write a PNG: a panel per pair of rewards, means of the samples.

    Filled: not dominated by any model in all rewards together. Dashed: the front of the pair. Bars:
    intervals of the gain over the base model's samples of the same prompts and seeds.

    Args:
        table: The table of E models and K rewards.
        summary: The summary of the table.
        target: The PNG file that is written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs = list(itertools.combinations(range(len(table.rewards)), 2))
    columns = min(COLUMNS, max(1, len(pairs)))
    rows = -(-max(1, len(pairs)) // columns)
    figure, panels = pyplot.subplots(
        rows,
        columns,
        squeeze=False,
        figsize=(max(6.0, 4.6 * columns), 4.0 * rows + 1.2),
        layout="constrained",
    )
    for panel in panels.flat[max(1, len(pairs)) :]:
        panel.set_axis_off()
    if pairs:
        for panel, (x, y) in zip(panels.flat, pairs, strict=False):
            _panel(panel, table, summary, x, y)
    else:
        _single(panels[0, 0], table, summary)
    handles = dict(
        pair
        for panel in panels.flat
        for pair in zip(*panel.get_legend_handles_labels()[::-1], strict=True)
    )
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        f"Mean rewards of {len(table.models)} models: {len(table.prompts)} prompts x "
        f"{len(table.seeds)} seeds. Filled: dominated by none in all rewards; "
        f"dashed: front of the pair; bars: {LEVEL:.0%} intervals of the gain over the base model",
        fontsize=10,
        wrap=True,
    )
    with replaced(target) as partial:
        figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)


def _ends(one: RewardSummary) -> Array:
    """Return how far error bars reach below and above a mean: ``[2, 1]``."""
    return numpy.array([[one.gain.value - one.gain.low], [one.gain.high - one.gain.value]])


def _style(table: Table) -> dict[str, Mark]:
    return marks(model.series for model in table.models if model.series)


def _panel(panel: Any, table: Table, summary: Summary, x: int, y: int) -> None:
    names = table.rewards[x], table.rewards[y]
    points = numpy.array(
        [[model.rewards[name].mean.value for name in names] for model in summary.models]
    )  # [E, 2]
    front = points[nondominated(torch.from_numpy(points))]
    front = front[numpy.argsort(front[:, 0])]
    panel.plot(front[:, 0], front[:, 1], "--", color="0.7", linewidth=1, zorder=1)
    for series, mark in _style(table).items():
        mine = [e for e, model in enumerate(table.models) if model.series == series]
        panel.plot([], [], mark.marker, color=mark.colour, markersize=7, label=series)
        path = points[_order(table, mine)]
        panel.plot(path[:, 0], path[:, 1], color=mark.colour, linewidth=0.8, alpha=0.5, zorder=2)
        for e in mine:
            across, up = (_ends(summary.models[e].rewards[name]) for name in names)
            panel.errorbar(
                *points[e], up, across, ecolor=mark.colour, elinewidth=0.8, alpha=0.6, zorder=2
            )
            panel.plot(
                *points[e],
                mark.marker,
                color=mark.colour,
                markerfacecolor=mark.colour if summary.models[e].nondominated else "white",
                markersize=7,
                zorder=3,
            )
    panel.plot(*points[0], "+", color="black", markersize=10, label="base model", zorder=4)
    _label(panel, table, summary, points)
    panel.axvline(points[0, 0], color="0.9", linewidth=0.8, zorder=0)
    panel.axhline(points[0, 1], color="0.9", linewidth=0.8, zorder=0)
    for axis, name in zip((panel.set_xlabel, panel.set_ylabel), names, strict=True):
        axis(f"{name} ({table.units[name]})" if table.units[name] else name, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.margins(0.12)
    panel.spines[["top", "right"]].set_visible(False)


def _order(table: Table, members: Sequence[int]) -> list[int]:
    """Return the models that a line joins, in order.

    The line of a run starts at the base model; that of a soup of two goes from end to end.
    """
    first = table.models[members[0]]
    if first.step is not None:
        return [0, *members]
    if first.weights is None or len(first.weights) != 2:
        return []
    labels = [model.label for model in table.models]
    one, other = (labels.index(name) for name in first.weights)
    return [other, *members, one]


def _label(panel: Any, table: Table, summary: Summary, points: Array) -> None:
    """Name the models, in the words that their series leaves to say."""
    for model, one, point in zip(table.models, summary.models, points, strict=True):
        if not model.series or (len(table.models) > CROWDED and not one.nondominated):
            continue
        words = model.label.removeprefix(f"{model.series}/").removeprefix("step-")
        if model.weights is not None:
            words = model.label.rsplit(" ", 1)[-1]
        panel.annotate(words, point, (5, 4), textcoords="offset points", fontsize=7, color="0.3")


def _single(panel: Any, table: Table, summary: Summary) -> None:
    """Draw one reward: means with their intervals, a row per model."""
    name = table.rewards[0]
    style = _style(table)
    for row, (model, one) in enumerate(zip(table.models, summary.models, strict=True)):
        mean = one.rewards[name].mean
        below, above = (float(end[0]) for end in _ends(one.rewards[name]))
        colour, marker = "black", "+"
        if model.series:
            colour, marker = style[model.series].colour, style[model.series].marker
        panel.plot([mean.value - below, mean.value + above], [row, row], color=colour, linewidth=2)
        panel.plot(mean.value, row, marker, color=colour, markersize=7)
    panel.set_yticks(range(len(table.models)), [model.label for model in table.models])
    panel.invert_yaxis()
    panel.set_xlabel(f"{name} ({table.units[name]})" if table.units[name] else name)
    panel.spines[["top", "right"]].set_visible(False)
