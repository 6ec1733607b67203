"""Scoring what was drawn: metadata reach the reward, and damaged scores are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluated_runs import ask

from moa_diffusion.evaluation.evaluate import evaluate
from moa_diffusion.types import ConfigError


def test_damaged_scores_are_told(two_runs: Path, tmp_path: Path):
    plan = ask(
        two_runs, tmp_path, run=[str(two_runs / "a")], checkpoints="base", rewards="sharpness"
    )
    whole = evaluate(plan)
    (path,) = (tmp_path / "scores").iterdir()
    assert path.name.startswith("sharpness-")
    again = evaluate(plan)
    assert (again.scored, again.scores) == (0, whole.scores)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"sqlite` holds no scores that can be read"):
        evaluate(plan)


def test_prompts_with_metadata_reach_the_function(two_runs: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a green square", "wanted": 3}, {"prompt": "a red circle", "wanted": 5}]
    prompts.write_text("\n".join(json.dumps(row) for row in rows))
    target = f"--rewards.target.path={two_runs}/mine.py:target"
    options = {"run": [str(two_runs / "a")], "checkpoints": "base", "prompts": str(prompts)}
    found = evaluate(ask(two_runs, tmp_path, target, **options, seeds="1", rewards="target"))
    assert [score.value for score in found.scores["target"]] == [3.0, 5.0]
    prompts.write_text(prompts.read_text().replace("5", "6"))
    found = evaluate(ask(two_runs, tmp_path, target, **options, seeds="1", rewards="target"))
    assert (found.drawn, found.scored) == (0, 1), "the score of other metadata is another one"
