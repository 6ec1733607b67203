"""Calibration as a user runs it, and what it says."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from moa_diffusion.calibration.describe import calibrate
from moa_diffusion.calibration.measure import draws, findings, measure, report
from moa_diffusion.calibration.plot import plot_calibration
from moa_diffusion.config import from_dict
from moa_diffusion.scoring import RewardError
from moa_diffusion.storage.calibration_file import load
from moa_diffusion.types import RewardMatrix

ROOT = Path(__file__).resolve().parents[2]
FAST = {
    "policy": {"path": "tiny", "max_sequence_length": 16, "lora": {"rank": 4}},
    "sampling": {"resolution": 32, "steps": 3, "guidance": 1.0, "shared_start": True},
    "prompts": {"train": "tiny"},
    "rewards": {"prompt_colour": {}, "colourfulness": {}},
    "trainer": {"groups": 4, "group_size": 4, "updates": 1, "sample_batch": 3},
    "evaluation": {"every": 0},
}
TOY = FAST | {"policy": {"name": "toy"}, "sampling": {"steps": 3}}
REWARDS = """
import random

def left(images, prompts):
    return images[:, 0, 0, 0].tolist()

def noisy(images, prompts):
    return [random.random() for _ in prompts]

def nowhere(images, prompts):
    return [float("nan")] * len(prompts)

calls = 0

def breaks(images, prompts):
    global calls
    calls += 1
    return [0.0 if calls < 4 else float("inf")] * len(prompts)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fast.yaml").write_text(yaml.safe_dump(FAST))
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY))
    (tmp_path / "mine.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


Here = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs the script in this process: exit status, stdout, stderr."""
    script = str(ROOT / "scripts" / "calibrate.py")

    def start(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
        printed = capsys.readouterr()
        return int(str(ended.value.code)), printed.out, printed.err

    return start


def test_the_script_leaves_what_it_promises(folder: Path, here: Here):
    """The two rewards of the shipped pipeline: one of them hijacks, and the script says which."""
    options = ("--prompts", "4", "--images", "4", "--seed", "5", "--output", "out")
    status, said, log = here("--config", "fast.yaml", *options, "--rewards.prompt_colour.weight=2")
    assert status == 0, log
    assert "\ncalibrate: 4 of 4 [" in f"\n{log}"
    assert re.search(r"colourfulness will hijack: it has (9|10)\d", said)
    assert "share, raw weighted sum" in said

    found = load(folder / "out" / "calibration.json", ["prompt_colour", "colourfulness"])
    assert (found.model, found.prompts, found.images, found.seed) == ("tiny", 4, 4, 5)
    assert found.hijacker() == "colourfulness"
    for row in found.objectives.values():
        assert row.applies == 1
        assert row.retest_std == 0
        assert row.milliseconds > 0
        assert row.min <= row.mean <= row.max
        assert row.target > row.base == row.mean
    assert found.objectives["prompt_colour"].max <= 1
    lines = (folder / "out" / "scores.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 16
    assert len({row["prompt"] for row in rows}) == 4
    mean = sum(row["reward/colourfulness"] for row in rows) / 16
    assert mean == pytest.approx(found.objectives["colourfulness"].mean)  # float64
    with Image.open(folder / "out" / "calibration.png") as drawn:
        assert drawn.width > 400
        assert len(drawn.convert("RGB").getcolors(maxcolors=2**24)) > 100


def test_bad_input_says_what_was_expected_and_found(
    folder: Path, here: Here, monkeypatch: pytest.MonkeyPatch
):
    toy = ("--config", "toy.yaml")
    cases = [
        ((*toy, "--images", "1"), "--images: should be at least 2"),
        ((*toy, "--prompts", "0"), "--prompts: should be at least 1. Found 0"),
        ((*toy, "--trainer.step", "3"), "unknown key. Did you mean 'trainer.steps'?"),
        ((*toy, "--prompts.train", "none.txt"), "Prompt file `none.txt` does not exist"),
        ((*toy, "--rewards.ocrr.weight", "1"), 'rewards.ocrr: Unknown reward head "ocrr"'),
        (("--config", "none.yaml"), "config: should be a YAML file. Found no file `none.yaml`"),
    ]
    for options, message in cases:
        status, _, log = here(*options)
        assert status == 2, (options, log)
        assert message in log, (options, log)
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, log = here(*toy)
    assert (status, "calibration runs in one process" in log) == (2, True), log
    assert not (folder / "runs").exists()


def test_samples_are_those_of_training(folder: Path):
    """The prompts in the seed's order, each once, and siblings from one start."""
    (folder / "prompts.txt").write_text("one\ntwo\nthree\n")
    settings = from_dict(FAST | {"prompts": {"train": "prompts.txt"}, "seed": 4})
    groups = draws(settings, prompts=9, images=3)
    assert sorted(group[0].prompt for group in groups) == ["one", "three", "two"]
    for group in groups:
        assert len({request.start_seed for request in group}) == 1
        assert len({request.seed for request in group}) == 3
    assert draws(settings, prompts=2, images=3) == groups[:2]
    other = dataclasses.replace(settings, seed=1)
    assert draws(other, prompts=9, images=3) != groups


def test_what_is_noisy_or_does_not_apply_is_said(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "prompts.txt").write_text("a\nb\nc\n")
    paths = ("left", "noisy", "nowhere")
    rewards = {name: {"path": f"mine.py:{name}"} for name in paths}
    settings = from_dict(TOY | {"rewards": rewards, "prompts": {"train": "prompts.txt"}})
    measured = measure(settings, prompts=9, images=8, folder=folder)
    assert measured.rewards.values.shape == (3, 24)
    assert torch.equal(measured.rewards.values[0], measured.retest[0])
    found = measured.calibration(settings)
    assert found.model == "toy"
    # The standard deviation of 24 uniform numbers has a standard error of about 12 %.
    assert found.objectives["noisy"].retest_std == pytest.approx(math.sqrt(1 / 12), rel=0.5)
    assert found.objectives["left"].retest_std == 0
    report(found, measured)
    said = capsys.readouterr().out
    assert "There are 3 training prompts, fewer than 9: all are used." in said
    assert "nowhere applies to none of the 3 prompts: nothing is known of it." in said
    assert "noisy is noisy: the noise of one score is" in said
    assert "hijack" in said
    plot_calibration(found, measured.rewards, measured.units, folder / "plot.png")
    assert (folder / "plot.png").stat().st_size > 10_000


def test_a_failing_reward_leaves_the_scores_before_it(folder: Path):
    settings = from_dict(TOY | {"rewards": {"breaks": {"path": "mine.py:breaks"}}})
    with pytest.raises(RewardError, match="breaks"):
        measure(settings, prompts=3, images=4, folder=folder / "out")
    assert len((folder / "out" / "scores.jsonl").read_text().splitlines()) == 4


def test_findings_name_the_hijacker_or_nobody():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 80, generator=generator).double()
    values[2] = 0.5

    def said(*weights: float) -> list[str]:
        rewards = RewardMatrix(
            names=("loud", "calm", "flat"),
            values=values,
            groups=torch.arange(80) // 8,
            prompts=tuple(str(i // 8) for i in range(80)),
        )
        found = calibrate(
            rewards,
            retest=values,
            weights=weights,
            milliseconds=[1.0] * 3,
            model="tiny",
            seed=0,
        )
        return findings(found, {})

    assert said(9.0, 1.0, 1.0)[-1].startswith("loud will hijack: it has 9")
    assert said(1.0, 1.0, 1.0)[-1].startswith("Nobody will hijack a plain weighted sum")
    assert said(1.0, 1.0, 1.0)[0] == (
        "flat does not vary within any prompt: training would get no signal from it."
    )
