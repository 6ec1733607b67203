"""The comparison: what its numbers say of runs made by construction, and as a user runs it."""

from __future__ import annotations

import fcntl
import json
import math
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml
from PIL import Image
from written_runs import UNITS, write_run

from moa_diffusion import config
from moa_diffusion.comparison.execute import cause_of_death, execute
from moa_diffusion.comparison.plan import PlannedRun, method_settings, plan_comparison
from moa_diffusion.comparison.plot import (
    OUTLIER,
    mean_path,
    mean_weights,
    plot_comparison,
    window,
)
from moa_diffusion.comparison.read import read_run, training_seconds
from moa_diffusion.comparison.record import read_record, write_record
from moa_diffusion.comparison.results import (
    Comparison,
    as_json,
    compare,
    hypervolumes,
    opposed,
    read_pair,
    start_units,
    table,
)
from moa_diffusion.comparison.versus import paired_worst, reached, tables
from moa_diffusion.statistics.bootstrap import Estimate
from moa_diffusion.storage.log import read_metrics
from moa_diffusion.types import ConfigError
from waiting import HANG, python, running, wait_for

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("ocr", "colour")
# Files have all digits, and all is float64: pytest's default of 1e-6 is far above its rounding.


def compared(
    tmp_path: Path,
    runs: Mapping[str, Sequence[Sequence[Mapping[str, float]]]],
    **options: Any,
) -> Comparison:
    """Write and compare runs: by method, for each seed the gains at its evaluations."""
    found = []
    for method, seeds in runs.items():
        for seed, gains in enumerate(seeds):
            folder = tmp_path / f"{method}-{seed}"
            write_run(folder, gains, **options)
            found.append(read_run(folder, method=method, seed=seed, names=list(gains[0])))
    return compare(found, resamples=500)


def gain(ocr: float, colour: float) -> dict[str, float]:
    return {"ocr": ocr, "colour": colour}


# ---------------------------------------------------------------------- statistics


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


def test_time_and_shares_come_from_the_metrics(tmp_path: Path) -> None:
    (method,) = compared(tmp_path, {"a": [[gain(1, 1), gain(1, 1)]]}).methods
    assert method.rollouts == 30
    assert method.minutes == pytest.approx(30 * 3 / 60)  # without evaluations
    assert method.biggest() == ("ocr", pytest.approx(0.8))  # null is left out, not 0
    assert method.seconds["sample"] == pytest.approx(2.0)
    assert method.seconds["evaluate"] == pytest.approx(2 * 6 / 30)
    assert training_seconds(read_metrics(tmp_path / "a-0" / "metrics.jsonl")) == pytest.approx(90)


def test_missing_rewards_stay_out(tmp_path: Path) -> None:
    found = compared(tmp_path, {"a": [[gain(1.0, 0.5)]]}, missing=range(7))
    (method,) = found.methods
    assert found.units == pytest.approx(UNITS)
    assert method.gains["ocr"].value == pytest.approx(1.0)
    assert method.gains["ocr"].high == pytest.approx(1.0)  # resamples without any prompt of it too
    assert method.worst.value == pytest.approx(0.5)
    assert method.hypervolume.value == pytest.approx(0.5)
    # A sample scored only after training is not paired with anything.
    path = tmp_path / "a-0" / "evaluation" / "step-000000.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[9]["reward/ocr"] = None
    path.write_text("\n".join(json.dumps(row) for row in rows))
    (run,) = compare([read_run(tmp_path / "a-0", method="a", seed=0, names=NAMES)]).runs
    # Of the prompt's images 1, -1, -1 are left, whose spread, sqrt(4/3), is that of 1, -1, 1, -1.
    assert run.gains["ocr"] == pytest.approx(1.0)


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "flat", [gain(1, 1)], spread=0.0)
    write_run(tmp_path / "single", [gain(1, 1)], images=1)
    write_run(tmp_path / "other", [gain(1, 1)], prompts=9)
    write_run(tmp_path / "good", [gain(1, 1)])
    write_run(tmp_path / "nowhere", [gain(1, 1)], missing=range(10))

    def read(name: str) -> Any:
        return read_run(tmp_path / name, method="a", seed=0, names=NAMES)

    with pytest.raises(ValueError, match=r"Objective `ocr` should vary within a prompt.*Found 0"):
        read("flat")
    with pytest.raises(ValueError, match=r"Objective `ocr` should vary.*Found nan"):
        read("nowhere")
    with pytest.raises(ValueError, match="`images_per_prompt` should be at least 2"):
        read("single")
    with pytest.raises(ValueError, match="other` should have the held-out samples"):
        start_units([read("good"), read("other")])
    with pytest.raises(ValueError, match="should have the reward 'no'"):
        read_run(tmp_path / "good", method="a", seed=0, names=["no"])
    with pytest.raises(ValueError, match="No run has finished"):
        compare([])
    (tmp_path / "good" / "evaluation" / "step-000000.jsonl").unlink()
    with pytest.raises(ValueError, match=r"Found steps \[15\]"):
        read("good")
    with pytest.raises(ConfigError, match=r"--pair: should name two of ocr, colour. Found 'ocr'"):
        read_pair("ocr", NAMES)
    assert read_pair("colour, ocr", NAMES) == ("colour", "ocr")


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


# ---------------------------------------------------------------------- records, one against all


def recorded(
    folder: Path,
    name: str,
    gains: Sequence[Mapping[str, float]],
    key: str = "seed",
    value: str = "0",
) -> PlannedRun:
    """A finished run of two rewards, with an option."""
    write_run(folder / name, gains, noise=0.3, missing=[2])
    only = ["--rewards.jpeg_compressibility", "null", "--rewards.colourfulness", "null"]
    recipe = str(ROOT / "configs" / "tiny_apex.yaml")
    settings = config.load(recipe, [*only, f"--{key}", value])
    return PlannedRun(method="apex", seed=0, folder=folder / name, settings=settings)


def test_a_record_gives_the_table_that_the_folder_gives(tmp_path: Path) -> None:
    gains = [{"ocr": 0.5, "sharpness": 0.25}, {"ocr": 1.0, "sharpness": -0.5}]
    run = recorded(tmp_path, "apex-0", gains)
    path = tmp_path / "kept" / "apex-0.json"
    write_record(path, run, {"torch": "1.2"})
    found, made_with = read_record(path, run)
    assert made_with == {"torch": "1.2"}
    # Sums are kept to five digits.
    for kept, whole in zip(
        (once := compare([found])).methods, (twice := compare([run.read()])).methods, strict=True
    ):
        for name in twice.names:
            for part in ("value", "low", "high"):
                assert getattr(kept.gains[name], part) == pytest.approx(
                    getattr(whole.gains[name], part), rel=1e-3
                )
        assert kept.hypervolume.value == pytest.approx(whole.hypervolume.value, rel=1e-3)
        assert kept.shares == whole.shares
        assert kept.minutes == pytest.approx(whole.minutes)
    assert table(once, {}) == table(twice, {})
    assert mean_weights([found], "ocr") == mean_weights([run.read()], "ocr")
    assert str(tmp_path) not in path.read_text()
    assert path.stat().st_size < 10_000


def test_a_record_of_another_run_is_refused(tmp_path: Path) -> None:
    run = recorded(tmp_path, "apex-0", [{"ocr": 0.5, "sharpness": 0.25}])
    path = tmp_path / "apex-0.json"
    write_record(path, run, {})
    for key, value in (("optimizer.lr", "1e-2"), ("objectives.weighting.floor", "0.1")):
        changed = recorded(tmp_path / key, "apex-0", [{"ocr": 0.5, "sharpness": 0.25}], key, value)
        with pytest.raises(ConfigError, match=rf"{key}: should be .* as in .*apex-0.json"):
            read_record(path, changed)


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
    assert [found.value, found.low, found.high] == pytest.approx([0.5] * 3)
    with pytest.raises(ValueError, match="`apex` and `gdpo` should have runs of the same seed"):
        paired_worst(runs, "apex", "gdpo", UNITS)


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
    differences = {"static": Estimate(value=0.5, low=0.25, high=0.75)}
    text = tables(differences, "apex", {"worst gain": list(worst.values())}, "static")
    assert "+0.50 [+0.25, +0.75]" in text
    assert re.search(r"\| apex +\| +\+0.400 \| +450 \| +300 \|", text)
    assert re.search(r"\| mopo +\| +-0.100 \| +300 \| +never \|", text)
    assert "static's best worst gain is +0.200" in text


# ---------------------------------------------------------------------- plots


def test_an_axis_leaves_outliers_out_and_holds_all_others() -> None:
    ends = numpy.array([[-0.5, 0.1], [-0.2, 1.0], [0.3, 0.9], [-30.0, -10.0], [math.nan] * 2])
    low, high = window(ends)
    assert -0.6 < low < -0.5
    assert 1.0 < high < 1.1
    near = ends[:3] * [[1], [1], [OUTLIER / 2]]
    low, high = window(near)
    assert low < near.min()
    assert high > near.max(), "within so many medians there is no outlier"
    assert window(ends[4:]) == window(numpy.zeros((2, 2))) == (-1.0, 1.0)


@pytest.mark.parametrize(("methods", "objectives"), [(10, 4), (1, 2)])
def test_the_plot_is_drawn(tmp_path: Path, methods: int, objectives: int) -> None:
    random = numpy.random.default_rng(0)
    names = ["ocr", "jpeg_compressibility", "colourfulness", "prompt_colour"][:objectives]
    found = []
    for number in range(methods):
        for seed in range(3):
            folder = tmp_path / f"{number}-{seed}"
            last = random.normal(0.3, 0.7, objectives)
            gains = [
                dict(zip(names, f * last + random.normal(0, 0.1, objectives), strict=True))
                for f in (0.5, 0.8, 1.0)[: 3 - seed % 2]  # the runs end at different steps
            ]
            write_run(folder, gains, noise=0.8, seed=seed, prompts=12)
            found.append(read_run(folder, method=f"method_{number}", seed=seed, names=names))
    comparison = compare(found, resamples=200)
    path = mean_path(
        [run for run in comparison.runs if run.method == "method_0"], (names[0], names[1])
    )
    assert path.shape == (3, 2)  # base, step 15, ends
    plot_comparison(comparison, found, tmp_path / "compare.png")
    with Image.open(tmp_path / "compare.png") as drawn:
        assert drawn.width > 1000
        assert len(drawn.convert("RGB").getcolors(maxcolors=2**24)) > 100


# ---------------------------------------------------------------------- planning

FAST: dict[str, Any] = {
    "policy": {"path": "tiny", "max_sequence_length": 16, "step_batch": 2, "lora": {"rank": 4}},
    "sampling": {"resolution": 32, "steps": 3, "guidance": 1.0},
    "prompts": {"train": "tiny", "heldout": "tiny"},
    "rewards": {"mine": {"path": "mine.py:mine"}, "colourfulness": {"weight": 0.5}},
    "objectives": {"method": "dual_stage", "normalizer": {"floor": 0.5}},
    "loss": {"clip_range": 1e-3},
    "optimizer": {"lr": 1e-2},
    "ema": {"decay": 0.0, "every": 1},
    "trainer": {"steps": 2, "groups": 2, "group_size": 4, "updates": 1},
    "evaluation": {
        "every": 2,
        "images_per_prompt": 2,
        "prompts": 3,
        "steps": 2,
        "guidance": 1.0,
        "pictures": 0,
    },
    "checkpoint": {"every": 1},
    "log": {"trackers": []},
}
REWARD = """
import os
import sys


def mine(images, prompts):
    \"\"\"Brightness; fails in one run, which tells itself by its command line.\"\"\"
    method, seed = (sys.argv[sys.argv.index(key) + 1] for key in ("--objectives.method", "--seed"))
    if (method, seed) == ("gdpo", "1") and os.path.exists("broken"):
        raise RuntimeError("out of paint")
    return images.mean(dim=(1, 2, 3)).tolist()
"""
MILD = {"objectives": {"method": "gdpo"}, "loss": {"kl_weight": 0.01}, "trainer": {"steps": 9}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fast.yaml").write_text(yaml.safe_dump(FAST, sort_keys=False))
    (tmp_path / "mild.yaml").write_text(yaml.safe_dump(MILD, sort_keys=False))
    (tmp_path / "mine.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(*overrides: str, methods: Sequence[str] = ("static",), **options: Any) -> Any:
    options = {"seeds": "1", "output": Path("out")} | options
    return plan_comparison("fast.yaml", overrides, methods=methods, **options)


def test_a_method_changes_its_sections_alone_and_says_what_it_leaves_out(folder: Path) -> None:
    found = planned(methods=["dual_stage", "static", "mild.yaml"], seeds="2", minutes=1.5)
    assert [run.name for run in found.runs] == [
        *("dual_stage-0", "dual_stage-1", "static-0", "static-1", "mild-0", "mild-1")
    ]
    first, *_, last = (run.settings for run in found.runs)
    assert first.objectives.normalizer == {"floor": 0.5}
    assert (last.objectives.method, last.objectives.normalizer) == ("gdpo", {})
    assert (last.loss.kl_weight, last.loss.clip_range) == (0.01, 1e-3)
    assert (last.trainer.steps, last.trainer.minutes, last.seed) == (2, 1.5, 1)
    assert found.notes == (
        "static: objectives.normalizer.floor is left out, it is not meant for Raw.",
        "mild: of `mild.yaml` only objectives, loss count, not trainer.",
        "mild: objectives.normalizer.floor is left out, it is not meant for GDPO.",
    )
    settings, notes = method_settings("fast.yaml", ["--loss.kl_weight", "0.5"], "mild.yaml")
    assert settings.loss.kl_weight == 0.5  # options are for every run
    assert len(notes) == 2
    assert planned("--seed", "7", seeds="2").runs[1].seed == 8
    assert [run.seed for run in planned("--seed", "7", seeds="5,0").runs] == [5, 0]
    # What the name of a method fixes is no option of it.
    weighting = ("--objectives.weighting.aggregator", "mgda")
    settings, notes = method_settings("fast.yaml", weighting, "upgrad")
    assert settings.objectives.weighting == {}
    assert "aggregator is left out" in notes[0]


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], {"methods": ["statc"]}, "unknown method 'statc'. Did you mean 'static'?"),
        ([], {"methods": []}, "--methods: should name at least one method"),
        ([], {"methods": ["gdpo", "gdpo"]}, "should name a method once. Found 'gdpo' twice"),
        ([], {"methods": ["mild", "mild.yaml"]}, "unknown method 'mild'"),
        ([], {"methods": ["none.yaml"]}, "Found no file `none.yaml`"),
        ([], {"methods": ["typo.yaml"]}, "`typo.yaml`: objectives.metod: unknown key"),
        ([], {"methods": ["empty.yaml"]}, "should have at least one of the sections"),
        ([], {"methods": ["own.yaml"]}, "objectives.weighting.depth: unknown option of Static"),
        ([], {"seeds": "0"}, "Found '0'. The seed 0 alone is `0,`."),
        ([], {"parallel": 0}, "--parallel: should be at least 1. Found 0"),
        ([], {"minutes": 0.0}, "--minutes-per-run: should be positive. Found 0"),
        (["--evaluation.every", "0"], {}, "evaluation.every: should be at least 1"),
        (["--evaluation.images_per_prompt=1"], {}, "images_per_prompt: should be at least 2"),
        (["--objectives.method=gdpo"], {}, "objectives.method: is set for each run"),
        (["--output_dir", "x"], {}, "output_dir: is set for each run by the comparison: use --out"),
        (["--trainer.minutes", "1"], {"minutes": 2.0}, "use --minutes-per-run"),
        (["--trainer.step", "1"], {}, "Did you mean 'trainer.steps'?"),
        (["--trainer.groups", "3", "--trainer.updates", "5"], {}, "should be a multiple of"),
    ],
)
def test_bad_input_is_found_before_anything_runs(
    folder: Path, overrides: list[str], options: dict[str, Any], message: str
) -> None:
    (folder / "typo.yaml").write_text("objectives: {metod: gdpo}")
    (folder / "empty.yaml").write_text("trainer: {steps: 3}")
    (folder / "own.yaml").write_text("objectives: {method: static, weighting: {depth: 3}}")
    with pytest.raises(ConfigError) as caught:
        planned(*overrides, **options)
    assert message in str(caught.value)
    assert not (folder / "out").exists()


def test_one_objective_or_a_changed_configuration_is_an_error(folder: Path) -> None:
    one = FAST | {"rewards": {"colourfulness": {}}}
    (folder / "one.yaml").write_text(yaml.safe_dump(one))
    with pytest.raises(ConfigError, match=r"at least two objectives.*Found colourfulness"):
        plan_comparison("one.yaml", [], methods=["static"], seeds="1", output=folder / "out")
    (run,) = planned().runs
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(config.to_yaml(run.settings))
    assert planned().runs == (run,)
    changed = r"loss.kl_weight: should be 0.0, as `out/static-0` began. Found 0.1. Another --output"
    with pytest.raises(ConfigError, match=changed):
        planned("--loss.kl_weight", "0.1")
    with pytest.raises(ConfigError, match=r"trainer.minutes: should be 0.0.*Found 3.0"):
        planned(minutes=3.0)
    (run.folder / "config.yaml").rename(run.folder / "thesis.txt")
    with pytest.raises(ConfigError, match="`out/static-0` should be a run of this comparison"):
        planned()


def test_a_run_is_finished_when_its_steps_or_its_minutes_are_over(tmp_path: Path) -> None:
    write_run(tmp_path / "a-0", [gain(1, 1)])  # 15 rollouts of 3 seconds

    def finished(steps: int, minutes: float) -> bool:
        settings = config.from_dict({"trainer": {"steps": steps, "minutes": minutes}})
        run = PlannedRun(method="a", seed=0, folder=tmp_path / "a-0", settings=settings)
        assert run.completed() == 15
        return run.finished()

    assert finished(15, 0.0)
    assert not finished(16, 0.0)
    assert finished(16, 0.75)
    assert not finished(16, 0.76)
    (tmp_path / "a-0" / "evaluation" / "step-000015.jsonl").unlink()
    assert not finished(15, 0.0)


def test_the_last_words_are_the_error(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert cause_of_death(log, 3) == "exit 3"
    log.write_text("bar\rbar 2\nKilled\n\n")
    assert cause_of_death(log, 1) == "Killed"
    log.write_text("error: no paint\nThe state after 3 rollouts is there.\n")
    assert cause_of_death(log, -9) == "error: no paint"


FAKE = """
import json, pathlib, sys, time

folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
(folder / "evaluation").mkdir(parents=True)
row = {"prompt": "a", "group": 0, "seed": 0, "reward/mine": 1.0, "reward/colourfulness": 1.0}
lines = [json.dumps(row | {"sibling": i}) for i in range(2)]
(folder / "evaluation" / "step-000000.jsonl").write_text("\\n".join(lines))
(folder / "metrics.jsonl").write_text('{"step": 0}\\n')
time.sleep(1e6)
"""
FAKE_PROGRAM = [sys.executable, "fake.py"]


def test_a_reward_without_spread_ends_the_comparison_at_once(folder: Path) -> None:
    (folder / "fake.py").write_text(FAKE)
    with pytest.raises(ValueError, match=r"Objective `mine` should vary within a prompt.*Found 0"):
        execute(planned(seeds="2").runs, program=FAKE_PROGRAM, parallel=1)
    assert not (folder / "out" / "static-1").exists()


def test_a_run_that_still_goes_on_is_left_alone(folder: Path) -> None:
    (folder / "fake.py").write_text(FAKE)
    (run,) = planned().runs
    run.folder.mkdir(parents=True)
    with run.log.open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        log.write("at work")
        log.flush()
        with pytest.raises(ValueError, match="Another process is at work on `out/static-0`"):
            execute([run], program=FAKE_PROGRAM, parallel=1)
    assert run.log.read_text() == "at work"


# ---------------------------------------------------------------------- as a user runs it

SCRIPT = ROOT / "scripts" / "compare.py"
COMMAND = [str(SCRIPT), "--config", "fast.yaml", "--output", "out", "--methods"]
Here = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs the script in this process: exit status, stdout, stderr."""

    def start(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [*COMMAND, *arguments])
        monkeypatch.setattr(sys, "executable", python())
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        printed = capsys.readouterr()
        return int(str(ended.value.code)), printed.out, printed.err

    return start


def test_two_methods_twice_one_dies_and_is_continued(folder: Path, here: Here) -> None:
    command = ("static,mild.yaml", "--seeds", "2", "--parallel", "2")
    (folder / "broken").touch()
    status, said, log = here(*command)
    assert status == 1, log
    assert "static: objectives.normalizer.floor is left out" in said
    assert 'mild-1 died: error: Reward head "mine" failed' in log
    assert "(out/mild-1.log)" in log
    assert "\ncompare: 0 of 8 [" in f"\n{log}"
    assert "\r" not in log  # a bar drawn anew, of which a file would keep every state
    assert "Not in the table: mild-1 died" in said
    result = json.loads((folder / "out" / "results.json").read_text())
    assert list(result["failures"]) == ["mild-1"]
    assert {m["method"]: m["seeds"] for m in result["methods"]} == {"static": [0, 1], "mild": [0]}
    assert [run["rollouts"] for run in result["runs"]] == [2, 2, 2]
    assert result["methods"][0]["seconds"]["update"] > 0
    # The trainer's own gain, of the same images.
    (run,) = [run for run in result["runs"] if run["folder"] == "out/static-1"]
    last = read_metrics(folder / "out" / "static-1" / "metrics.jsonl")[-1]
    for name, value in run["gains"].items():
        assert value == pytest.approx(last[f"eval_gain/{name}"], rel=1e-6)  # sums in another order
        assert value != 0
    assert (folder / "out" / "table.md").read_text() in said
    assert (folder / "out" / "compare.png").stat().st_size > 20_000

    (folder / "broken").unlink()
    kept = (folder / "out" / "static-0.log").stat().st_mtime_ns
    status, said, log = here(*command)
    assert status == 0, log
    assert "died" not in said + log
    result = json.loads((folder / "out" / "results.json").read_text())
    assert {tuple(method["seeds"]) for method in result["methods"]} == {(0, 1)}
    assert (folder / "out" / "static-0.log").stat().st_mtime_ns == kept

    runs = planned(methods=["static", "mild.yaml"], seeds="2").runs
    assert execute(runs, program=["nothing"], parallel=2) == {}  # nothing is started


def test_sigterm_ends_the_runs_and_the_next_call_continues(folder: Path) -> None:
    endless = ("--trainer.steps", "1000", "--checkpoint.every", "0", "--evaluation.every", "1000")
    command = [python(), *COMMAND, "static", "--seeds", "2", *endless]
    with running(command, stderr=subprocess.PIPE) as process:
        wait_for(folder / "out" / "static-0" / "metrics.jsonl", process)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=HANG)
    assert process.returncode == 130, log
    assert "The same command continues." in log
    assert "Traceback" not in log
    assert "Stopped by SIGTERM" in (folder / "out" / "static-0.log").read_text()
    assert list((folder / "out" / "static-0" / "checkpoints").glob("step-*/state.pt"))
    assert not (folder / "out" / "static-1").exists()


def test_bad_input_and_other_launchers_exit_with_2(
    folder: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, processes, message in (
        (["static", "--pair", "mine,ocr"], "1", "--pair: should name two of mine, colourfulness"),
        (["static"], "2", "start it with `python`"),
    ):
        monkeypatch.setenv("WORLD_SIZE", processes)
        status, _, log = here(*arguments)
        assert status == 2, log
        assert message in log
    assert not (folder / "out").exists()
