"""Evaluations in a run: of the averaged weights, on the same requests every time."""

from __future__ import annotations

import pytest
import torch

from moa_diffusion import assembly
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
