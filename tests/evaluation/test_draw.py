"""Drawing: only what is new, and nothing is lost or believed that is damaged."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from evaluated_runs import MINE, ask

from moa_diffusion.evaluation.errors import EvaluationError
from moa_diffusion.evaluation.evaluate import evaluate
from moa_diffusion.types import ConfigError
from rewards.score_store import ScoreStore


def test_only_what_is_new_is_drawn_and_scored(two_runs: Path, tmp_path: Path):
    mine = f"--rewards.length.path={two_runs}/mine.py:length"
    first = evaluate(ask(two_runs, tmp_path, checkpoints="step-1", run=[str(two_runs / "a")]))
    assert (first.drawn, first.scored) == (12, 24)  # 2 models x 3 prompts x 2 seeds, 2 rewards
    more = evaluate(ask(two_runs, tmp_path, checkpoints="1,2", run=[str(two_runs / "a")]))
    assert (more.drawn, more.scored) == (6, 12)
    for name in first.scores:
        assert more.scores[name][:12] == first.scores[name]
    reward = evaluate(ask(two_runs, tmp_path, mine, run=[str(two_runs / "a")]))
    assert (reward.drawn, reward.scored) == (0, 18)
    assert [score.value for score in reward.scores["length"][:3]] == [27.0, 27.0, 33.0]
    again = evaluate(ask(two_runs, tmp_path, mine, run=[str(two_runs / "a")]))
    assert (again.drawn, again.scored) == (0, 0)
    assert again.scores == reward.scores
    edited = tmp_path / "mine.py"
    edited.write_text(MINE.replace("float(len(prompt))", "-float(len(prompt))"))
    changed = f"--rewards.length.path={edited}:length"
    assert evaluate(ask(two_runs, tmp_path, changed, run=[str(two_runs / "a")])).scored == 18
    steps = evaluate(
        ask(two_runs, tmp_path, run=[str(two_runs / "a")], checkpoints="base", steps="3")
    )
    assert steps.drawn == 6
    last = evaluate(ask(two_runs, tmp_path, run=[str(two_runs / "a")], checkpoints="1", ema=False))
    assert last.drawn == 6  # the base model's are there


def test_a_full_disk_leaves_what_was_drawn(
    two_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = ask(two_runs, tmp_path, run=[str(two_runs / "a")], checkpoints="1")
    write, count = Path.write_bytes, 0

    def full(self: Path, data: bytes) -> int:
        nonlocal count
        count += self.parent.name == "images"
        if count > 5:
            write(self, b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(EvaluationError, match=r"disk is full.*the same command continues"):
        evaluate(plan)
    monkeypatch.undo()
    assert len(list((tmp_path / "images").iterdir())) == 5, "five whole files, no half one"

    add, calls = ScoreStore.add, []

    def full_for_scores(store: ScoreStore, scores: dict) -> None:
        calls.append(store)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(store, scores)

    monkeypatch.setattr(ScoreStore, "add", full_for_scores)
    with pytest.raises(EvaluationError, match="No space left"):
        evaluate(plan)
    monkeypatch.undo()
    assert len(list((tmp_path / "images").iterdir())) == 12
    found = evaluate(plan)
    assert (found.drawn, found.scored) == (0, 12), "one reward's scores were written"


def test_a_damaged_image_is_told(two_runs: Path, tmp_path: Path):
    plan = ask(
        two_runs, tmp_path, run=[str(two_runs / "a")], checkpoints="base", rewards="sharpness"
    )
    found = evaluate(plan)
    path = found.outputs.path(found.samples[0].key)
    path.write_bytes(path.read_bytes()[:100])
    shutil.rmtree(tmp_path / "scores")
    with pytest.raises(ConfigError, match=r"cannot be read.* Delete it, and it is drawn again"):
        evaluate(plan)
