"""What a run has left is read, whatever wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moa_diffusion.report.page.runs import POINTS, read_training
from moa_diffusion.types import ConfigError
from report_pages import write_run


def test_a_run_is_read_whatever_its_method_writes(tmp_path: Path):
    rows: list[dict[str, Any]] = [{"step": 0, "eval_mean/a": 1.0, "eval_mean/h": 5.0}]
    rows += [{"step": step, "reward_mean/a": float(step)} for step in (1, 2, 2, 3)]
    rows[3]["reward_mean/a"] = None
    alarm = {"step": 2, "kind": "drift", "name": "contrast", "action": "warn", "message": "m"}
    found = read_training("run", write_run(tmp_path / "run", rows, [alarm]))
    assert (found.objectives, found.heldout) == (("a",), ("h",))
    curve = found.curves["reward_mean"]["a"]
    assert (curve.steps, curve.values) == ((1, 2, 3), (1.0, None, 3.0))
    assert found.alarms == (alarm,)
    (tmp_path / "empty").mkdir()
    empty = read_training("empty", tmp_path / "empty")
    assert not empty.curves
    assert not empty.alarms
    assert not empty.front


def test_long_curves_are_averaged(tmp_path: Path):
    count = 7 * POINTS // 2
    rows = [{"step": i, "reward_mean/a": float(i), "x/sometimes": None} for i in range(count)]
    found = read_training("run", write_run(tmp_path / "run", rows, []))
    curve = found.curves["reward_mean"]["a"]
    assert found.pooled == 4
    assert POINTS / 2 < len(curve.steps) <= POINTS
    assert curve.steps == pytest.approx(curve.values)  # both are means of the same numbers
    assert curve.values[:2] == (1.5, 5.5)
    assert set(found.curves["x"]["sometimes"].values) == {None}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", '{"step": 1\n{"step": 2}\n', "metrics.jsonl:1: A line should be JSON"),
        ("alarms.jsonl", '{"step": 1, "kind": "drift"}\n', "jsonl:1: .* name, action, message"),
        ("front.json", '{"objectives": []}', "front.json` is damaged: KeyError"),
        ("front.json", "{", "front.json` is damaged"),
        ("front.json", '{"checkpoints": [1]}', "front.json` is damaged: TypeError"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_training("run", tmp_path)
