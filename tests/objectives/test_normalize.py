"""Normalizers: the suite that each must pass, then each one's own numbers."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moa_diffusion.objectives.base import Normalizer, combine
from moa_diffusion.objectives.noon import Noon
from moa_diffusion.objectives.normalize import (
    GDPO,
    DualStage,
    PromptHistory,
    Raw,
    update_ema,
    whiten,
)
from moa_diffusion.objectives.win_rate import WinRate
from moa_diffusion.statistics.groups import (
    group_moments,
    rms_group_std,
    same_prompt,
    spread_within,
    zero_variance_fraction,
)
from moa_diffusion.types import RewardMatrix

# Numbers are float64. Where a test gives no tolerance it takes the defaults of pytest (1e-6) and
# torch (1e-7): what is expected is often written in float32, which rounds by 6e-8.
# Where only rounding tells rewards apart, it is 4e-15, and 4e-9 over the smallest eps, 1e-6.
NAMES = ("a", "b", "c")
NAN = math.nan


def win_rate() -> WinRate:
    """Told the reference rewards of every prompt of the zoo and of this file."""
    normalizer = WinRate(NAMES)
    prompts = [f"prompt {group}" for group in [*range(16), 10**12]]
    normalizer.remember(prompts, torch.stack([normal(100 + i) for i in range(17)]))
    return normalizer


# A new normalizer enters the common suite here, by one line.
NORMALIZERS: dict[str, Callable[[], Normalizer]] = {
    "raw": lambda: Raw(NAMES),
    "raw_batch": lambda: Raw(NAMES, std="batch"),
    "gdpo": lambda: GDPO(NAMES),
    "dual_stage": lambda: DualStage(NAMES),
    "dual_stage_without_floor": lambda: DualStage(NAMES, floor=0.0),
    "noon": lambda: Noon(NAMES),
    "noon_match_rms": lambda: Noon(NAMES, match_rms=True),
    "win_rate": win_rate,
    "prompt_history": lambda: PromptHistory(NAMES, size=64, min_count=4),
    "prompt_history_unknown": lambda: PromptHistory(NAMES, size=64, min_count=64),
}
# Win rates are against rewards that do not move along: to see that is what they are for.
RELATIVE = [name for name in NORMALIZERS if name != "win_rate"]
GROUPWISE = [name for name in NORMALIZERS if not name.startswith("prompt_history")]


@pytest.fixture(params=NORMALIZERS)
def make(request: pytest.FixtureRequest) -> Callable[[], Normalizer]:
    return NORMALIZERS[request.param]


@pytest.fixture(params=GROUPWISE)
def make_groupwise(request: pytest.FixtureRequest) -> Callable[[], Normalizer]:
    return NORMALIZERS[request.param]


def rewards(values: Tensor | list[list[float]], group_size: int = 4) -> RewardMatrix:
    values = torch.as_tensor(values, dtype=torch.float64)
    groups = torch.arange(values.shape[1]) // group_size
    return RewardMatrix(
        names=NAMES[: len(values)],
        values=values,
        groups=groups,
        prompts=tuple(f"prompt {group}" for group in groups.tolist()),
    )


def normal(seed: int, samples: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(3, samples, generator=generator, dtype=torch.float64)
    return draw * torch.tensor([[1.0], [0.1], [5.0]]) + torch.tensor([[0.0], [0.6], [21.0]])


def final(normalizer: Normalizer, matrix: RewardMatrix) -> Tensor:
    """Both stages with equal weights, ``[N]``."""
    advantages = normalizer.per_objective(matrix)
    equal = advantages.new_ones(len(advantages))
    scores = combine(advantages, equal, ~matrix.values.isnan())
    return normalizer.combined(scores, matrix)


def permuted(matrix: RewardMatrix, order: Tensor) -> RewardMatrix:
    return RewardMatrix(
        names=matrix.names,
        values=matrix.values[:, order],
        groups=matrix.groups[order],
        prompts=tuple(matrix.prompts[i] for i in order.tolist()),
    )


def flat_groups(matrix: RewardMatrix) -> Tensor:
    """``[K, N]``: whether all siblings that have a reward have the same one."""
    flat = torch.zeros_like(matrix.values, dtype=torch.bool)
    for k, row in enumerate(matrix.values):
        for group in matrix.groups.unique():
            members = matrix.groups == group
            values = row[members & ~row.isnan()]
            flat[k, members] = len(values.unique()) <= 1
    return flat


# ---------------------------------------------------------------------- the common suite


def test_advantages_are_finite_and_zero_where_nothing_applies(make, matrices, naming):
    for name, zoo in matrices.items():
        with naming(name):
            normalizer, before = make(), zoo.values.clone()
            for _ in range(3):
                advantages = normalizer.per_objective(zoo)
                assert advantages.shape == zoo.values.shape
                assert advantages.dtype == torch.float64
                assert advantages.isfinite().all()
                assert (advantages[zoo.values.isnan()] == 0).all()
                combined = final(make(), zoo)
                assert combined.shape == zoo.groups.shape
                assert combined.isfinite().all()
            assert torch.equal(zoo.values.nan_to_num(-9), before.nan_to_num(-9)), (
                "input was changed"
            )


def test_order_of_samples_does_not_matter(make, matrices, naming):
    for name, zoo in matrices.items():
        with naming(name):
            order = torch.randperm(len(zoo.groups), generator=torch.Generator().manual_seed(3))
            one, other = make(), make()
            for _ in range(2):
                torch.testing.assert_close(
                    other.per_objective(permuted(zoo, order)), one.per_objective(zoo)[:, order]
                )
            torch.testing.assert_close(
                final(make(), permuted(zoo, order)), final(make(), zoo)[order]
            )


def test_order_of_objectives_does_not_matter(make, matrices, naming):
    for name, zoo in matrices.items():
        with naming(name):
            order = torch.tensor([2, 0, 1])
            other = RewardMatrix(
                names=tuple(zoo.names[k] for k in order.tolist()),
                values=zoo.values[order],
                groups=zoo.groups,
                prompts=zoo.prompts,
            )
            torch.testing.assert_close(
                make().per_objective(other), make().per_objective(zoo)[order]
            )
            torch.testing.assert_close(final(make(), other), final(make(), zoo))


@pytest.mark.parametrize("name", RELATIVE)
def test_adding_a_constant_to_an_objective_changes_nothing(name, matrices, naming):
    for matrix_name, zoo in matrices.items():
        with naming(matrix_name):
            make = NORMALIZERS[name]
            largest = zoo.values.nan_to_num(0).abs().amax(1, keepdim=True)
            shift = torch.tensor([[3.0], [-2.0], [0.5]]).double() * largest
            moved = RewardMatrix(
                names=zoo.names, values=zoo.values + shift, groups=zoo.groups, prompts=zoo.prompts
            )
            before, after = make(), make()
            for _ in range(2):
                # Moved rewards round by 1e-16 of up to four times the largest; an eps of 1e-6 makes
                # 1e-9 of it.
                torch.testing.assert_close(
                    after.per_objective(moved), before.per_objective(zoo), rtol=1e-6, atol=1e-6
                )


def test_more_reward_is_more_advantage(make, matrices, naming):
    for name, zoo in matrices.items():
        with naming(name):
            advantages = make().per_objective(zoo)
            for k, row in enumerate(zoo.values):
                for group in zoo.groups.unique():
                    members = (zoo.groups == group) & ~row.isnan()
                    steps = advantages[k, members][row[members].argsort()].diff()
                    assert (steps >= 0).all()


def test_groups_without_spread_have_exactly_zero_advantage(make_groupwise, matrices, naming):
    for name, zoo in matrices.items():
        with naming(name):
            flat = flat_groups(zoo)
            advantages = make_groupwise().per_objective(zoo)
            assert (advantages[flat] == 0).all()
            silent = flat.all(0)  # [N]: none of the objectives can tell the siblings apart
            torch.testing.assert_close(
                final(make_groupwise(), zoo)[silent],
                torch.zeros(int(silent.sum())).double(),
                atol=1e-9,  # a mean of zero but for 1e-16 is divided by at least 1e-6
                rtol=0,
            )


def test_groups_without_spread_stay_at_zero_for_hundreds_of_rollouts(make_groupwise):
    normalizer = make_groupwise()
    for step in range(300):
        values = normal(step)
        values[1] = 0.1  # never any spread
        values[:, :4] = values[:, :1]
        advantages = normalizer.per_objective(rewards(values))
        assert (advantages[1] == 0).all()
        assert (advantages[:, :4] == 0).all()
        assert (advantages[[0, 2], 4:] != 0).any(1).all()


def test_rounding_is_not_blown_up(make):
    values = torch.tensor([[0.1], [0.6], [21.7]], dtype=torch.float64).repeat(1, 16)
    values[:, 1::3] *= 1 + 2**-52
    normalizer = make()
    for _ in range(20):
        assert final(normalizer, rewards(values)).abs().max() < 1e-6  # 1 if it were a signal


def test_saved_state_continues_identically(make):
    """The first rollouts spread far wider, so that forgetting them would show."""
    straight, before = make(), make()
    for step in range(3):
        straight.per_objective(rewards(100 * normal(step)))
        before.per_objective(rewards(100 * normal(step)))
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        matrix = rewards(normal(step))
        assert torch.equal(resumed.per_objective(matrix), straight.per_objective(matrix))


@pytest.mark.parametrize("name", ["dual_stage", "dual_stage_without_floor"])
@pytest.mark.parametrize("scale", [2.0**-30, 2.0**30])
def test_dual_stage_does_not_see_units(name, scale, matrices, naming):
    for matrix_name, zoo in matrices.items():
        with naming(matrix_name):
            plain, scaled = NORMALIZERS[name](), NORMALIZERS[name]()
            factor = torch.tensor([[scale], [1.0], [1 / scale]]).double()
            other = RewardMatrix(
                names=zoo.names, values=zoo.values * factor, groups=zoo.groups, prompts=zoo.prompts
            )
            for _ in range(3):
                assert torch.equal(scaled.per_objective(other), plain.per_objective(zoo))


@pytest.mark.parametrize("scale", [1e-10, 1e-3, 1e10])
def test_dual_stage_does_not_see_decimal_units_either(scale):
    plain, scaled = DualStage(NAMES), DualStage(NAMES)
    for step in range(3):
        torch.testing.assert_close(
            scaled.per_objective(rewards(normal(step) * scale)),
            plain.per_objective(rewards(normal(step))),
            rtol=1e-9,  # a unit that is no power of two rounds each reward, by 1e-16
            atol=1e-9,
        )


def test_gdpo_does_not_see_units_far_above_its_eps():
    plain = GDPO(NAMES).per_objective(rewards(normal(0) * 1e4))
    scaled = GDPO(NAMES).per_objective(rewards(normal(0) * 1e8))
    # Its eps, 1e-4, is 1e-7 of the smallest spread, and 4e-7 of one group's.
    torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------- statistics


def test_group_moments_against_a_loop(zoo):
    mean, std, count = group_moments(zoo.values, zoo.groups)
    for k, row in enumerate(zoo.values):
        for i in range(len(zoo.groups)):
            values = row[(zoo.groups == zoo.groups[i]) & ~row.isnan()]
            assert count[k, i] == len(values)
            if not len(values):
                assert mean[k, i] == std[k, i] == 0
                continue
            expected = values.std(correction=0) if len(values) > 1 else torch.tensor(0.0)
            # Sums of up to 16 terms; a spread far below the values has their rounding.
            largest = float(values.abs().max())
            assert float(mean[k, i]) == pytest.approx(float(values.mean()), rel=1e-12)
            assert float(std[k, i]) == pytest.approx(float(expected), rel=1e-9, abs=largest * 1e-12)


def test_group_moments_of_no_samples():
    for part in group_moments(torch.empty(3, 0).double(), torch.empty(0, dtype=torch.int64)):
        assert part.shape == (3, 0)


def test_spread_and_zero_variance_in_numbers():
    matrix = rewards([[0, 2, 5, 5], [NAN, 1, 2, 8], [NAN] * 4], group_size=2)
    spread = rms_group_std(matrix)
    torch.testing.assert_close(spread[:2], torch.tensor([0.5, 6]).double().sqrt())
    assert spread[2].isnan()
    fraction = zero_variance_fraction(matrix)
    assert fraction[:2].tolist() == pytest.approx([1 / 2, 1 / 3])  # one value alone has no spread
    assert fraction[2].isnan()


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_spread_within_groups_does_not_depend_on_their_size(size):
    """Its square is unbiased; of 20,000 groups it is exact to 2 %, as chi-squared says.

    Its standard error is 1 / sqrt(2 * 20,000 (size - 1)), in groups of two 0.5 %: four of them.
    """
    values = torch.randn(2, 20_000 * size, generator=torch.Generator().manual_seed(size)).double()
    groups = torch.arange(20_000).repeat_interleave(size)
    offsets = torch.randn(20_000, generator=torch.Generator().manual_seed(9)).double()[groups]
    scale = torch.tensor([1.0, 7.0]).double()
    found = spread_within(values * scale[:, None] + 5 * offsets, groups)
    torch.testing.assert_close(found, scale, rtol=0.02, atol=0)
    biased = rms_group_std(
        RewardMatrix(names=("a", "b"), values=values, groups=groups, prompts=("",) * len(groups))
    )
    torch.testing.assert_close(
        biased / found * scale, torch.full((2,), math.sqrt((size - 1) / size)).double()
    )


def test_the_spread_within_groups_in_numbers():
    values = torch.tensor([[0, 2, 5, 5], [NAN, 1, 2, 8], [3, NAN, NAN, 4], [NAN] * 4]).double()
    found = spread_within(values, torch.tensor([0, 0, 1, 1]))
    # (0, 2) has a squared spread of 2, (5, 5) of 0; a value alone tells nothing; (2, 8) has 18.
    torch.testing.assert_close(found[:2], torch.tensor([1.0, 18.0]).double().sqrt())
    assert found[2:].isnan().all()
    assert spread_within(torch.empty(2, 0).double(), torch.empty(0).long()).isnan().all()


def test_the_spread_within_groups_against_a_loop(zoo):
    found = spread_within(zoo.values, zoo.groups)
    for k, row in enumerate(zoo.values):
        parts = [row[(zoo.groups == group) & ~row.isnan()] for group in zoo.groups.unique()]
        squares = [len(part) * part.var(correction=0) for part in parts if len(part) > 1]
        freedom = sum(len(part) - 1 for part in parts if len(part) > 1)
        expected = math.sqrt(float(sum(squares)) / freedom) if freedom else NAN
        # As in the loop over groups above.
        largest = float(row.nan_to_num(nan=0.0).abs().max())
        assert float(found[k]) == pytest.approx(
            expected, rel=1e-9, abs=largest * 1e-12, nan_ok=True
        )


def test_equal_texts_are_one_prompt():
    assert same_prompt(["b", "a", "b", "c", "a"]).tolist() == [0, 1, 0, 2, 1]
    assert same_prompt([]).tolist() == []


# ---------------------------------------------------------------------- what applies to a part


def mixed(groups: int = 60, size: int = 12) -> RewardMatrix:
    """Four independent objectives, of which only the first applies to every second group."""
    count = groups * size
    values = torch.randn(4, count, generator=torch.Generator().manual_seed(0)).double()
    index = torch.arange(count) // size
    values[1:, index % 2 == 1] = NAN
    prompts = tuple(f"p{i}" for i in index.tolist())
    return RewardMatrix(names=("a", "b", "c", "d"), values=values, groups=index, prompts=prompts)


def test_prompts_weigh_the_same_whatever_applies_to_them():
    """GDPO whitens over the batch, as published: there the others weigh half as much."""
    matrix = mixed()
    few = matrix.groups % 2 == 1
    found = {}
    for kind in (DualStage, GDPO):
        z = final(kind(matrix.names), matrix)
        found[kind] = [float(z[part].square().mean().sqrt()) for part in (few, ~few)]
    assert found[DualStage] == pytest.approx([1.0, 1.0], abs=2e-4)  # 1 / (1 + eps / std)
    # The mean of four has a square of 1/4, but for what 330 samples correlate by chance: that has a
    # standard error of 0.017, and the second number one that is as large. Three of them.
    assert found[GDPO] == pytest.approx([1.6**0.5, 0.4**0.5], abs=0.05)


def test_two_patterns_in_numbers():
    matrix = rewards([[0, 2, 0, 2, 0, 2], [NAN, NAN, 0, 2, 2, 0]], group_size=2)
    # z is -1 or 1; the mean of the last group is 0, as its objectives oppose each other.
    root = 2**0.5
    expected = torch.tensor([-1, 1, -root, root, 0, 0]).double()
    # The second stage divides by 2 ** -0.5, and below by 1.5 ** -0.5, plus an eps of 1e-4.
    torch.testing.assert_close(final(DualStage(["a", "b"]), matrix), expected, rtol=2e-4, atol=0)
    whole = 1.5**0.5  # one spread, the root of 4 / 6, for all
    expected = torch.tensor([-whole, whole, -whole, whole, 0, 0]).double()
    torch.testing.assert_close(final(GDPO(["a", "b"]), matrix), expected, rtol=3e-4, atol=0)


def test_a_group_is_whitened_as_in_a_batch_of_its_like():
    matrix = mixed(groups=6)
    together = final(DualStage(matrix.names, floor=0.0), matrix)
    for parity in (0, 1):
        alike = matrix.groups % 2 == parity
        part = RewardMatrix(
            names=matrix.names,
            values=matrix.values[:, alike],
            groups=matrix.groups[alike],
            prompts=tuple(p for p, chosen in zip(matrix.prompts, alike, strict=True) if chosen),
        )
        assert torch.equal(together[alike], final(DualStage(matrix.names, floor=0.0), part))


def test_a_sample_that_a_head_cannot_judge_makes_no_pattern():
    """By itself it would have a spread of its own, and the advantage -1 or 1 with it."""
    matrix = rewards([[0, 2, 4, 0, 2, 4], [1, 5, 3, 1, 2, NAN]], group_size=3)
    scores = torch.tensor([-1.0, 0.8, 0.2, -1.0, 0.9, 0.1]).double()
    found = DualStage(["a", "b"]).combined(scores, matrix)
    spread = scores.square().mean().sqrt() + 1e-4
    torch.testing.assert_close(found, scores / spread)


def test_moving_average_skips_what_is_unknown():
    average = torch.tensor([1.0, NAN, 1.0, NAN])
    value = torch.tensor([2.0, 2.0, NAN, NAN])
    expected = torch.tensor([1.1, 2.0, 1.0, NAN])
    torch.testing.assert_close(update_ema(average, value, 0.9), expected, equal_nan=True)


def test_whiten():
    two, three = rewards([[0, 2]]), rewards([[7, 7, 7]])
    torch.testing.assert_close(
        whiten(torch.tensor([0.0, 2.0]), two, 1.0), torch.tensor([-0.5, 0.5])
    )
    torch.testing.assert_close(whiten(torch.full((3,), 7.0), three, 1e-4), torch.zeros(3))


def test_whiten_leaves_out_samples_to_which_nothing_applies():
    matrix = rewards([[0, 2, torch.nan, torch.nan]])
    scores = torch.tensor([0.0, 2.0, 0.0, 0.0]).double()
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0]).double()
    torch.testing.assert_close(whiten(scores, matrix, 1e-12), expected)


# ---------------------------------------------------------------------- each one's own numbers


def test_raw_lets_the_largest_spread_decide():
    matrix = rewards([[0, 100, 0, 100], [1, 1, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(
        Raw(NAMES).per_objective(matrix),
        torch.tensor([[-50.0, 50, -50, 50], [0.5, 0.5, -0.5, -0.5], [0] * 4]).double(),
    )
    assert final(Raw(NAMES), matrix).sign().tolist() == [-1, 1, -1, 1]


def test_raw_divides_by_the_spread_of_the_group_or_of_the_batch():
    matrix = rewards([[0, 2, 0, 20]], group_size=2)
    scores = Raw(["a"]).per_objective(matrix)[0]
    by_group = Raw(["a"], eps=1.0).combined(scores, matrix)
    torch.testing.assert_close(by_group, torch.tensor([-1 / 2, 1 / 2, -10 / 11, 10 / 11]).double())
    by_batch = Raw(["a"], std="batch", eps=1e-9).combined(scores, matrix)
    spread = math.sqrt((1 + 100) / 2)
    torch.testing.assert_close(by_batch, torch.tensor([-1, 1, -10, 10]).double() / spread)


def test_gdpo_in_numbers():
    matrix = rewards([[0, 2, 0, 20]], group_size=2)
    normalizer = GDPO(["a"], eps=1.0)
    advantages = normalizer.per_objective(matrix)
    torch.testing.assert_close(
        advantages, torch.tensor([[-1 / 2, 1 / 2, -10 / 11, 10 / 11]]).double()
    )
    scores = torch.tensor([1.0, 3.0, 1.0, 3.0]).double()
    torch.testing.assert_close(
        normalizer.combined(scores, matrix), torch.tensor([-0.5, 0.5, -0.5, 0.5]).double()
    )


def test_dual_stage_floor_in_numbers():
    """Spreads 1 and 0.01; their RMS is 0.70714, so the floor 0.1 is far above the second."""
    matrix = rewards([[0, 2, 0, 0.02]], group_size=2)
    normalizer = DualStage(["a"], floor=0.1, decay=0.9)
    floor = 0.1 * math.sqrt((1 + 1e-4) / 2)
    expected = torch.tensor([[-1, 1, -0.01 / floor, 0.01 / floor]]).double()
    torch.testing.assert_close(normalizer.per_objective(matrix), expected)
    torch.testing.assert_close(
        DualStage(["a"], floor=0.0).per_objective(matrix), torch.tensor([[-1.0, 1, -1, 1]]).double()
    )


def test_dual_stage_averages_the_spread_over_rollouts():
    normalizer = DualStage(["a"], decay=0.9)
    assert normalizer.spread.isnan().all()
    for spread, average in [(1.0, 1.0), (3.0, 1.2), (NAN, 1.2), (0.0, 1.08)]:
        values = [[-spread, spread] if not math.isnan(spread) else [NAN, NAN]]
        normalizer.per_objective(rewards(values, group_size=2))
        assert float(normalizer.spread) == pytest.approx(average)


def test_prompt_history_uses_the_batch_until_a_prompt_is_known():
    normalizer = PromptHistory(["a"], size=4, min_count=4, eps=1e-9)
    first = rewards([[0, 2, 4, 6]], group_size=2)  # two rewards of each prompt: too few
    batch = torch.tensor([0.0, 2, 4, 6]).double()
    torch.testing.assert_close(
        normalizer.per_objective(first)[0], (batch - 3) / batch.std(correction=0)
    )
    second = rewards([[2, 4, 6, 8]], group_size=2)  # now (0, 2, 2, 4) and (4, 6, 6, 8)
    spread = math.sqrt(2)
    torch.testing.assert_close(
        normalizer.per_objective(second)[0], torch.tensor([0, 2, 0, 2]).double() / spread
    )
    third = rewards(
        [[10, 10, NAN, 8]], group_size=2
    )  # forgets (0, 2): (2, 4, 10, 10); (6, 6, 8, 8)
    known = torch.tensor([2.0, 4, 10, 10]).double()
    past = (10 - known.mean()) / known.std(correction=0)
    torch.testing.assert_close(
        normalizer.per_objective(third)[0], torch.tensor([past, past, 0, 1]).double()
    )


def test_prompt_history_keeps_prompts_apart_and_draws_together():
    """Two draws of one prompt share its history although their group ids differ."""
    normalizer = PromptHistory(["a"], size=4, min_count=4, eps=1e-9)
    matrix = RewardMatrix(
        names=("a",),
        values=torch.tensor([[0.0, 2, 4, 6, 100, 104, 100, 104]]).double(),
        groups=torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]),
        prompts=("x",) * 4 + ("y",) * 4,
    )
    advantages = normalizer.per_objective(matrix)[0]
    spread = math.sqrt(5)
    torch.testing.assert_close(
        advantages,
        torch.tensor([-3 / spread, -1 / spread, 1 / spread, 3 / spread, -1, 1, -1, 1]).double(),
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Raw(NAMES, std="rank"), r"`std` should be 'group' or 'batch'. Found 'rank'"),
        (lambda: Raw(NAMES, eps=0.0), "`eps` should be positive. Found 0"),
        (lambda: GDPO(NAMES, eps=-1.0), "`eps` should be positive. Found -1"),
        (lambda: DualStage(NAMES, floor=1.5), r"`floor` should be in \[0, 1\]. Found 1.5"),
        (lambda: DualStage(NAMES, floor=NAN), r"`floor` should be in \[0, 1\]. Found nan"),
        (lambda: DualStage(NAMES, decay=1.0), r"`decay` should be in \[0, 1\). Found 1"),
        (lambda: PromptHistory(NAMES, size=4, min_count=5), r"\[1, size = 4\]. Found 5"),
        (lambda: PromptHistory(NAMES, size=4, min_count=0), r"\[1, size = 4\]. Found 0"),
    ],
)
def test_bad_parameters_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
