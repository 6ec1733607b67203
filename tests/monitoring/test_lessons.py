"""A run says what it cannot learn from, at once and at its end."""

from __future__ import annotations

import math

import torch

from moa_diffusion.monitoring.lessons import Lessons
from moa_diffusion.types import RewardMatrix
from toy_runs import (
    make,
    rewards,
)


def warnings_of(caplog) -> list[str]:
    return [r.message for r in caplog.records if r.name == "moa_diffusion.monitoring.lessons"]


def test_a_reward_that_never_differs_is_told_at_once_and_at_the_end(tmp_path, caplog):
    make(tmp_path / "run", rewards=rewards("red", "constant", "by_prompt")).run()
    first, second, *last = warnings_of(caplog)
    assert first.startswith("Nothing can be learned from the reward constant in the first rollout")
    assert "it is 0.1 for every sample" in first
    assert "by_prompt in the first rollout: it is equal for all samples of a prompt" in second
    assert [line.split(":")[0] for line in last] == [
        f"Nothing could be learned from the reward {name} in 4 of 4 rollouts"
        for name in ("constant", "by_prompt")
    ]


def test_a_reward_that_never_applies_is_told_at_the_end(tmp_path, caplog):
    make(tmp_path / "run", rewards=rewards("red", "nothing")).run()
    (last,) = warnings_of(caplog)
    assert last.startswith("Nothing could be learned from the reward nothing in 4 of 4 rollouts:")
    assert "NaN for every sample" in last


def test_a_reward_that_seldom_applies_is_judged_by_where_it_does(caplog):
    lessons = Lessons(("seldom", "rare"))
    for step in range(6):
        seldom = [0.5, 0.5] if step == 3 else [math.nan, math.nan]
        rare = [0.0, 1.0] if step == 3 else [math.nan, math.nan]
        values = torch.tensor([seldom, rare], dtype=torch.float64)
        matrix = RewardMatrix(
            names=("seldom", "rare"),
            values=values,
            groups=torch.zeros(2).long(),
            prompts=("a", "a"),
        )
        lessons.look(matrix, values.nan_to_num(), torch.ones(2), first=step == 0)
    lessons.report()
    (last,) = warnings_of(caplog)
    assert last.startswith("Nothing could be learned from the reward seldom in 1 of 6 rollouts:")


def test_a_run_that_learns_nothing_says_so(tmp_path, caplog):
    make(tmp_path / "run", rewards=rewards("constant")).run()
    found = warnings_of(caplog)
    assert found[1] == "This run learns nothing so far: every advantage of the first rollout is 0."
    assert found[-1].startswith("THIS RUN HAS LEARNED NOTHING: every advantage was 0 in all of its")


def test_a_run_that_learns_says_nothing(tmp_path, caplog):
    make(tmp_path / "run").run()
    assert warnings_of(caplog) == []
