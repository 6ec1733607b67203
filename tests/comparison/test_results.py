"""What the numbers of a comparison say of runs made by construction."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy
import pytest
from written_runs import NAMES, UNITS, compared, gain, write_run

from moa_diffusion.comparison.read import read_run
from moa_diffusion.comparison.results import (
    as_json,
    compare,
    hypervolumes,
    opposed,
    table,
)

# Files have all digits, and all is float64: pytest's default of 1e-6 is far above its rounding.


def test_known_gains_are_found(tmp_path: Path) -> None:
    found = compared(
        tmp_path,
        {
            "bad": [[gain(0.5, 2.0), gain(-1.0, 3.0)], [gain(0.1, 1.0), gain(-0.5, 4.0)]],
            "good": [[gain(0.5, 2.0), gain(1.0, 1.0)], [gain(0.5, 1.0), gain(2.0, 0.5)]],
        },
    )
    assert found.units == pytest.approx(UNITS)
    assert (found.prompts, found.images) == (10, 40)
    good, bad = found.methods  # sorted by the worst gain
    assert (good.method, bad.method) == ("good", "bad")
    assert bad.gains["ocr"].value == pytest.approx(-0.75)
    assert bad.gains["colour"].value == pytest.approx(3.5)
    assert bad.worst.value == pytest.approx(-0.75)
    assert good.worst.value == pytest.approx((1.0 + 0.5) / 2)  # that of each run, not of the means
    assert good.above == 1.0
    assert bad.above == 0.5
    # Without noise only the runs differ: an interval spans them.
    assert (bad.gains["ocr"].low, bad.gains["ocr"].high) == pytest.approx((-1.0, -0.5))
    assert bad.below() == ["ocr"]
    assert good.below() == []
    # good: {(.5, 2), (1, 1)} is .5 x 2 + .5 x 1; {(.5, 1), (2, .5)} is .5 x 1 + 1.5 x .5
    assert good.hypervolume.value == pytest.approx((1.5 + 1.25) / 2)
    # bad: the end lies below the base model and adds nothing
    assert bad.hypervolume.value == pytest.approx((1.0 + 0.1) / 2)
    assert found.runs[0].path[15] == pytest.approx(gain(0.5, 2.0))


def test_hypervolumes_of_known_points() -> None:
    points = numpy.array(
        [
            [[1.0, 2.0], [2.0, 1.0]],  # 2 + 1
            [[1.0, 2.0], [0.5, 1.0]],  # the second is dominated
            [[-1.0, 9.0], [9.0, -1.0]],  # each below the base model somewhere
            [[math.nan, 1.0], [1.0, 1.0]],
        ]
    )
    assert hypervolumes(points).tolist() == pytest.approx([3.0, 2.0, 0.0, math.nan], nan_ok=True)


def test_intervals_cover_the_truth(tmp_path: Path) -> None:
    """Of 40 experiments with 8 runs, whose gains vary by run, prompt and image."""
    covered = 0
    truth = gain(0.3, 0.0)
    for experiment in range(40):
        random = numpy.random.default_rng(experiment)
        found = []
        for seed in range(8):
            folder = tmp_path / f"{experiment}-{seed}"
            shift = 0.3 * random.standard_normal(2)
            gains = gain(truth["ocr"] + shift[0], truth["colour"] + shift[1])
            write_run(folder, [gains], noise=1.0, seed=1000 * experiment + seed)
            found.append(read_run(folder, method="a", seed=seed, names=NAMES))
        (method,) = compare(found, resamples=300).methods
        for name, value in truth.items():
            covered += method.gains[name].low <= value <= method.gains[name].high
    assert 66 <= covered <= 80  # there are 80; 95 % would be 76


def test_the_most_opposed_objectives_are_found(tmp_path: Path) -> None:
    rows = [{"a": x, "b": 2.0 - x, "c": x} for x in (0.1, 0.9, 0.4)]
    assert opposed(compared(tmp_path, {"m": [[row] for row in rows]})) == ("a", "b")
    two = compared(tmp_path / "two", {"m": [[row] for row in rows[:2]]})
    assert opposed(two) == ("a", "b")  # the first: two runs say nothing


def test_of_one_run_nothing_is_claimed(tmp_path: Path) -> None:
    found = compared(tmp_path, {"bad": [[gain(-1.0, 3.0)]], "good": [[gain(1.0, 1.0)]]})
    assert [method.below() for method in found.methods] == [[], []]
    said = table(found, {})
    assert "significant" not in said
    assert "nothing is claimed of good, bad." in said
    several = table(compared(tmp_path / "more", {"good": [[gain(1.0, 1.0)]] * 2}), {})
    assert "nothing is claimed" not in several


def test_the_table_says_who_harms_what_and_who_died(tmp_path: Path) -> None:
    found = compared(tmp_path, {"bad": [[gain(-1.0, 3.0)]] * 2, "good": [[gain(1.0, 1.0)]]})
    said = table(found, {"good-1": "error: out of paint"})
    lines = said.splitlines()
    assert lines[0].split("|")[1:5] == [
        " method ",
        *(f"{n:>21} " for n in NAMES),
        f"{'worst':>21} ",
    ]
    assert lines[2].startswith("| good   | +1.00 [+1.00, +1.00] |")
    assert lines[3].endswith("| 0.000 [0.000, 0.000] |       80% ocr |       15 |     0.8 |")
    assert "bad ends significantly below the start: ocr -1.00 [-1.00, -1.00]." in said
    assert "good ends" not in said
    assert (
        "over prompts alone and says nothing about other seeds, so nothing is claimed of good."
        in said
    )
    assert "Not in the table: good-1 died: error: out of paint" in said
    json.dumps(as_json(found), allow_nan=False)
