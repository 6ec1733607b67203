"""PAMA: the closed form against enumeration, the min-norm solver against its own certificate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from moa_diffusion.objectives.base import Weighting, combine
from moa_diffusion.objectives.noon import Noon
from moa_diffusion.objectives.normalize import DualStage
from moa_diffusion.objectives.pama import (
    Pama,
    PamaVector,
    min_norm_scalar,
    min_norm_weights,
    tells_apart,
)
from moa_diffusion.types import ObjectiveStats, RewardMatrix

# Numbers are float64. Where a test gives no tolerance it takes the defaults of pytest (1e-6) and
# torch (1e-7): what is expected is often written in float32, which rounds by 6e-8.
NAN = math.nan
FAMILIES = (
    "normal",
    "positive",
    "negative",
    "noon",
    "uniform",
    "heavy",
    "tiny",
    "scales",
    "integers",
    "equal",
)


def family(name: str, objectives: int, samples: int = 64) -> Tensor:
    """Advantages ``[K, N]`` of one kind."""
    generator = torch.Generator().manual_seed(objectives)
    normal = torch.randn(objectives, samples, generator=generator, dtype=torch.float64)
    powers = torch.arange(objectives)[:, None].double()
    return {
        "normal": normal,
        "positive": normal.abs() + 0.1,
        "negative": -normal.abs() - 0.1,
        "noon": normal.clamp(min=0),
        "uniform": torch.rand(objectives, samples, generator=generator, dtype=torch.float64),
        "heavy": normal**5,
        "tiny": normal * 1e-9,
        "scales": normal * 10.0 ** (2 * powers - 4),
        "integers": normal.round(),
        "equal": normal[:1].expand(objectives, samples).clone(),
    }[name]


def everything(advantages: Tensor) -> Tensor:
    return torch.ones_like(advantages, dtype=torch.bool)


def stats(rewards: RewardMatrix, normalizer: type[Noon] | type[DualStage] = Noon) -> ObjectiveStats:
    advantages = normalizer(rewards.names).per_objective(rewards)
    return ObjectiveStats(step=0, rewards=rewards, advantages=advantages)


def matrix(values: Tensor | list[list[float]], group_size: int = 4) -> RewardMatrix:
    values = torch.as_tensor(values, dtype=torch.float64)
    return RewardMatrix(
        names=tuple(f"r{k}" for k in range(len(values))),
        values=values,
        groups=torch.arange(values.shape[1]) // group_size,
        prompts=("p",) * values.shape[1],
    )


def advantage(weighting: Weighting, shown: ObjectiveStats) -> Tensor:
    """What the weights make of the advantages: ``[N]``."""
    return combine(shown.advantages, weighting(shown), ~shown.rewards.values.isnan())


# ---------------------------------------------------------------------- the scalar problem


def smallest_square(numbers: list[float]) -> float:
    """``min (sum_k c_k A_k)^2`` on the simplex: the hull of scalars is the union of segments."""
    best = min(a * a for a in numbers)
    for a, b in itertools.combinations(numbers, 2):
        if a != b:
            t = min(max(b / (b - a), 0.0), 1.0)  # where t a + (1 - t) b is nearest to 0
            best = min(best, (t * a + (1 - t) * b) ** 2)
    return best


@pytest.mark.parametrize("objectives", range(2, 7))
@pytest.mark.parametrize("name", FAMILIES)
def test_the_closed_form_solves_the_scalar_problem(name, objectives):
    A = family(name, objectives)
    s, c = min_norm_scalar(A, everything(A))
    assert (c >= 0).all()
    torch.testing.assert_close(c.sum(0), torch.ones(A.shape[1]).double())
    # Sums of up to six terms.
    torch.testing.assert_close((c * A).sum(0), s, rtol=1e-12, atol=1e-12 * float(A.abs().max()))
    scale = A.square().mean(0)
    for i, numbers in enumerate(A.T.tolist()):
        # Numbers within a relative 1e-12 are ties to it, and float64 rounds by 1e-16.
        assert abs(float(s[i]) ** 2 - smallest_square(numbers)) <= 1e-9 * float(scale[i])


def test_the_scalar_problem_in_numbers():
    A = torch.tensor(
        [
            [1.0, -3.0, -1.0, 0.0, 2.0, -1.0],
            [2.0, -1.0, 3.0, 0.0, 2.0, -1.0],
            [4.0, -1.0, 1.0, 5.0, 3.0, 3.0],
        ]
    ).double()
    s, c = min_norm_scalar(A, everything(A))
    assert s.tolist() == [1, -1, 0, 0, 2, 0]
    expected = [
        [1, 0, 0.75, 0.5, 0.5, 0.375],
        [0, 0.5, 0.25, 0.5, 0.5, 0.375],
        [0, 0.5, 0, 0, 0, 0.25],
    ]
    torch.testing.assert_close(c, torch.tensor(expected).double())


def test_rounding_does_not_break_a_tie():
    A = torch.tensor([[1.0, -1.0], [1.0 + 1e-15, 1.0]]).double()
    A = torch.cat([A, A[:, 1:] * (1 - 1e-15)], 1)[[0, 1, 0]] * torch.tensor([[1], [1], [1 + 1e-15]])
    _, c = min_norm_scalar(A.double(), everything(A))
    expected = [[1 / 3, 0.25, 0.25], [1 / 3, 0.5, 0.5], [1 / 3, 0.25, 0.25]]
    torch.testing.assert_close(c, torch.tensor(expected, dtype=torch.float64))


def test_only_what_is_valid_takes_part():
    A = torch.tensor([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]]).double()
    valid = torch.tensor([[True, False, False], [True, True, False]])
    s, c = min_norm_scalar(A, valid)
    assert s.tolist() == [1, 3, 0]
    assert c.tolist() == [[1, 0, 0.5], [0, 1, 0.5]]


# ---------------------------------------------------------------------- pama


@pytest.mark.parametrize("normalizer", [Noon, DualStage])
def test_combine_gives_the_closed_form(normalizer, zoo):
    shown = stats(zoo, normalizer)
    s, _ = min_norm_scalar(shown.advantages, tells_apart(shown))
    torch.testing.assert_close(advantage(Pama(zoo.names), shown), s)


def test_with_noon_pama_is_the_minimum_over_what_is_heard(zoo):
    shown = stats(zoo)
    heard = tells_apart(shown)
    lowest = torch.where(heard, shown.advantages, torch.inf).amin(0)
    expected = torch.where(heard.any(0), lowest, 0.0)
    torch.testing.assert_close(advantage(Pama(zoo.names), shown), expected)


@pytest.mark.parametrize("kind", [Pama, PamaVector])
def test_one_objective_has_all_the_weight(kind):
    shown = stats(matrix(family("normal", 1)))
    torch.testing.assert_close(advantage(kind(("r0",)), shown), shown.advantages[0])


@pytest.mark.parametrize("kind", [Pama, PamaVector])
def test_a_duplicated_objective_changes_nothing(kind):
    values = family("normal", 3)
    once, twice = stats(matrix(values)), stats(matrix(values[[0, 1, 2, 1]]))
    before = advantage(kind(once.rewards.names), once)
    after = advantage(kind(twice.rewards.names), twice)
    # The ridge alone, which counts twice: 3e-11 apart.
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-8)
    # A ridge of 1e-10 alone tells how duplicates share, so rounding grows by 1e10, to 1e-6.
    weights = kind(twice.rewards.names)(twice)
    torch.testing.assert_close(weights[1], weights[3], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("missing", [0.3, NAN])
@pytest.mark.parametrize("kind", [Pama, PamaVector])
def test_a_constant_objective_is_left_out(kind, missing):
    values = family("normal", 3)
    values[1] = missing
    three, two = stats(matrix(values)), stats(matrix(values[[0, 2]]))
    torch.testing.assert_close(
        advantage(kind(three.rewards.names), three), advantage(kind(two.rewards.names), two)
    )


def test_an_objective_is_left_out_only_where_it_is_constant():
    shown = stats(matrix([[0, 1, 0, 1, 5, 5, 5, 5], [0, 2, 2, 0, 0, 3, 0, 3]]))
    weights = Pama(("r0", "r1"))(shown)
    assert weights[:, 4:].tolist() == [[0] * 4, [1] * 4]
    expected = torch.tensor([0, 1, 0, 0, 0, 1, 0, 1]).double()
    torch.testing.assert_close(advantage(Pama(("r0", "r1")), shown), expected)


@pytest.mark.parametrize("kind", [Pama, PamaVector])
def test_nothing_to_tell_apart_gives_equal_weights_and_no_advantage(kind):
    shown = stats(matrix(torch.full((3, 8), 0.1)))
    torch.testing.assert_close(
        kind(("r0", "r1", "r2"))(shown).sum(0).max(), torch.tensor(1.0).double()
    )
    assert advantage(kind(("r0", "r1", "r2")), shown).tolist() == [0] * 8


@pytest.mark.parametrize("kind", [Pama, PamaVector])
def test_order_of_objectives_does_not_matter_even_with_ties(kind):
    values = family("integers", 4)
    order = torch.tensor([2, 0, 3, 1])
    one, other = stats(matrix(values)), stats(matrix(values[order]))
    torch.testing.assert_close(
        kind(other.rewards.names)(other), kind(one.rewards.names)(one)[order]
    )


@pytest.mark.parametrize("factor", [1e-6, 1e4])
@pytest.mark.parametrize("kind", [Pama, PamaVector])
def test_rescaling_one_raw_reward_changes_nothing(kind, factor):
    values = family("normal", 3)
    scaled = values * torch.tensor([[1.0], [factor], [1.0]]).double()
    one, other = stats(matrix(values)), stats(matrix(scaled))
    before, after = (
        advantage(kind(one.rewards.names), one),
        advantage(kind(one.rewards.names), other),
    )
    # Nothing has an eps here, so the unit cancels up to rounding.
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------- min-norm weights


def gramians(objectives: int) -> dict[str, Tensor]:
    """Well- and ill-conditioned, singular, repeated and obtuse ones."""
    generator = torch.Generator().manual_seed(objectives)

    def rows(columns: int) -> Tensor:
        return torch.randn(objectives, columns, generator=generator, dtype=torch.float64)

    wide, thin, line = rows(50), rows(2), rows(1)
    scaled = wide * 10.0 ** torch.arange(objectives)[:, None].double()
    repeated = wide[[0, *range(objectives - 1)]]
    around = wide.clone()
    around[-1] = -wide[:-1].mean(0)  # 0 lies in the hull
    near = wide[:1] + 1e-5 * wide
    return {
        name: J @ J.T
        for name, J in {
            "wide": wide,
            "thin": thin,
            "line": line,
            "positive": wide.abs(),
            "noon": wide.clamp(min=0),
            "scaled": scaled,
            "repeated": repeated,
            "around zero": around,
            "nearly equal": near,
            "tiny": wide * 1e-12,
        }.items()
    }


def smallest_norm(G: Tensor) -> float:
    """The least ``c' G c`` on the simplex: for each support, the affine minimum if it is inside."""
    K, best = len(G), math.inf
    for size in range(1, K + 1):
        for support in map(list, itertools.combinations(range(K), size)):
            part = G[support][:, support]
            border = torch.ones(size, 1).double() * part.diagonal().mean()
            system = torch.cat(
                [torch.cat([part, border], 1), torch.cat([border, part[:1, :1] * 0]).T]
            )
            aim = torch.zeros(size + 1).double()
            aim[-1] = border[0, 0]
            y = torch.linalg.lstsq(system, aim[:, None], driver="gelsd").solution[:size, 0]
            if (y >= -1e-12).all() and y.sum() > 0.5:
                y = y.clamp(min=0) / y.clamp(min=0).sum()
                best = min(best, float(y @ part @ y))
    return best


@pytest.mark.parametrize("objectives", range(2, 7))
def test_min_norm_weights_are_optimal(objectives):
    for name, G in gramians(objectives).items():
        c = min_norm_weights(G)
        scale = float(G.diagonal().mean())
        assert (c >= 0).all(), name
        assert float(c.sum()) == pytest.approx(1.0, abs=1e-12), name  # it was divided by it
        norm = float(c @ G @ c)
        # The ridge is 1e-10 of it.
        assert norm <= smallest_norm(G) + 1e-9 * scale, name
        # No direction on the simplex descends: this bounds the distance to any optimum.
        assert norm - float((G @ c).min()) <= 1e-9 * scale, name


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**70])
def test_min_norm_weights_do_not_see_the_scale(scale):
    for name, G in gramians(4).items():
        assert torch.equal(min_norm_weights(G * scale), min_norm_weights(G)), name


def test_min_norm_weights_in_numbers():
    identity = torch.eye(3).double()
    torch.testing.assert_close(min_norm_weights(identity), torch.full((3,), 1 / 3).double())
    lengths = torch.diag(torch.tensor([1.0, 2.0, 4.0]).double())
    expected = torch.tensor([4.0, 2.0, 1.0]).double() / 7
    # The ridge is 1e-10 of each.
    torch.testing.assert_close(min_norm_weights(lengths), expected, rtol=1e-8, atol=0)
    inside = torch.tensor([[1.0, 2.0], [2.0, 9.0]]).double()  # the short one is on the way
    assert min_norm_weights(inside).tolist() == [1, 0]
    assert min_norm_weights(torch.tensor([[3.0]])).tolist() == [1]


def test_min_norm_weights_of_zero_rows():
    G = torch.diag(torch.tensor([1.0, 0.0, 2.0, 0.0]))
    assert min_norm_weights(G).tolist() == [0, 0.5, 0, 0.5]
    assert min_norm_weights(torch.zeros(2, 2)).tolist() == [0.5, 0.5]


def test_min_norm_weights_of_duplicates_share():
    J = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).double()
    expected = torch.tensor([0.25, 0.5, 0.25]).double()
    # Singular but for the ridge of 1e-10, which turns rounding of 1e-16 into 1e-6.
    torch.testing.assert_close(min_norm_weights(J @ J.T), expected, rtol=1e-5, atol=0)


# ---------------------------------------------------------------------- what it learns


def learned(kind: str, seeds: int = 4, updates: int = 150) -> float:
    """Mean gain of the lesser of two rewards; one softmax over six actions per seed."""
    reward = torch.tensor([[0.0, 1.0, 0.2, 0.9, 0.5, 0.1], [1.0, 0.0, 0.3, 0.9, 0.4, 0.2]]).double()
    gain = 0.0
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.zeros(6, dtype=torch.float64)
        for _ in range(updates):
            probabilities = logits.softmax(0)
            actions = torch.multinomial(probabilities, 24, replacement=True, generator=generator)
            shown = stats(matrix(reward[:, actions], group_size=24))
            a = advantage(Pama(("r0", "r1")), shown)  # [N]
            if kind == "batch mean":
                a = min_norm_scalar(shown.advantages.mean(1, keepdim=True), torch.ones(2, 1) > 0)[0]
            score = torch.nn.functional.one_hot(actions, 6) - probabilities  # [N, 6]
            logits += 0.5 * (a[:, None] * score).mean(0)
        gain += float((reward @ logits.softmax(0)).min() - reward.mean(1).min())
    return gain / seeds


def test_pama_learns_and_one_batch_mean_for_all_decisions_does_not():
    """The latter pushes up whatever was sampled: its direction ignores the rewards."""
    assert learned("per sample") > 0.25  # 0.42
    assert abs(learned("batch mean")) < 0.1  # -0.01
