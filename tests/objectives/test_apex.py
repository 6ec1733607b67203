"""APEX: each term by itself, then together on a toy in which one objective moves most easily."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moa_diffusion.objectives.apex import Apex, correlation, cosine, opposition
from moa_diffusion.objectives.normalize import DualStage
from moa_diffusion.types import ObjectiveStats, RewardMatrix

# Numbers are float64. Where a test gives no tolerance it takes the defaults of pytest (1e-6) and
# torch (1e-7): what is expected is often written in float32, which rounds by 6e-8.
NAMES = ("a", "b", "c")


def rollout(
    means: list[float], *, step: int = 0, spread: float = 0.1, gramian: Tensor | None = None
) -> ObjectiveStats:
    """Four prompts of four siblings around the given means, with an exact group std."""
    pattern = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64) * spread
    turned = torch.stack([pattern, pattern.roll(1), pattern[[0, 3, 1, 2]]])[: len(means)]
    values = torch.tensor(means, dtype=torch.float64)[:, None] + turned.repeat(1, 4)
    rewards = RewardMatrix(
        names=NAMES[: len(means)],
        values=values,
        groups=torch.arange(16) // 4 + 4 * step,
        prompts=tuple(f"p{i // 4}" for i in range(16)),
    )
    advantages = DualStage(rewards.names).per_objective(rewards)
    return ObjectiveStats(step=step, rewards=rewards, advantages=advantages, gramian=gramian)


def test_equal_until_the_warm_up_ends():
    apex = Apex(NAMES, warmup=3, conflict="off")
    found = [apex(rollout([0.0, 0.1 * e, -0.1 * e], step=e)) for e in range(4)]
    for weights in found[:3]:
        assert torch.equal(weights, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert not torch.equal(found[3], found[2])


def test_need_prefers_what_lags_and_most_what_fell():
    apex = Apex(NAMES, warmup=1, potential=0, conflict="off", decay=0)
    apex(rollout([0.0, 1.0, -5.0]))
    weights = apex(rollout([0.05, 1.0, -5.1], step=1))  # half way, unmoved, one std below
    assert weights[2] > weights[1] > weights[0]
    found = apex.report()
    assert found["apex_need/a"] == pytest.approx(0.5)
    assert found["apex_need/b"] == pytest.approx(1)
    assert found["apex_need/c"] == pytest.approx(2)
    assert found["apex_progress/c"] == pytest.approx(-1)
    q = torch.softmax(torch.tensor([1.0, 2.0, 4.0]).double(), 0)
    torch.testing.assert_close(weights, (1 - 3 * 0.05) * q + 0.05)


def test_potential_is_the_speed_in_units_of_the_spread():
    apex = Apex(NAMES, warmup=1, need=0, conflict="off", horizon=2)
    for e in range(4):
        apex(rollout([0.1 * e, 0.05 * e, -0.1 * e], step=e))
    found = apex.report()
    assert found["apex_potential/a"] == pytest.approx(1)
    assert found["apex_potential/b"] == pytest.approx(0.5)
    assert found["apex_potential/c"] == 0


def test_conflict_lowers_both_parties_of_a_conflict():
    gramian = torch.tensor([[4.0, -2.0, 0.0], [-2.0, 4.0, 0.0], [0.0, 0.0, 9.0]]).double()
    apex = Apex(NAMES, warmup=1, potential=0, need=0, conflict="gradients", decay=0)
    assert apex.needs_gramian
    apex(rollout([0, 0, 0], gramian=gramian))
    weights = apex(rollout([0, 0, 0], step=1, gramian=gramian))
    assert weights[0] == weights[1] < weights[2]
    assert apex.report()["conflict_gradients/a"] == pytest.approx(0.25)
    assert "conflict_advantages/a" in apex.report()  # both are logged, one is used
    assert not Apex(NAMES, conflict="advantages").needs_gramian


def test_measures_of_conflict():
    cosines = cosine(torch.tensor([[4.0, -3.0, 0.0], [-3.0, 9.0, 0.0], [0.0, 0.0, 0.0]]).double())
    torch.testing.assert_close(cosines[0], torch.tensor([1.0, -0.5, 0.0]).double())
    assert torch.equal(cosines[2], torch.zeros(3).double())
    torch.testing.assert_close(opposition(cosines), torch.tensor([0.25, 0.25, 0.0]).double())
    assert opposition(torch.ones(1, 1)).item() == 0

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    applies = torch.ones(3, 40, dtype=torch.bool)
    applies[1, 10:] = False
    z = (z - z.mean(1, keepdim=True)) * applies
    found = correlation(z, applies)
    expected = (z[0, :10] * z[1, :10]).sum() / (z[0, :10].norm() * z[1, :10].norm())
    assert found[0, 1] == found[1, 0] == pytest.approx(float(expected))
    assert found[0, 2] == pytest.approx(float(torch.corrcoef(z[[0, 2]])[0, 1]))


def test_automatic_targets_are_a_step_above_the_base_and_given_ones_stay():
    apex = Apex(NAMES, warmup=1, targets={"a": 0.5}, base={"c": -0.1}, step=2.0)
    apex(rollout([0, 0, 0]))
    assert apex.target.tolist() == pytest.approx([0.5, 0.2, 0.1])
    apex(rollout([9, 9, 9], step=1))
    assert apex.target.tolist() == pytest.approx([0.5, 0.2, 0.1])


def test_beyond_its_target_an_objective_goes_on_losing_weight():
    apex = Apex(("a", "b"), warmup=1, potential=0, conflict="off", decay=0, floor=0)
    apex(rollout([0.0, 0.0]))
    weights = apex(rollout([0.2, 0.4], step=1))  # 2 and 4 standard deviations above
    assert float(weights[0] / weights[1]) == pytest.approx(math.exp(2 * 2))


def test_easy_prompts_are_no_progress():
    """A rollout of the prompts that score high must not look like an improvement."""
    apex = Apex(("a",), warmup=2, floor=0)
    groups = torch.arange(8) // 4
    for e, (first, second) in enumerate([(0, 1), (2, 3), (0, 1), (2, 3), (0, 1)]):
        levels = torch.tensor([[first] * 4 + [second] * 4]).double()
        noise = torch.tensor([-0.1, 0.1] * 4).double()
        rewards = RewardMatrix(
            names=("a",),
            values=levels + noise,
            groups=groups + 2 * e,
            prompts=tuple(f"p{int(level)}" for level in levels[0]),
        )
        stats = ObjectiveStats(step=e, rewards=rewards, advantages=torch.zeros(1, 8).double())
        apex(stats)
        if e >= 1:
            assert apex.report()["apex_progress/a"] == pytest.approx(0)
    assert len(apex.running_level.records) == 4


def test_the_memory_of_prompts_is_bounded():
    apex = Apex(NAMES, memory=3)
    apex(rollout([0, 0, 0]))
    assert list(apex.running_level.records) == ["p1", "p2", "p3"]


def test_an_objective_without_spread_at_first_gets_its_aim_when_it_shows_one():
    apex = Apex(("a", "b"), warmup=2)
    for e in range(3):
        stats = rollout([0.0, 0.0], step=e)
        stats.rewards.values[0] = 0.0  # legible text, say, that the base model never manages
        apex(stats)
    assert apex.report()["apex_need/a"] == 0
    apex(rollout([0.0, 0.0], step=3))
    assert apex.report()["apex_need/a"] == pytest.approx(1)
    apex(rollout([0.05, 0.0], step=4))
    assert apex.report()["apex_need/a"] < 1


def test_a_target_below_the_measured_base_is_refused():
    apex = Apex(NAMES, warmup=1, targets={"a": -1.0})
    with pytest.raises(ValueError, match=r"above the base level 0 of 'a', measured .* Found -1"):
        apex(rollout([0, 0, 0]))


def test_conflict_of_gradients_needs_their_gramian():
    with pytest.raises(ValueError, match="`stats` should have a `gramian`"):
        Apex(NAMES, conflict="gradients")(rollout([0, 0, 0]))


def test_given_levels_are_those_of_the_configuration_after_a_resume():
    before = Apex(NAMES, warmup=1, targets={"a": 0.9})
    before(rollout([0, 0, 0]))
    resumed = Apex(NAMES, warmup=1, targets={"a": 5.0})
    resumed.load_state_dict(before.state_dict())
    resumed(rollout([0, 0, 0], step=1))
    assert resumed.report()["apex_target/a"] == 5.0


def test_an_objective_that_appears_late_gets_its_base_then():
    apex = Apex(NAMES, warmup=1)
    apex(rollout([0, 0, math.nan]))
    assert apex.report()["apex_need/c"] == 0
    weights = apex(rollout([0, 0, 7], step=1))
    assert weights.isfinite().all()
    assert apex.base[2] == 7
    assert apex.report()["apex_need/c"] == 1


def test_no_weight_falls_below_the_floor():
    apex = Apex(NAMES, warmup=1, temperature=0.01, decay=0, floor=0.1)
    for e in range(3):
        weights = apex(rollout([0.0, 3.0 * e, -3.0 * e], step=e))
    assert weights.min() == pytest.approx(0.1)
    assert weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("method", ["equal", "apex"])
def test_toy_the_objective_that_moves_most_easily_does_not_take_over(method):
    """RunningLevel follows the weight times an ease; a takes 0.02 of what b loses."""
    apex = Apex(("easy", "hard"), warmup=1)
    level = torch.zeros(2).double()
    for e in range(60):
        weights = apex(rollout(level.tolist(), step=e, spread=1.0))
        if method == "equal":
            weights = torch.full((2,), 0.5).double()
        # Two directions: one helps `easy` and costs `hard`, the other helps `hard` alone.
        shared, own = float(weights[0]) - 0.5 * float(weights[1]), float(weights[1])
        level += torch.tensor([0.20 * shared, 0.04 * own - 0.08 * max(shared, 0)]).double()
    if method == "equal":
        assert level[1] <= 1e-9  # 60 sums of float64 round by far less
    else:
        assert level.min() > 0.3  # 0.83


def test_equal_importance_changes_nothing_and_only_ratios_count():
    means = [[0.05 * e, 0.0, -0.02 * e] for e in range(6)]

    def found(weights: list[float] | None) -> Tensor:
        apex = Apex(NAMES, warmup=1, weights=weights)
        return torch.stack([apex(rollout(mean, step=e)) for e, mean in enumerate(means)])

    assert torch.equal(found([1.0, 1.0, 1.0]), found(None))
    torch.testing.assert_close(found([7.0, 7.0, 7.0]), found(None))
    torch.testing.assert_close(found([2.0, 1.0, 4.0]), found([1.0, 0.5, 2.0]))


@pytest.mark.parametrize("seed", range(40))
def test_a_larger_importance_never_gives_a_smaller_weight(seed):
    """Whatever the state: before the base, between, and beyond the target."""
    draws = torch.Generator().manual_seed(seed)
    count = 2 + seed % 2
    history = torch.randn(5, count, generator=draws, dtype=torch.float64).mul(0.3).tolist()
    weights = (0.1 + 3 * torch.rand(count, generator=draws, dtype=torch.float64)).tolist()
    larger = float(1 + 3 * torch.rand((), generator=draws))
    k = seed % count
    raised = [w * larger if i == k else w for i, w in enumerate(weights)]
    options = {"warmup": 1, "potential": 0.5 * (seed % 3), "need": 0.5 + seed % 4, "decay": 0.5}
    before = Apex(NAMES[:count], weights=weights, **options)
    after = Apex(NAMES[:count], weights=raised, **options)
    for e, means in enumerate(history):
        low, high = (apex(rollout(means, step=e)) for apex in (before, after))
        assert high[k] >= low[k] - 1e-12  # sums of float64
    assert high[k] > low[k]


def test_toy_what_is_more_important_ends_nearer_to_its_target():
    """Two objectives of equal ease that share the step by their weights."""
    apex = Apex(("a", "b"), warmup=1, potential=0, conflict="off", weights=[3.0, 1.0])
    level = torch.zeros(2).double()
    for e in range(80):
        weights = apex(rollout(level.tolist(), step=e, spread=1.0))
        level += 0.02 * weights - 0.005  # each falls by itself
    needs = [apex.report()[f"apex_need/{name}"] for name in ("a", "b")]
    assert needs[0] < 0.5 * needs[1]
    assert level.min() > 0  # and the other is not given up


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0, -1.0, 1.0]}, r"`weights` should have a positive .* Found \[1.0, -1.0"),
        ({"weights": [1.0, 1.0]}, r"an? positive finite entry per objective"),
        ({"weights": [1.0, 2.0, 1.0], "need": 0}, "equal entries where `need` is 0"),
        ({"conflict": "gradient"}, "one of .*'gradients'.* Found 'gradient'"),
        ({"floor": 0.4}, r"in \[0, 1 / K = 0.333\]. Found 0.4"),
        ({"temperature": 0}, "`temperature` should be positive"),
        ({"need": -1}, "`need` should be at least 0"),
        ({"horizon": 0}, "`horizon` should be at least 1"),
        ({"decay": 1}, r"`decay` should be in \[0, 1\)"),
        ({"targets": {"aa": 1}}, "Found 'aa'. Did you mean 'a'"),
        ({"targets": {"a": "high"}}, "give 'a' a finite number. Found 'high'"),
        ({"targets": {"a": 1}, "base": {"a": 1}}, "above the base level 1.0 of 'a'. Found 1.0"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Apex(NAMES, **options)
