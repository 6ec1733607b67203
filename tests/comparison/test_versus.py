"""One method against others, on runs made by construction."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
from written_runs import NAMES, UNITS, compared, gain, write_run

from moa_diffusion.comparison.read import read_run
from moa_diffusion.comparison.versus import (
    Reached,
    paired_table,
    paired_worst,
    reached,
    reached_table,
)


def test_paired_runs_differ_by_what_their_worst_gains_do(tmp_path: Path) -> None:
    runs = []
    for method, seeds in {
        "apex": {1: gain(0.5, 1.0), 2: gain(0.75, 0.25), 3: gain(9, 9)},
        "static": {2: gain(-0.25, 1.0), 1: gain(1.0, 0.0)},
    }.items():
        for seed, end in seeds.items():
            folder = tmp_path / f"{method}-{seed}"
            write_run(folder, [end])
            runs.append(read_run(folder, method=method, seed=seed, names=NAMES))
    # Seed 1: .5 - 0; seed 2: .25 + .25; the third has no pair. Without noise nothing is unsure.
    found = paired_worst(runs, "apex", "static", UNITS)
    assert found.seeds == (1, 2)
    assert dataclasses.astuple(found.difference) == pytest.approx([0.5] * 3)
    unpaired = paired_worst(runs, "apex", "gdpo", UNITS)
    assert unpaired.seeds == ()
    assert math.isnan(unpaired.difference.value)
    text = paired_table({"static": found, "gdpo": unpaired}, "apex")
    assert re.search(r"\| static +\| +\+0.50 \[\+0.50, \+0.50\] \| +2 \|", text)
    assert re.search(r"\| gdpo +\| +- \| +0 \|", text)


def test_images_until_the_best_of_another_are_counted(tmp_path: Path) -> None:
    found = compared(
        tmp_path,
        {  # worst gains .2, .1, -1 and 0, .3, .4 and -.1 twice
            "static": [[gain(0.2, 1.0), gain(0.1, 1.0), gain(-1.0, 2.0)]],
            "apex": [[gain(0.0, 0.0), gain(0.3, 0.3), gain(0.4, 0.5)]],
            "mopo": [[gain(-0.1, 1.0), gain(-0.1, 2.0)]],
        },
    )
    images = {"static": 10, "apex": 10, "mopo": 20}
    worst = {one.method: one for one in reached(found, "static", images=images, volume=False)}
    assert (worst["static"].best, worst["static"].at, worst["static"].until) == (
        pytest.approx(0.2),
        150,
        150,
    )
    assert (worst["apex"].best, worst["apex"].at) == (pytest.approx(0.4), 450)
    assert worst["apex"].until == 300
    assert (worst["mopo"].at, worst["mopo"].until) == (300, None)
    # Volumes so far: static .2 at once, apex .09 and then .2, mopo none.
    volumes = {one.method: one for one in reached(found, "static", images=images, volume=True)}
    assert volumes["static"].until == 150
    assert volumes["apex"].best == pytest.approx(0.2)
    assert volumes["apex"].until == 450
    assert volumes["mopo"].until is None
    text = reached_table(list(worst.values()), "static", "worst gain")
    assert re.search(r"\| apex +\| +\+0.400 \| +450 \| +300 \|", text)
    assert re.search(r"\| mopo +\| +-0.100 \| +300 \| +never \|", text)
    assert "static's best worst gain is +0.200" in text


def test_a_reference_that_is_never_above_the_start_is_no_target(tmp_path: Path) -> None:
    found = compared(
        tmp_path, {"static": [[gain(-1.0, 1.0)] * 2], "apex": [[gain(-1.0, 1.0), gain(0.5, 0.5)]]}
    )
    rows = reached(found, "static", images={"static": 10, "apex": 10}, volume=True)
    assert {(one.method, one.at, one.until) for one in rows} == {
        ("static", 150, None),
        ("apex", 300, None),
    }
    text = reached_table(rows, "static", "hypervolume")
    assert "static never has all above the start" in text
    assert "never |" not in text


def test_evaluations_at_which_a_gain_is_not_known_count_for_nothing(tmp_path: Path) -> None:
    unknown = gain(math.nan, 1.0)
    found = compared(
        tmp_path,
        {"static": [[unknown, gain(0.2, 1.0)]], "apex": [[unknown, unknown]]},
    )
    images = {"static": 10, "apex": 10}
    rows = {one.method: one for one in reached(found, "static", images=images, volume=False)}
    assert rows["static"] == Reached(method="static", best=pytest.approx(0.2), at=300, until=300)
    assert math.isnan(rows["apex"].best)
    assert (rows["apex"].at, rows["apex"].until) == (None, None)
    text = reached_table(list(rows.values()), "static", "worst gain")
    assert re.search(r"\| apex +\| +- \| +- \| +never \|", text)
    nothing = reached(found, "apex", images=images, volume=False)
    assert "worst gain of apex is not known" in reached_table(nothing, "apex", "worst gain")


def test_methods_whose_runs_share_no_evaluation_have_no_best(tmp_path: Path) -> None:
    found = compared(tmp_path, {"apex": [[gain(0.1, 0.1)], [gain(0.2, 0.2)]]})
    late, other = found.runs
    moved = dataclasses.replace(late, path={30: late.path[15]})
    (row,) = reached(
        dataclasses.replace(found, runs=(moved, other)), "apex", images={"apex": 1}, volume=True
    )
    assert math.isnan(row.best)
    assert row.until is None
