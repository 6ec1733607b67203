"""RunningLevel: of prompts that are compared with themselves, however unlike prompts are."""

from __future__ import annotations

import math
import random

import pytest
import torch

from moa_diffusion.objectives.running_level import RunningLevel
from moa_diffusion.types import RewardMatrix

SIBLINGS = 4


def rollout(means: dict[str, list[float]], noise: float = 0.0, seed: int = 0) -> RewardMatrix:
    """A group of siblings per prompt; they differ by `noise`, which is drawn."""
    source = torch.Generator().manual_seed(seed)
    levels = torch.tensor(list(means.values()), dtype=torch.float64).repeat_interleave(SIBLINGS, 0)
    drawn = torch.randn(levels.shape, generator=source, dtype=torch.float64)
    count = levels.shape[1]
    return RewardMatrix(
        names=tuple("abc"[:count]),
        values=(levels + noise * drawn).T.contiguous(),
        groups=torch.arange(len(levels)) // SIBLINGS,
        prompts=tuple(prompt for prompt in means for _ in range(SIBLINGS)),
    )


def drawn(prompts: list[str], *, each: int, rollouts: int) -> list[list[str]]:
    """Which prompts each rollout draws: all of them, in a new order each time round."""
    order, source = [], random.Random(0)
    while len(order) < each * rollouts:
        order += source.sample(prompts, len(prompts))
    return [order[each * e : each * (e + 1)] for e in range(rollouts)]


def test_of_equal_prompts_it_is_the_mean() -> None:
    running = RunningLevel(2, warmup=1, memory=9)
    assert running(rollout({"p": [1.0, 5.0], "q": [3.0, 5.0]})).tolist() == [2.0, 5.0]
    assert running(rollout({"p": [1.5, 4.0], "q": [3.5, 4.0]})).tolist() == [2.5, 4.0]
    assert running.start.tolist() == [2.0, 5.0]


@pytest.mark.parametrize("gain", [0.0, 0.05])
def test_what_a_rollout_draws_is_no_progress(gain: float) -> None:
    """26 prompts, 8 a rollout: the last two are met after the warm-up, and tell nothing alone.

    They lie 48 times further apart than siblings do, as colourfulness does on the shipped prompts.
    """
    levels = torch.randn(26, generator=torch.Generator().manual_seed(1)).mul(48).tolist()
    prompts = {f"p{i}": level for i, level in enumerate(levels)}
    running, worst = RunningLevel(1, warmup=3, memory=256), 0.0
    for e, chosen in enumerate(drawn(list(prompts), each=8, rollouts=30)):
        level = running(rollout({p: [prompts[p] + gain * e] for p in chosen}, noise=1.0, seed=e))
        if e >= 3:
            # It lags by half the 3.25 rollouts in which all prompts come by, and begins in the
            # middle of the warm-up.
            expected = gain * max(0.0, e - 1 - 1.6)
            worst = max(worst, abs(float(level - running.start) - expected))
    # A mean over 26 pairs of groups of 4 has a deviation of 0.14, and one over the first 6 of 0.29.
    assert worst < 0.6  # 0.25 and 0.31; of the prompts' latest means, without pairs, 3.3


@pytest.mark.parametrize("between", [0.5, 2.0])
def test_prompts_that_never_come_back_are_compared_by_their_means(between: float) -> None:
    source = random.Random(3)
    running, gain = RunningLevel(1, warmup=3, memory=96), 0.1
    found = []
    for e in range(40):
        means = {f"{e}.{i}": [source.gauss(gain * e, between)] for i in range(24)}
        found.append(float(running(rollout(means, noise=1.0, seed=e)) - running.start))
    # It begins in the middle of the warm-up, and four rollouts are remembered. Means over 72 and 96
    # prompts deviate by 0.16 of their spread, and siblings add 0.08.
    expected = gain * (34.5 - 1 - 1.5)
    assert sum(found[-10:]) / 10 == pytest.approx(expected, abs=3 * (0.16 * between + 0.08))


@pytest.mark.parametrize("warmup", [1, 2, 3])
def test_a_short_warm_up_takes_no_late_prompt_for_progress(warmup: int) -> None:
    """26 prompts, 8 a rollout: after one rollout, 18 of them are still to come."""
    levels = torch.randn(26, generator=torch.Generator().manual_seed(2)).mul(48).tolist()
    prompts = {f"p{i}": level for i, level in enumerate(levels)}
    running = RunningLevel(1, warmup=warmup, memory=256)
    for e, chosen in enumerate(drawn(list(prompts), each=8, rollouts=20)):
        level = running(rollout({p: [prompts[p]] for p in chosen}, noise=1.0, seed=e))
        # Means of some groups of 4 have deviations of up to 0.3, and bases have them too.
        assert abs(float(level - running.start)) < 0.8 or e < warmup


def test_a_prompt_that_is_met_late_joins_at_the_progress_of_the_others() -> None:
    running = RunningLevel(1, warmup=1, memory=9)
    running(rollout({"p": [0.0], "q": [10.0]}, noise=0.1))
    running(rollout({"p": [1.0], "q": [11.0]}))
    level = running(rollout({"p": [1.0], "late": [500.0]}))
    # The late prompt counts for what its noise of 0.1 is beside prompts 10 apart: next to nothing.
    assert float(level - running.start) == pytest.approx(1, abs=0.1)
    level = running(rollout({"late": [501.0], "p": [2.0]}))
    # q has stayed at 1; p and the late one have gained 1 more.
    assert float(level - running.start) == pytest.approx(5 / 3, abs=0.1)


def test_an_objective_that_appears_late_starts_then() -> None:
    running = RunningLevel(2, warmup=1, memory=9)
    assert running(rollout({"p": [1.0, math.nan]}))[1].isnan()
    assert running(rollout({"p": [1.0, math.nan], "q": [1.0, math.nan]}))[1].isnan()
    assert running(rollout({"p": [2.0, 7.0]}))[1] == 7.0
    assert running(rollout({"p": [2.0, math.nan], "q": [1.0, math.nan]}))[1] == 7.0
    assert running(rollout({"p": [2.0, 8.0]}))[1] == 8.0


def test_the_memory_is_bounded_and_a_forgotten_prompt_comes_as_a_new_one() -> None:
    running = RunningLevel(1, warmup=1, memory=2)
    running(rollout({"p": [0.0], "q": [0.0], "r": [0.0]}))
    assert list(running.records) == ["q", "r"]
    running(rollout({"p": [3.0]}))
    assert list(running.records) == ["r", "p"]


def test_a_resumed_run_goes_on_alike() -> None:
    before = RunningLevel(1, warmup=2, memory=9)
    rollouts = [
        rollout({"p": [0.1 * e], f"q{e % 3}": [e**0.5]}, noise=0.3, seed=e) for e in range(6)
    ]
    for rewards in rollouts[:3]:
        before(rewards)
    saved = before.state_dict()
    found = [before(rewards) for rewards in rollouts[3:]]
    after = RunningLevel(1, warmup=2, memory=9)
    after.load_state_dict(saved)  # as it was when it was saved
    assert [after(rewards) for rewards in rollouts[3:]] == found
