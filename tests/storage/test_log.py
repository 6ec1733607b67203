"""What a run writes: whole lines, null for NaN, and nothing after the checkpoint it resumed."""

from __future__ import annotations

import json
import math

import pytest
import torch

from moa_diffusion.storage.log import ALARMS, RunLog, read_metrics
from moa_diffusion.types import Request
from two_rewards import NAN, matrix


class Tracked:
    """Stands for the trackers."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, step, values):
        self.rows.append((step, dict(values)))


def test_lines_are_json_with_null_for_nan(tmp_path):
    tracked = Tracked()
    log = RunLog(tmp_path / "run", trackers=tracked)
    log.write(1, {"a/b": 0.5, "a/c": NAN})
    log.write(2, {"a/b": 1e-9})
    assert (
        log.path.read_text() == '{"step": 1, "a/b": 0.5, "a/c": null}\n{"step": 2, "a/b": 1e-09}\n'
    )
    assert [step for step, _ in tracked.rows] == [1, 2]
    assert tracked.rows[1] == (2, {"a/b": 1e-9})


def test_other_processes_write_nothing(tmp_path):
    log = RunLog(tmp_path / "run", main=False)
    log.write(1, {"a/b": 0.5})
    log.write_scores(1, [], matrix([[0.0], [0.0]]), torch.zeros(1))
    log.rewind(0)
    assert not (tmp_path / "run").exists()


def scores(log: RunLog, step: int) -> None:
    requests = [Request(prompt="groß", group=3, sibling=i, seed=10 + i) for i in range(2)]
    log.write_scores(step, requests, matrix([[0.5, NAN], [1.0, 2.0]]), torch.tensor([0.1, -0.1]))


def test_scores_of_every_sample(tmp_path):
    scores(RunLog(tmp_path), 7)
    lines = (tmp_path / "scores" / "step-000007.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert "groß" in lines[0]
    assert rows[1] == {
        "step": 7,
        "group": 3,
        "sibling": 1,
        "prompt": "groß",
        "seed": 11,
        "advantage": pytest.approx(-0.1),  # float32, rounded by 6e-8 of it
        "reward/a": None,
        "reward/b": 2.0,
    }
    scores(RunLog(tmp_path, scores=False), 8)
    assert len(list((tmp_path / "scores").iterdir())) == 1


def test_rewind_forgets_what_came_later(tmp_path):
    log = RunLog(tmp_path)
    for step in range(4):
        log.write(step, {"a/b": 0.1 * step})
        scores(log, step)
    before = log.path.read_text().splitlines(keepends=True)
    with log.path.open("a") as file:
        file.write('{"step": 4, "a/b": 0.')  # cut off by a crash
    log.rewind(2)
    assert log.path.read_text() == "".join(before[:3])
    assert [path.stem for path in sorted((tmp_path / "scores").iterdir())] == [
        f"step-{step:06d}" for step in range(3)
    ]
    log.write(3, {"a/b": 1.0})
    assert [row["step"] for row in read_metrics(log.path)] == [0, 1, 2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "scores"}


def test_rewind_of_a_run_that_has_written_nothing(tmp_path):
    RunLog(tmp_path / "run").rewind(0)


def test_only_the_last_line_may_be_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: A line should be JSON"):
        read_metrics(path)


def test_alarms_are_written_said_and_rewound(tmp_path, caplog):
    log = RunLog(tmp_path)
    for step in (2, 4):
        log.write_alarm({"step": step, "message": "down \u2028 it goes", "fall": -math.inf})
    assert "After 4 rollouts: down" in caplog.text
    rows = read_metrics(tmp_path / ALARMS)
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0] == {"step": 2, "message": "down \u2028 it goes", "fall": None}
    log.rewind(4, pending=True)  # the evaluation after 4 was not finished
    assert read_metrics(tmp_path / ALARMS) == rows[:1]
    RunLog(tmp_path / "other", main=False).write_alarm(rows[0])
    assert read_metrics(tmp_path / "other" / ALARMS) == []


def test_what_scores_depend_on_is_written_and_a_change_is_told(tmp_path, caplog):
    log, heads = RunLog(tmp_path), {"clip": {"unit": "1", "sha256": "a"}}
    log.write_heads(0, heads)
    log.write_heads(3, heads)
    noted = [{"after_step": 0, "heads": heads}]
    assert json.loads((tmp_path / "rewards.json").read_text()) == noted
    assert not caplog.records
    other = {"clip": {"unit": "1", "sha256": "b"}}
    log.write_heads(5, other)
    assert "Reward clip is not what it was" in caplog.text
    noted.append({"after_step": 5, "heads": other})
    assert json.loads((tmp_path / "rewards.json").read_text()) == noted


def test_further_columns_stand_in_the_scores_table(tmp_path):
    requests = [Request(prompt=f"p{i}", group=0, sibling=i, seed=i) for i in range(2)]
    extra = [{"ocr/read": "GO"}, {"ocr/read": None}]
    values = torch.zeros(1, 2, dtype=torch.float64)
    RunLog(tmp_path).write_evaluation(3, requests, ["ocr"], values, extra)
    lines = (tmp_path / "evaluation" / "step-000003.jsonl").read_text().splitlines()
    assert [json.loads(line)["ocr/read"] for line in lines] == ["GO", None]
