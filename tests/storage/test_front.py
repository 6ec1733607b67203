"""Which checkpoints stay: non-dominated ones, the newest, and those to go back to."""

from __future__ import annotations

import json
import math

import pytest
import torch

from moa_diffusion.statistics.pareto import crowding, nondominated, thinned
from moa_diffusion.storage import checkpoint
from moa_diffusion.storage.front import NAME, retain

NAN = math.nan


def test_nondominated_by_hand():
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.5, 0.5]])
    assert nondominated(points) == [False, True, True, True, True]
    unknown = torch.tensor([[NAN, 1.0], [9.0, 2.0]])
    assert nondominated(unknown) == [False, True]
    assert nondominated(torch.full((2, 1), NAN)) == [False, False]
    assert nondominated(torch.zeros(0, 2)) == []


def test_nondominated_equals_its_definition():
    points = torch.randint(0, 4, (60, 3), generator=torch.Generator().manual_seed(0)).double()
    for i, inside in enumerate(nondominated(points)):
        dominated = any(
            bool((other >= points[i]).all() and (other > points[i]).any()) for other in points
        )
        assert inside is not dominated


def test_the_ends_of_a_front_stay_and_the_crowd_leaves():
    x = torch.tensor([0.0, 0.1, 0.15, 0.5, 1.0])
    points = torch.stack([x, 1 - x], 1)
    # These points are float32, rounded by 6e-8: pytest's default is 1e-6.
    assert crowding(points) == pytest.approx([math.inf, 0.3, 0.8, 1.7, math.inf])
    assert thinned(points, 4) == [0, 2, 3, 4]
    assert thinned(points, 2) == [0, 4]
    assert thinned(points, 9) == [0, 1, 2, 3, 4]
    assert thinned(points, 0) == []
    assert crowding(torch.tensor([[1.0, 2.0], [1.0, 2.0]])) == [0.0, 0.0]


def run(folder, means, alarms=()):
    """A folder with a checkpoint at every step of ``means``, evaluated where these are given."""
    rows = []
    for step, values in means.items():
        with checkpoint.atomic_folder(checkpoint.step_folder(folder, step)) as partial:
            (partial / checkpoint.STATE).write_bytes(checkpoint.packed({"step": step}))
        if values is not None:
            named = {f"eval_mean/{name}": value for name, value in zip("ab", values, strict=True)}
            rows.append({"step": step} | named)
    for name, lines in (("metrics.jsonl", rows), ("alarms.jsonl", alarms)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / name).write_text(text)


def kept(folder):
    found = json.loads((folder / NAME).read_text())
    assert found["objectives"] == ["a", "b"]
    there = [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(folder)]
    rows = {row["step"]: row for row in found["checkpoints"]}
    assert there == list(rows)
    return rows


MEANS = {0: [1, 1], 2: [2, 0], 4: [1.5, 0.5], 6: [0, 0], 8: None, 10: [0.5, 0.2], 12: None}


def test_what_stays(tmp_path):
    run(tmp_path, MEANS)
    retain(tmp_path, ["a", "b"], newest=2, front=5, best={6})
    rows = kept(tmp_path)
    assert {step: row["kept_for"] for step, row in rows.items()} == {
        0: ["front"],
        2: ["front"],
        4: ["front"],
        6: ["best"],
        10: ["last"],
        12: ["last"],
    }
    assert [step for step, row in rows.items() if row["non_dominated"]] == [0, 2, 4]
    assert rows[4]["means"] == {"a": 1.5, "b": 0.5}
    assert rows[12]["means"] is None


def test_limits(tmp_path):
    run(tmp_path, MEANS)
    retain(tmp_path, ["a", "b"], newest=0, front=1)
    assert len(kept(tmp_path)) == len(MEANS)
    retain(tmp_path, ["a", "b"], newest=1, front=2)
    assert list(kept(tmp_path)) == [0, 2, 12]
    retain(tmp_path, ["a", "b"], newest=1, front=0)
    assert list(kept(tmp_path)) == [12]


def test_without_any_evaluation_the_newest_stay(tmp_path):
    run(tmp_path, {1: None, 2: None, 3: None})
    retain(tmp_path, ["a", "b"], newest=2, front=5)
    assert list(kept(tmp_path)) == [2, 3]


def test_after_a_rollback_the_means_are_of_the_weights(tmp_path):
    """What was evaluated after 4 rollouts is gone: the weights are those after 2."""
    alarms = [{"step": 4, "to_step": 2}, {"step": 6, "to_step": None}, {"step": 8, "to_step": 1}]
    run(tmp_path, {2: [1, 1], 4: [9, 9], 6: [0, 5], 8: [9, 9]}, alarms)
    retain(tmp_path, ["a", "b"], newest=1, front=5)
    rows = kept(tmp_path)
    assert list(rows) == [2, 4, 6, 8]
    assert rows[4]["means"] == {"a": 1, "b": 1}
    assert rows[8]["means"] is None
    assert rows[8]["kept_for"] == ["last"]


def test_an_objective_that_never_applies_does_not_decide(tmp_path):
    run(tmp_path, {1: [1, None], 2: [2, None], 3: [0, None]})
    retain(tmp_path, ["a", "b"], newest=1, front=5)
    assert list(kept(tmp_path)) == [2, 3]
