"""Charts of training: a panel per reward or other number, a colour per run."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from moa_diffusion.files.captions import score_text
from moa_diffusion.report.page.figures import PANEL, Panel, figure, plain
from moa_diffusion.report.page.runs import Curve, Training
from moa_diffusion.report.palette import Mark

Charts = Mapping[str, Mapping[str, Sequence[Panel]]]

ROLLOUTS = ("reward_mean", "image", "text")  # groups that are drawn thinly, behind evaluations
DRIFT = ("image", "eval_image", "text", "eval_text")
OWN = ("weight", "share", "correlation", "cosine", "eval_gap", "alarm")  # with their own section
CONFLICTS = {
    "cosine": "cosines of the gradients",
    "correlation": "correlations of the advantages",
}
FEW = 8  # rollouts up to which there would be ticks between them
POINTS = 21  # points that an alarm's line is drawn of
PARTS = {  # shares of training, from and to
    "the last quarter of training": (0.75, 1.0),
    "the first quarter": (0.0, 0.25),
    "all of it": (0.0, 1.0),
}


def training_charts(
    runs: Sequence[Training], units: Mapping[str, str], marks: Mapping[str, Mark]
) -> Charts:
    """Return the panels of all sections.

    Args:
        runs: The curves of each run, by group and name.
        units: Units by reward, of those that are known.
        marks: Marks by run.

    Returns:
        Panels by section, and by what the reader chooses to see in it; in sections without a choice
        they stand under the empty text. What has no panel is left out.
    """

    def panels(groups: Sequence[str], names: Iterable[str], **options: Any) -> list[Panel]:
        made = [_panel(runs, groups, name, marks, **options) for name in names]
        return [panel for panel in made if panel is not None]

    objectives = list(dict.fromkeys(name for run in runs for name in run.objectives))
    heldout = [name for run in runs for name in run.heldout if name not in objectives]
    evaluated = _names(runs, "eval_mean")

    def title(name: str) -> str:
        unit = units.get(name)
        return name + (", held-out" if name in heldout else "") + (f" ({unit})" if unit else "")

    drawn = {"reward_mean", "eval_mean", "eval_sem", *DRIFT, *OWN}
    groups = dict.fromkeys(group for run in runs for group in run.curves if group not in drawn)
    sections = {
        "rewards": {
            "": panels(
                ("reward_mean", "eval_mean"),
                dict.fromkeys([*objectives, *heldout, *evaluated]),
                title=title,
            )
        },
        "weights": {"": panels(("weight",), _names(runs, "weight"), zero=True)},
        "share": {"": panels(("share",), _names(runs, "share"), whole=True)},
        "conflict": {
            part: [panel for run in runs for panel in _conflict(run, part)] for part in PARTS
        },
        "drift": {
            "": panels(
                DRIFT,
                dict.fromkeys(name for group in DRIFT for name in _names(runs, group)),
                title=lambda name: name.replace("_", " "),
            )
        },
        "gap": {"": panels(("eval_gap",), _names(runs, "eval_gap"))},
        "watch": {"": panels(("alarm",), _names(runs, "alarm"), zero=True)},
        # Seconds last: they are the least about learning.
        "other": {
            group: panels((group,), _names(runs, group))
            for group in sorted(groups, key="seconds".__eq__)
        },
    }
    filled = {
        section: {choice: made for choice, made in choices.items() if made}
        for section, choices in sections.items()
    }
    return {section: choices for section, choices in filled.items() if choices}


def _names(runs: Sequence[Training], group: str) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.curves.get(group, ())))


def _panel(
    runs: Sequence[Training],
    groups: Sequence[str],
    name: str,
    marks: Mapping[str, Mark],
    *,
    title: Callable[[str], str] = str,
    zero: bool = False,
    whole: bool = False,
) -> Panel | None:
    """Return the curves of one name in some groups, drawn over each other; None: there are none.

    Args:
        runs: The curves of each run, by group and name.
        groups: The groups, from the back to the front.
        name: The curves' name in these groups, such as that of a reward.
        marks: Marks by run.
        title: What the panel of a name is called.
        zero: Whether the axis starts at 0.
        whole: Whether the axis goes from 0 to 1, and a little beyond.
    """
    curves = [
        (run, group, curve, known)
        for group in groups
        for run in runs
        if (curve := run.curves.get(group, {}).get(name)) is not None
        and (known := [value for value in curve.values if value is not None])
    ]
    if not curves:
        return None
    traces, ends = [], []
    for run, group, curve, known in curves:
        ends.append(f"{run.name}: from {score_text(known[0])} to {score_text(known[-1])}")
        error = run.curves.get("eval_sem", {}).get(name) if group == "eval_mean" else None
        if error is not None:
            traces.append(_band(curve, error, marks[run.name].colour))
        traces.append(_line(run, group, name, marks[run.name]))
    lines, shaded = _alarms(runs, name, marks)
    yaxis: dict[str, Any] = {"rangemode": "tozero" if zero else "normal"}
    if whole:
        # Where objectives oppose each other a share lies outside.
        values = [value for *_, known in curves for value in known]
        yaxis = {"range": [min(0, *values) - 0.03, max(1, *values) + 0.03]}
    layout = {
        "xaxis": _rollouts(max(curve.steps[-1] for _, _, curve, _ in curves)),
        "yaxis": yaxis,
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
        "shapes": shaded,
    }
    return Panel(title=title(name), words="; ".join(ends), figure=figure([*traces, *lines], layout))


def _rollouts(last: float) -> dict[str, Any]:
    """Return the axis of rollouts, whose ticks are whole numbers also of a short run."""
    axis = {"title": {"text": "rollouts", "standoff": 4}, "rangemode": "tozero"}
    return axis | ({"dtick": 1} if last < FEW else {})


def _line(run: Training, group: str, name: str, mark: Mark) -> Any:
    import plotly.graph_objects as go

    curve = run.curves[group][name]
    evaluated = group.startswith("eval_") or group == "alarm"
    thin = group in ROLLOUTS
    return go.Scatter(
        x=curve.steps,
        y=curve.values,
        mode="lines+markers" if evaluated else "lines",
        connectgaps=evaluated,
        opacity=0.75 if thin else 1,
        line={
            "width": 2 if evaluated else 1.2 if thin else 1.8,
            "dash": "dash" if evaluated and name in run.heldout else "solid",
            "color": mark.colour,
        },
        marker={"size": 7, "symbol": mark.symbol},
        name=plain(run.name),
        hovertemplate=(
            f"%{{fullData.name}}, {'evaluations' if evaluated else 'rollouts'}"
            "<br>rollout %{x}: %{y:.4g}<extra></extra>"
        ),
    )


def _band(mean: Curve, error: Curve, colour: str) -> Any:
    """Return a band of one standard error."""
    import plotly.graph_objects as go

    errors = dict(zip(error.steps, error.values, strict=True))
    known = [
        (step, value, sem)
        for step, value in zip(mean.steps, mean.values, strict=True)
        if value is not None and (sem := errors.get(step)) is not None
    ]
    return go.Scatter(
        x=[step for step, *_ in (*known, *reversed(known))],
        y=[value + sem for _, value, sem in known]
        + [value - sem for _, value, sem in reversed(known)],
        mode="none",
        fill="toself",
        opacity=0.2,
        fillcolor=colour,
        hoverinfo="skip",
    )


def _alarms(
    runs: Sequence[Training], name: str, marks: Mapping[str, Mark]
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Return upright lines that say the message, and shades over what a rollback took back."""
    import plotly.graph_objects as go

    traces, shaded = [], []
    for run in runs:
        taken = 0  # what an earlier rollback took back is shaded already
        for alarm in run.alarms:
            other = alarm["name"] != name and alarm["kind"] != "reward_hack"
            if other and alarm["action"] == "warn":
                continue
            message = f"{run.name}, rollout {alarm['step']}: {alarm['message']}"
            traces.append(
                go.Scatter(
                    x=[alarm["step"]] * POINTS,  # a pointer finds the line at any of its points
                    y0=0,
                    dy=1 / (POINTS - 1),
                    yaxis="y2",
                    mode="lines+markers",
                    marker={
                        "symbol": "triangle-down",
                        "size": [0] * (POINTS - 1) + [10],
                        "color": marks[run.name].colour,
                        "line": {"width": 0},
                    },
                    line={"dash": "dot", "width": 1.5, "color": marks[run.name].colour},
                    cliponaxis=False,
                    hovertext="<br>".join(map(plain, textwrap.wrap(message, 46))),
                    hoverinfo="text",
                    meta="alarm",
                )
            )
            if alarm["action"] == "rollback" and alarm.get("to_step") is not None:
                shaded.append(
                    {
                        "type": "rect",
                        "xref": "x",
                        "yref": "paper",
                        "x0": max(alarm["to_step"], taken),
                        "x1": alarm["step"],
                        "y0": 0,
                        "y1": 1,
                        "fillcolor": marks[run.name].colour,
                        "opacity": 0.13,
                        "line": {"width": 0},
                        "layer": "below",
                    }
                )
                taken = alarm["step"]
    return traces, shaded


def _conflict(run: Training, part: str) -> list[Panel]:
    """Return a map of how much the objectives pull against each other, if that was measured."""
    import plotly.graph_objects as go

    kind = "cosine" if "cosine" in run.curves else "correlation"
    means = {
        tuple(pair.split("~")): _mean(curve, *PARTS[part])
        for pair, curve in run.curves.get(kind, {}).items()
    }
    if not means:
        return []
    measured = dict.fromkeys(name for pair in means for name in pair)
    names = [name for name in run.objectives if name in measured]
    names += [name for name in measured if name not in run.objectives]
    both = means | {(b, a): mean for (a, b), mean in means.items()}
    labels = [plain(name) for name in names]
    trace = go.Heatmap(
        x=labels,
        y=labels,
        z=[[1.0 if a == b else both.get((a, b)) for b in names] for a in names],
        zmin=-1,
        zmax=1,
        xgap=2,
        ygap=2,
        colorscale=[[0, "#d55e00"], [0.5, PANEL], [1, "#0072b2"]],
        texttemplate="%{z:.2f}",
        textfont={"size": 13},
        hovertemplate="%{y}, %{x}: %{z:.3f}<extra></extra>",
        colorbar={"thickness": 10, "tickvals": [-1, -0.5, 0, 0.5, 1], "outlinewidth": 0},
    )
    axis = {"type": "category", "showgrid": False, "fixedrange": True}
    layout = {
        "dragmode": False,
        "xaxis": axis | {"tickangle": -35 if len(names) > 3 else 0},
        "yaxis": axis | {"autorange": "reversed"},
    }
    words = "; ".join(
        f"{a} and {b}: {score_text(math.nan if mean is None else mean)}"
        for (a, b), mean in means.items()
    )
    title = f"{run.name}: {CONFLICTS[kind]}"
    return [Panel(title=title, words=words, figure=figure([trace], layout))]


def _mean(curve: Curve, first: float, last: float) -> float | None:
    """Return the mean over a part of training, as parts of its length."""
    end = curve.steps[-1]
    known = [
        value
        for step, value in zip(curve.steps, curve.values, strict=True)
        if value is not None and first * end <= step <= last * end
    ]
    return fmean(known) if known else None
