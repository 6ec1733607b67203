"""The plot of a calibration: how rewards vary, who decides the gradient, who opposes whom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from moa_diffusion.report.palette import colours
from moa_diffusion.statistics.groups import group_centred
from moa_diffusion.storage.calibration_file import HIJACK, Calibration
from moa_diffusion.types import RewardMatrix

RECIPES = {
    "raw rewards,\nconfigured weights": "share_static",
    "gdpo,\nequal weights": "share_gdpo",
    "dual_stage,\nequal weights": "share_dual_stage",
}
COLUMNS = 4  # histograms side by side


def plot_calibration(
    calibration: Calibration, rewards: RewardMatrix, units: Mapping[str, str], target: Path
) -> None:
    """Write a PNG: a histogram per objective, shares of three recipes, correlations.

    Args:
        calibration: What was measured of the K objectives.
        rewards: The raw rewards ``[K, N]`` it was made from.
        units: The unit of each reward, by objective.
        target: The PNG file that is written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(calibration.objectives)
    columns = min(len(names), COLUMNS)
    rows = -(-len(names) // columns)
    figure = pyplot.figure(figsize=(max(3.4 * columns, 11), 2.9 * rows + 4.4), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.9 * rows, 4.0])
    upper, lower = parts
    _histograms(upper.subplots(rows, columns, squeeze=False).flat, calibration, rewards, units)
    left, right = lower.subplots(1, 2, width_ratios=[1.7, 1])
    _shares(left, calibration)
    _heat_map(right, names, calibration.correlations)
    figure.suptitle(
        f"{calibration.model}: {calibration.prompts} prompts x {calibration.images} images before "
        "training (shaded: one standard deviation within prompts)"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def _histograms(
    panels: Any, calibration: Calibration, rewards: RewardMatrix, units: Mapping[str, str]
) -> None:
    """Draw values less their group's mean; the shaded band is one deviation within groups."""
    panels = list(panels)
    for panel in panels[len(calibration.objectives) :]:
        panel.set_axis_off()
    centred, _ = group_centred(rewards)  # [K, N]
    applies = ~rewards.values.isnan()
    colour = colours(calibration.objectives)
    for k, (name, objective) in enumerate(calibration.objectives.items()):
        panel = panels[k]
        panel.set_title(name)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.set_yticks([])
        if not applies[k].any():
            panel.text(0.5, 0.5, "applies to no prompt", ha="center", transform=panel.transAxes)
            panel.set_xticks([])
            continue
        reach = float(centred[k].abs().max()) or 1.0
        edges = numpy.linspace(-reach, reach, 32)
        panel.hist(centred[k][applies[k]].numpy(), edges, color=colour[name])
        if objective.std_within > 0:
            panel.axvspan(
                -objective.std_within, objective.std_within, color="black", alpha=0.08, zorder=0
            )
        unit = f" [{units[name]}]" if units.get(name) else ""
        panel.set_xlabel(
            f"difference to the prompt's mean{unit}\n"
            f"mean {objective.mean:.3g}, std within {objective.std_within:.3g}, "
            f"between {objective.std_between:.3g}",
            fontsize=8,
        )


def _shares(panel: Any, calibration: Calibration) -> None:
    """Draw bars of each recipe, one per objective; above the dashed line one decides alone."""
    count = len(calibration.objectives)
    colour = colours(calibration.objectives)
    width = 0.84 / count
    for k, (name, objective) in enumerate(calibration.objectives.items()):
        heights = [getattr(objective, field) for field in RECIPES.values()]
        places = [i + (k - (count - 1) / 2) * width for i in range(len(RECIPES))]
        bars = panel.bar(places, heights, 0.94 * width, color=colour[name], label=name)
        panel.bar_label(bars, [f"{round(100 * h)}%" for h in heights], fontsize=8, padding=2)
    fields = RECIPES.values()
    shares = [
        getattr(objective, field)
        for objective in calibration.objectives.values()
        for field in fields
    ]
    low, high = min(shares), max(shares)
    panel.set_ylim(low - 0.08 if low < 0 else 0, max(1.0, high) + 0.1)
    panel.axhline(HIJACK, color="grey", linestyle="--", linewidth=1)
    panel.annotate(
        "above: hijacked",
        (1, HIJACK),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="grey",
    )
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set_xticks(range(len(RECIPES)), RECIPES)
    panel.tick_params(axis="x", length=0)
    panel.yaxis.set_major_formatter(lambda value, place: f"{value:.0%}")
    panel.set_title("who decides: share of the variance of the weighted sum")
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    panel.legend(
        frameon=False, fontsize=9, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14)
    )


def _heat_map(panel: Any, names: Sequence[str], values: Sequence[Sequence[float]]) -> None:
    """Draw red where two objectives oppose each other, blue where they agree."""
    panel.imshow(numpy.array(values), cmap="RdBu", vmin=-1, vmax=1)
    for j, row in enumerate(values):
        for k, value in enumerate(row):
            text = "-" if math.isnan(value) else f"{value:.2f}"
            colour = "white" if abs(value) > 0.6 else "black"
            panel.text(k, j, text, ha="center", va="center", color=colour, fontsize=9)
    panel.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=9)
    panel.set_yticks(range(len(names)), names, fontsize=9)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.set_title("correlation within prompts")
