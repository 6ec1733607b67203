"""The charts of training, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from moa_diffusion.report.page.runs import Curve, Training
from moa_diffusion.report.page.training_charts import PARTS, Charts, training_charts
from moa_diffusion.report.palette import marks

REWARDS = ("text", "colour")


def curve(*values: float | None, every: int = 1) -> Curve:
    return Curve(steps=tuple(every * i for i in range(len(values))), values=values)


def run_of(
    name: str, curves: Mapping[str, Mapping[str, Curve]], *alarms: Mapping[str, Any]
) -> Training:
    return Training(
        name=name,
        curves=curves,
        pooled=1,
        objectives=REWARDS,
        heldout=("watched",),
        alarms=alarms,
        front=(),
        files={},
    )


def charts_of(*runs: Training) -> Charts:
    return training_charts(runs, {"colour": "points"}, marks([run.name for run in runs]))


def test_what_was_not_measured_has_no_section():
    assert charts_of(run_of("a", {})) == {}
    only = charts_of(run_of("a", {"weight": {"text": curve(0.5, 0.5), "colour": curve(None)}}))
    assert list(only) == ["weights"]
    assert [panel.title for panel in only["weights"][""]] == ["text"]


def test_evaluations_lie_over_rollouts_in_the_colour_of_their_run():
    def measured(start: float) -> dict[str, dict[str, Curve]]:
        evaluated = curve(start, start + 1, every=4)
        return {
            "reward_mean": {"text": curve(None, start, 2.0), "colour": curve(1.0)},
            "eval_mean": {"text": evaluated, "watched": evaluated},
            "eval_sem": {"text": curve(0.5, 0.25, every=4)},
        }

    charts = charts_of(run_of("a", measured(0.0)), run_of("<b>", measured(1.0)))
    text, colour, watched = charts["rewards"][""]
    titles = [panel.title for panel in (text, colour, watched)]
    assert titles == ["text", "colour (points)", "watched, held-out"]
    assert text.words.startswith("a: from 0.000 to 2.000; <b>: from 1.000 to 2.000; a: from ")
    names = [trace.get("name") for trace in text.figure["data"]]
    assert names == ["a", "&lt;b&gt;", None, "a", None, "&lt;b&gt;"]
    rollouts, _, band, evaluations, *_ = text.figure["data"]
    assert rollouts["opacity"] < evaluations["opacity"]
    assert rollouts["line"]["color"] == evaluations["line"]["color"] == band["fillcolor"]
    assert (rollouts["mode"], evaluations["mode"]) == ("lines", "lines+markers")
    assert (list(band["x"]), list(band["y"])) == ([0, 4, 4, 0], [0.5, 1.25, 0.75, -0.5])
    assert {trace["line"]["dash"] for trace in watched.figure["data"]} == {"dash"}


def test_shares_are_seen_between_zero_and_one_and_where_they_leave_that():
    share = {"text": curve(0.5, 0.5), "colour": curve(-0.5, 1.25)}
    panels = charts_of(run_of("a", {"share": share}))["share"][""]
    ranges = [panel.figure["layout"]["yaxis"]["range"] for panel in panels]
    assert ranges == [pytest.approx((-0.03, 1.03)), pytest.approx((-0.53, 1.28))]


def test_an_alarm_is_marked_and_what_it_took_back_is_shaded_once():
    def alarm(step: int, kind: str, action: str, **more: Any) -> dict[str, Any]:
        return {"step": step, "kind": kind, "name": "text", "action": action, "message": "m"} | more

    alarms = (
        alarm(4, "reward_hack", "rollback", to_step=2),
        alarm(6, "reward_hack", "rollback", to_step=3),
        alarm(7, "drift", "warn"),
    )
    weights = {"text": curve(0.5, 0.5), "colour": curve(0.5, 0.5)}
    panels = charts_of(run_of("a", {"weight": weights}, *alarms))["weights"][""]
    marks = [
        [trace["hovertext"] for trace in panel.figure["data"] if trace.get("meta") == "alarm"]
        for panel in panels
    ]
    hacks = ["a, rollout 4: m", "a, rollout 6: m"]
    assert marks == [[*hacks, "a, rollout 7: m"], hacks], "a warning concerns its own panel"
    shades = [(one["x0"], one["x1"]) for one in panels[0].figure["layout"]["shapes"]]
    assert shades == [(2, 4), (4, 6)]


def test_conflict_is_a_symmetric_map_of_a_part_of_training():
    values = curve(0.0, 0.25, 0.5, 0.75, None)
    charts = charts_of(run_of("a", {"correlation": {"colour~text": values}}))["conflict"]
    assert list(charts) == list(PARTS)
    found = {}
    for part, (panel,) in charts.items():
        (trace,) = panel.figure["data"]
        assert list(trace["x"]) == list(trace["y"]) == list(REWARDS)
        (one, a), (b, other) = trace["z"]
        assert (one, other) == (1.0, 1.0)
        assert a == b
        found[part] = a
    assert list(found.values()) == [0.75, 0.125, 0.375]
    assert charts["all of it"][0].words == "colour and text: 0.375"
    both = {"correlation": {"text~colour": values}, "cosine": {"text~colour": values}}
    assert charts_of(run_of("a", both))["conflict"]["all of it"][0].title.endswith("gradients")


def test_the_rest_is_shown_by_group_with_seconds_last():
    curves = {group: {"text": curve(1.0)} for group in ("seconds", "reward_std", "policy")}
    charts = charts_of(run_of("a", curves | {"empty": {"text": curve(None)}}))
    assert list(charts["other"]) == ["reward_std", "policy", "seconds"]
