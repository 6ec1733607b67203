"""Measuring rewards before training: the samples, the scores, and what follows from them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from moa_diffusion.calibration.describe import calibrate
from moa_diffusion.calibration.measure import draws, findings, measure, report
from moa_diffusion.calibration.plot import plot_calibration
from moa_diffusion.config import from_dict
from moa_diffusion.scoring import RewardError
from moa_diffusion.types import RewardMatrix

TOY = {
    "policy": {"name": "toy"},
    "sampling": {"steps": 3, "shared_start": True},
    "trainer": {"groups": 4, "group_size": 4, "updates": 1, "sample_batch": 3},
    "evaluation": {"every": 0},
}
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
    (tmp_path / "mine.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_samples_are_those_of_training(folder: Path):
    """The prompts in the seed's order, each once, and siblings from one start."""
    (folder / "prompts.txt").write_text("one\ntwo\nthree\n")
    settings = from_dict(TOY | {"prompts": {"train": "prompts.txt"}, "seed": 4})
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
