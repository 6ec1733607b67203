"""Evaluations in a run: of the averaged weights, on the same requests every time."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from moa_diffusion import assembly
from moa_diffusion.files import captions
from moa_diffusion.monitoring import heldout
from toy_runs import (
    drift,
    make,
    rows,
    settings,
)


def test_evaluation_uses_the_average_and_gives_the_weights_back(tmp_path):
    trainer = make(tmp_path / "run", trainer__steps=3, evaluation__every=3)
    trainer.run()
    live = drift(trainer)
    expected = torch.sigmoid(trainer.learner.stepper.ema.average["drift"].sum(0))
    assert not torch.equal(trainer.learner.stepper.ema.average["drift"], live)
    found = trainer.evaluate()
    # Pixels in float32, rounded by 6e-8: pytest's default is 1e-6.
    assert found["eval_mean/red"] == pytest.approx(float(expected[0]))
    assert found["eval_mean/green"] == pytest.approx(float(expected[1]))
    assert found["eval_sem/red"] == pytest.approx(0, abs=1e-6)
    assert torch.equal(drift(trainer), live)
    evaluated = [row["step"] for row in rows(tmp_path / "run") if "eval_mean/red" in row]
    assert evaluated == [0, 3]
    assert [path.name for path in sorted((tmp_path / "run" / "samples").iterdir())] == [
        "step-000000.png",
        "step-000003.png",
    ]


def test_a_sheet_has_prompts_and_scores_and_goes_to_trackers(tmp_path, monkeypatch):
    drawn, sheets = [], []

    def captioned(picture, prompt, scores):
        drawn.append((picture.size, prompt, scores))
        return captions.captioned(picture, prompt, scores)

    monkeypatch.setattr(heldout, "captioned", captioned)
    trainer = make(tmp_path / "run", evaluation__every=2, evaluation__pictures=2)
    taken = SimpleNamespace(log_image=lambda *given: sheets.append(given))
    monkeypatch.setattr(trainer.log, "_trackers", taken)
    trainer.evaluate()
    (size, prompt, scores), _ = drawn
    assert prompt == "a"
    assert scores == ["red 0.500", "green 0.500"]
    ((step, name, sheet),) = sheets
    assert (step, name) == (0, "samples/heldout")
    with Image.open(tmp_path / "run" / "samples" / "step-000000.png") as written:
        across, down = written.size
    assert sheet.shape == (3, down, across)
    width = -(-captions.SIDE // size[0]) * size[0]
    assert across == 2 * width + 2
    assert down > width + 5 * captions.LINE, "three lines of the prompt, two of scores"


def test_evaluation_of_a_single_prompt(tmp_path):
    trainer = make(tmp_path / "run", evaluation__every=2, evaluation__prompts=1)
    assert len(trainer.heldout.requests) == 1
    found = trainer.evaluate()
    assert found["eval_mean/red"] == pytest.approx(0.5)
    assert not found["eval_sem/red"] > 0  # unknown or 0, but no made-up number


def test_heldout_requests_do_not_depend_on_the_runs_seed(tmp_path):
    one = settings(tmp_path / "one", evaluation__every=2, evaluation__images_per_prompt=2)
    two = settings(tmp_path / "two", evaluation__every=2, evaluation__images_per_prompt=2, seed=9)
    requests = assembly.heldout_requests(one)
    assert requests == assembly.heldout_requests(two)
    assert [request.prompt for request in requests] == ["a", "b", "c"] * 2
    assert len({request.seed for request in requests}) == 6


def test_what_the_policy_knows_of_outputs_is_watched_for_drift(tmp_path):
    """Norms that grow by more than 5 % are told, by name; prompts differ by more than that."""
    trainer = make(tmp_path / "run", evaluation__every=2, evaluation__images_per_prompt=4)
    generate, scale = trainer.policy.generate, 1.0

    def longer(requests):
        spread = torch.tensor([1.0 + request.seed % 5 / 10 for request in requests])
        return replace(generate(requests), statistics={"velocity_norm": scale * spread})

    trainer.policy.generate = longer
    first = trainer.evaluate()["eval_image/velocity_norm"]
    alarms = tmp_path / "run" / "alarms.jsonl"
    for scale in (1.04, 0.96):
        found = trainer.evaluate()["eval_image/velocity_norm"]
        assert found == pytest.approx(scale * first)
        assert not alarms.exists()
    scale = 1.06
    trainer.evaluate()
    (alarm,) = map(json.loads, alarms.read_text().splitlines())
    assert (alarm["kind"], alarm["name"]) == ("drift", "velocity_norm")
    assert "+6.0% from" in alarm["message"]


def test_a_statistic_that_an_earlier_version_knew_is_no_error(tmp_path):
    trainer = make(tmp_path / "run", evaluation__every=2)
    trainer.evaluate()
    trainer.watch._base["statistics"]["latent_norm"] = (1.0, 0.1)
    trainer.evaluate()


def test_images_of_another_size_are_not_compared_with_rollouts(tmp_path):
    trainer = make(tmp_path / "run", evaluation__every=2)
    assert any(name.startswith("eval_gap/") for name in trainer.evaluate())
    trainer.heldout.settings = replace(trainer.heldout.settings, resolution=1024)
    assert not any(name.startswith("eval_gap/") for name in trainer.evaluate())
