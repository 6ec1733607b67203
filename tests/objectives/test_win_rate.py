"""Win rates against a frozen pool: in numbers, at the edges of the pool, saved and refused."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moa_diffusion.objectives.base import combine
from moa_diffusion.objectives.normalize import Raw
from moa_diffusion.objectives.win_rate import WinRate, pool_std
from moa_diffusion.types import RewardMatrix

# Numbers are float64. Where a test gives no tolerance it takes the defaults of pytest (1e-6) and
# torch (1e-7): what is expected is often written in float32, which rounds by 6e-8.
NAN = math.nan


def rewards(
    values: Tensor | list[list[float]],
    prompts: Sequence[str],
    names: tuple[str, ...] = ("a", "b"),
) -> RewardMatrix:
    """Each prompt is one group."""
    groups = [prompts.index(prompt) for prompt in prompts]
    values = torch.as_tensor(values, dtype=torch.float64)
    return RewardMatrix(
        names=names[: len(values)],
        values=values,
        groups=torch.tensor(groups),
        prompts=tuple(prompts),
    )


def pool(*prompts: list[list[float]]) -> Tensor:
    """``[P, K, M]``"""
    return torch.tensor(prompts, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def with_pool() -> WinRate:
    """Prompts ``x`` and ``y``, of means 0 and 10 in ``a``, 5 and 5 in ``b``."""
    normalizer = WinRate(["a", "b"], pool_size=16)
    draw = random(2, 2, 16) + torch.tensor([[0.0, 5.0], [10.0, 5.0]])[:, :, None]
    normalizer.remember(["x", "y"], draw)
    return normalizer


# ---------------------------------------------------------------------- scores


def test_win_rates_in_numbers():
    """Pool (-1, 1): std 1, scale 1/2."""
    normalizer = WinRate(["a"], pool_size=2)
    normalizer.remember(["x"], pool([[-1.0, 1.0]]))
    found = normalizer.win_rates(rewards([[0.0, 1.0, 100.0, -100.0, NAN]], ["x"] * 5))
    expected = [0.5, (sigmoid(4) + 0.5) / 2, 1.0, 0.0, NAN]
    torch.testing.assert_close(found, torch.tensor([expected]).double(), equal_nan=True)


def test_every_prompt_plays_against_its_own_pool():
    normalizer, matrix = with_pool(), rewards([[5.0] * 4, [5.0] * 4], ["y", "x", "x", "y"])
    found = normalizer.win_rates(matrix)
    assert (found[0, [1, 2]] > 0.999).all()
    assert (found[0, [0, 3]] < 0.001).all()
    assert ((found[1] > 0.2) & (found[1] < 0.8)).all()


def test_the_reference_itself_wins_half():
    normalizer = WinRate(["a"], pool_size=16)
    normalizer.remember(["x"], random(1, 1, 16))
    found = normalizer.win_rates(rewards(random(1, 4000, seed=1), ["x"] * 4000))
    # 16 opponents, not all of them: a standard error of 0.06, and the fixed seed's is 0.055 off.
    assert float(found.mean()) == pytest.approx(0.5, abs=0.1)
    again = normalizer.win_rates(rewards(normalizer.pool[0], ["x"] * 16))
    assert float(again.mean()) == pytest.approx(0.5, abs=1e-12)


def test_units_and_locations_do_not_matter():
    draws, values = random(2, 2, 16), random(2, 8, seed=1)
    plain, other = WinRate(["a", "b"]), WinRate(["a", "b"])
    plain.remember(["x", "y"], draws)
    scale, shift = torch.tensor([[100.0], [0.01]]), torch.tensor([[3.0], [-7.0]])
    other.remember(["x", "y"], draws * scale + shift)
    prompts = ["x"] * 4 + ["y"] * 4
    torch.testing.assert_close(
        other.win_rates(rewards(values * scale + shift, prompts)),
        plain.win_rates(rewards(values, prompts)),
        rtol=1e-9,  # -7 is some 1e3 spreads of the second objective, so rounding is 1e-13 of them
        atol=1e-9,
    )


def test_rows_are_found_by_name():
    normalizer, values = with_pool(), random(2, 4, seed=1)
    prompts = ["x"] * 2 + ["y"] * 2
    turned = rewards(values.flip(0), prompts, names=("b", "a"))
    assert torch.equal(
        normalizer.win_rates(turned).flip(0), normalizer.win_rates(rewards(values, prompts))
    )


def test_nan_is_not_a_loss():
    """Neither in the sample, nor in a part of the pool, nor in all of it."""
    normalizer = WinRate(["a", "b"], pool_size=4)
    normalizer.remember(["x"], pool([[-1.0, 1.0, NAN, NAN], [NAN] * 4]))
    matrix = rewards([[0.0, 1.0, NAN], [0.0, 1.0, 2.0]], ["x"] * 3)
    expected = torch.tensor([[0.5, (sigmoid(4) + 0.5) / 2, NAN], [NAN] * 3]).double()
    torch.testing.assert_close(normalizer.win_rates(matrix), expected, equal_nan=True)
    advantages = normalizer.per_objective(matrix)
    half = (sigmoid(4) - 0.5) / 4
    torch.testing.assert_close(advantages, torch.tensor([[-half, half, 0], [0] * 3]).double())


# ---------------------------------------------------------------------- pools without spread


def test_a_pool_without_spread_takes_the_usual_scale():
    """Stds 1 and 3 and none, and one of 0.01, which is as good as none: their scale is 2 / 2."""
    normalizer = WinRate(["a"], pool_size=2)
    told = pool([[-1.0, 1.0]], [[-3.0, 3.0]], [[7.0, 7.0]], [[-0.01, 0.01]])
    normalizer.remember(["x", "y", "flat", "nearly"], told)
    usual = (1 + 3 + 0.01) / 3  # the mean over pools with a spread
    expected = torch.tensor([[1 / 2], [3 / 2], [usual / 2], [usual / 2]]).double()
    torch.testing.assert_close(normalizer.scale, expected)
    found = normalizer.win_rates(rewards([[7.0, 8.0]], ["flat"] * 2))
    torch.testing.assert_close(found, torch.tensor([[0.5, sigmoid(2 / usual)]]).double())


def test_prompts_that_come_later_change_no_score():
    normalizer, alone = WinRate(["a"], pool_size=2), WinRate(["a"], pool_size=2)
    for each in (normalizer, alone):
        each.remember(["x", "flat"], pool([[-1.0, 1.0]], [[7.0, 7.0]]))
    normalizer.remember(["wide", "flat too"], pool([[-9.0, 9.0]], [[7.0, 7.0]]))
    matrix = rewards([[0.3, 0.4, 7.1, 7.2]], ["x", "x", "flat", "flat"])
    assert torch.equal(normalizer.win_rates(matrix), alone.win_rates(matrix))
    assert normalizer.scale[:, 0].tolist() == [1 / 2, 1 / 2, 9 / 2, 5 / 2]


def test_without_any_spread_there_are_wins_ties_and_losses():
    normalizer = WinRate(["a"], pool_size=3)
    normalizer.remember(["x"], pool([[0.1, 0.1, 0.1]]))
    values = [[0.1, 0.1 * (1 + 2**-52), 0.2, 0.0, NAN]]
    found = normalizer.win_rates(rewards(values, ["x"] * 5))
    torch.testing.assert_close(
        found, torch.tensor([[0.5, 0.5, 1.0, 0.0, NAN]]).double(), equal_nan=True, rtol=0, atol=0
    )


def test_pool_std():
    found = pool_std(torch.tensor([[1.0, 3.0, NAN], [0.3, 0.3, 0.3 + 1e-16], [NAN] * 3]).double())
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, NAN]).double(), equal_nan=True)


# ---------------------------------------------------------------------- advantages


def test_scores_are_centred_in_their_group():
    normalizer, matrix = with_pool(), rewards(random(2, 8, seed=1), ["x"] * 4 + ["y"] * 4)
    wins, advantages = normalizer.win_rates(matrix), normalizer.per_objective(matrix)
    torch.testing.assert_close(advantages[:, :4], wins[:, :4] - wins[:, :4].mean(1, keepdim=True))
    torch.testing.assert_close(advantages[:, 4:], wins[:, 4:] - wins[:, 4:].mean(1, keepdim=True))


def test_a_constant_in_every_score_changes_no_advantage(monkeypatch):
    normalizer, matrix = with_pool(), rewards(random(2, 8, seed=1), ["x"] * 4 + ["y"] * 4)
    before, wins = normalizer.per_objective(matrix), normalizer.win_rates(matrix)
    shift = torch.tensor([[0.3], [-0.2]])
    monkeypatch.setattr(normalizer, "win_rates", lambda rewards: wins + shift)
    torch.testing.assert_close(normalizer.per_objective(matrix), before)


def test_rewards_without_spread_have_exactly_no_advantage():
    normalizer = with_pool()
    values = torch.full((2, 4), 0.1).double()
    values[:, ::2] *= 1 + 2**-52
    assert (normalizer.per_objective(rewards(values, ["x"] * 4)) == 0).all()


def test_one_std_for_the_batch():
    """The group that spreads twice as far keeps twice the advantage; one each makes them equal."""
    normalizer, matrix = with_pool(), rewards([[0.0, 2.0, 0.0, 4.0]], ["x", "x", "y", "y"])
    scores = torch.tensor([-1.0, 1.0, -2.0, 2.0]).double()
    found = normalizer.combined(scores, matrix)
    spread = math.sqrt((1 + 4) / 2) + 1e-4
    torch.testing.assert_close(found, scores / spread)
    each = Raw(["a"], eps=1e-9).combined(scores, matrix)
    torch.testing.assert_close(each, scores.sign())


def test_better_rewards_have_more_advantage_in_the_end():
    normalizer, matrix = with_pool(), rewards(random(2, 8, seed=1), ["x"] * 4 + ["y"] * 4)
    scores = combine(
        normalizer.per_objective(matrix),
        torch.tensor([1.0, 0.0]).double(),
        torch.ones(2, 8, dtype=torch.bool),
    )
    final = normalizer.combined(scores, matrix)
    for group in (slice(0, 4), slice(4, 8)):
        order = matrix.values[0, group].argsort()
        assert (final[group][order].diff() > 0).all()


# ---------------------------------------------------------------------- what is remembered


def test_unknown_prompts_in_order_and_once():
    normalizer = with_pool()
    assert normalizer.reference_samples == 16
    assert normalizer.unknown(["z", "x", "w", "z", "y"]) == ["z", "w"]
    assert normalizer.unknown(["x", "y"]) == []


def test_a_prompt_without_a_pool_is_named():
    normalizer = with_pool()
    matrix = rewards(random(2, 3), ["x", "a red cube", "z"])
    for ask in (normalizer.per_objective, normalizer.win_rates):
        with pytest.raises(RuntimeError, match=r"prompt 'a red cube' \(2 such prompts\)"):
            ask(matrix)


def test_the_pool_is_saved():
    normalizer, file = with_pool(), io.BytesIO()
    torch.save(normalizer.state_dict(), file)
    file.seek(0)
    resumed = WinRate(["a", "b"])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.unknown(["y", "x"]) == []
    for each in (normalizer, resumed):  # what is remembered later sees the same past
        each.remember(["flat"], torch.full((1, 2, 16), 3.0).double())
    matrix = rewards(random(2, 6, seed=1), ["x"] * 2 + ["y"] * 2 + ["flat"] * 2)
    assert torch.equal(resumed.win_rates(matrix), normalizer.win_rates(matrix))
    assert torch.equal(resumed.scale, normalizer.scale)


def test_a_saved_state_is_not_changed_by_what_follows():
    """A rollout that is undone forgets the prompts it was told."""
    normalizer = with_pool()
    before = normalizer.state_dict()
    normalizer.remember(["z"], random(1, 2, 16))
    normalizer.load_state_dict(before)
    assert normalizer.unknown(["x", "y", "z"]) == ["z"]


@pytest.mark.parametrize(
    ("prompts", "told", "message"),
    [
        (["z"], random(1, 2, 4), r"shape \[P, K, M\] = \(1, 2, 16\). Found \(1, 2, 4\)"),
        (["z"], random(2, 2, 16), r"\(1, 2, 16\). Found \(2, 2, 16\)"),
        (["z", "x"], random(2, 2, 16), "distinct and new, .* Found 'x'"),
        (["z", "z"], random(2, 2, 16), "distinct and new, .* Found 'a repetition'"),
        (["z"], random(1, 2, 16) / 0, "finite or NaN. Found an infinity"),
    ],
)
def test_rewards_that_cannot_be_a_pool_are_refused(prompts, told, message):
    normalizer = with_pool()
    with pytest.raises(ValueError, match=message):
        normalizer.remember(prompts, told)
    assert normalizer.unknown(["z"]) == ["z"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_size": 1}, "`pool_size` should be at least 2. Found 1"),
        ({"eps": 0.0}, "`eps` should be positive. Found 0"),
        ({"eps": NAN}, "`eps` should be positive. Found nan"),
    ],
)
def test_bad_parameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        WinRate(["a"], **options)


def test_a_pool_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"should be that of the saved pool, 16\. Found 4"):
        WinRate(["a", "b"], pool_size=4).load_state_dict(with_pool().state_dict())
