"""Gradient: TorchJD's own answer from the Gramian alone, and what happens around it."""

from __future__ import annotations

import builtins
import itertools
import math
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from moa_diffusion.objectives.gradient import (
    FROM_FACTOR,
    REFUSED,
    SHUFFLED,
    Gradient,
    factor,
    find_aggregator,
)
from moa_diffusion.objectives.pama import min_norm_weights
from moa_diffusion.types import ObjectiveStats, RewardMatrix

aggregation = pytest.importorskip("torchjd.aggregation")

OPTIONS: dict[str, dict[str, Any]] = {"cagrad": {"c": 0.4}, "fairgrad": {"alpha": 1.0}}
NEEDS = {
    "upgrad": ["qpsolvers", "quadprog"],
    "dualproj": ["qpsolvers", "quadprog"],
    "cagrad": ["cvxpy", "clarabel"],
    "fairgrad": ["scipy"],
    "nashmtl": ["cvxpy", "ecos"],
}
METHODS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            any(find_spec(package) is None for package in NEEDS.get(name, ())),
            reason=f"{NEEDS.get(name)} not installed",
        ),
    )
    for name in (
        *("alignedmtl", "cagrad", "config", "dualproj", "fairgrad", "imtlg", "mean"),
        *("mgda", "nashmtl", "pcgrad", "random", "sum", "upgrad"),
    )
]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def make(method: str, objectives: int = 3, **options: Any) -> Gradient:
    names = tuple("abcdefg"[:objectives])
    return Gradient(names, aggregator=method, options=OPTIONS.get(method, {}) | options)


def stats(gramian: Tensor | None, step: int = 0) -> ObjectiveStats:
    objectives = 3 if gramian is None else len(gramian)
    values = torch.zeros(objectives, 4).double()
    rewards = RewardMatrix(
        names=tuple("abcdefg"[:objectives]),
        values=values,
        groups=torch.zeros(4, dtype=torch.int64),
        prompts=("p",) * 4,
    )
    return ObjectiveStats(step=step, rewards=rewards, advantages=values, gramian=gramian)


def jacobian(objectives: int = 3) -> Tensor:
    """Rows: the gradients of K losses of a small net, from K separate backwards."""
    generator = torch.Generator().manual_seed(objectives)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    first, second = normal(8, 5).requires_grad_(), normal(1, 8).requires_grad_()
    output = (normal(16, 5) @ first.T).tanh() @ second.T  # [16, 1]
    sides = 9.0 * (-1.0) ** torch.arange(objectives)  # targets on either side: conflict
    losses = (output - normal(16, objectives) - sides).square().mean(0)  # [K]
    rows = []
    for k in range(objectives):
        first.grad = second.grad = None
        losses[k].backward(retain_graph=True)
        rows.append(torch.cat([first.grad.flatten(), second.grad.flatten()]))
    return torch.stack(rows)


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


# ---------------------------------------------------------------------- against torchjd


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_the_direction_is_torchjds_own_on_the_jacobian(method, objectives):
    J = jacobian(objectives)
    assert (J @ J.T).min() < 0, "no conflict: all methods would agree"
    G = J @ J.T
    options = OPTIONS.get(method, {}) | ({"n_tasks": objectives} if method == "nashmtl" else {})
    reference = find_aggregator(method)(**options)
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # cvxpy on Nash-MTL's problem
        torch.default_generator.manual_seed(7)
        expected = reference(J / G.diagonal().mean().sqrt())
    weights = make(method, objectives)(stats(G, step=7))
    assert weights.shape == (objectives,)
    assert weights.dtype == torch.float64
    # Nash-MTL is iterative, in float32 and to 1e-3. The others' factor of the Gramian is exact to
    # 1e-12, see below, and their answers to some times that.
    tolerance = 1e-3 if method == "nashmtl" else 1e-6
    torch.testing.assert_close(unit(weights @ J), unit(expected), rtol=tolerance, atol=tolerance)


def test_mgda_finds_the_least_norm():
    """TorchJD's Frank-Wolfe stops early unless it is told not to."""
    G = jacobian(4) @ jacobian(4).T
    exact = min_norm_weights(G)
    c = make("mgda", 4, epsilon=1e-9, max_iters=5000)(stats(G))
    least = float(exact @ G @ exact)
    # Frank-Wolfe comes nearer as one over the number of steps: 0.5 % above.
    assert least - 1e-9 <= float(c @ G @ c) <= least * 1.01


def test_upgrad_helps_every_objective():
    J = jacobian(4) * torch.tensor([[1.0], [1.0], [1.0], [5.0]]).double()
    G = J @ J.T
    assert G.sum(1).min() < 0, "the plain sum would do as well"
    # UPGrad's own regularisation is 1e-4; found here is 16, the plain sum has -1136.
    assert (G @ make("upgrad", 4)(stats(G))).min() >= -1e-3 * G.diagonal().mean()


def test_frozen_weights():
    G = torch.tensor([[4.0, -2.0, 0.0], [-2.0, 3.0, 1.0], [0.0, 1.0, 1.0]]).double()
    frozen = {
        "mean": [1 / 3, 1 / 3, 1 / 3],
        "pcgrad": [1.5, 5 / 3, 1.0],
        "dualproj": [1 / 3, 1 / 3, 1 / 3],
    }
    for name, expected in frozen.items():
        weights = torch.tensor(expected, dtype=torch.float64)
        # Float64 from end to end: the numbers are small fractions.
        torch.testing.assert_close(make(name)(stats(G)), weights, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------- around the solve


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_the_scale_of_the_loss_does_not_matter(method, scale):
    G = jacobian() @ jacobian().T
    # Float64 here and below: torch's default of 1e-7 is far above what solvers round, 1e-14.
    torch.testing.assert_close(make(method)(stats(G * scale)), make(method)(stats(G)))


def test_an_objective_without_a_gradient_is_left_out(method):
    J = jacobian(3)
    with_silent = torch.stack([J[0], 0 * J[0], J[1], J[2]])
    weights = make(method, 4)(stats(with_silent @ with_silent.T))
    assert weights[1] == 0
    torch.testing.assert_close(weights[[0, 2, 3]], make(method, 3)(stats(J @ J.T)))


def test_no_gradient_at_all_gives_equal_weights(method):
    assert make(method)(stats(torch.zeros(3, 3))).tolist() == [1 / 3] * 3


def test_one_objective_with_a_gradient(method):
    weights = make(method)(stats(torch.diag(torch.tensor([0.0, 2.0, 0.0]))))
    assert weights[[0, 2]].tolist() == [0, 0]
    assert weights[1] > 0


@pytest.mark.parametrize("name", ["cagrad", "imtlg"])
def test_where_a_method_answers_with_zero_the_direction_is_the_shortest(name):
    if any(find_spec(package) is None for package in NEEDS.get(name, ())):
        pytest.skip("solver not installed")
    up = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
    weighting = make(name, 2)
    weights = weighting(stats(up @ up.T))
    torch.testing.assert_close(weights, torch.full((2,), 0.5).double())
    assert weighting.report() == {"gradient/min_norm_fallback": 1.0}
    weighting(stats(torch.eye(2)))
    assert weighting.report() == {"gradient/min_norm_fallback": 0.0}


def test_the_global_generator_is_left_alone(method):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    make(method)(stats(jacobian() @ jacobian().T))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", SHUFFLED)
def test_shuffled_methods_repeat_themselves_and_change_with_the_rollout(name):
    G = jacobian(4) @ jacobian(4).T
    weighting = make(name, 4)
    first = weighting(stats(G, step=0))
    others = [weighting(stats(G, step=step)) for step in range(1, 8)]
    assert torch.equal(make(name, 4)(stats(G, step=0)), first)
    assert any(not torch.equal(other, first) for other in others)


def test_nothing_is_remembered(method):
    G, other = jacobian() @ jacobian().T, torch.eye(3).double()
    used = make(method)
    used(stats(other))
    assert torch.equal(used(stats(G)), make(method)(stats(G)))
    assert not used.state_dict()


def test_a_preference_follows_its_objective():
    J = jacobian(3)
    silent = torch.stack([J[0], 0 * J[0], J[1], J[2]])
    shorter = make("alignedmtl", 3, pref_vector=[1, 3, 4])(stats(J @ J.T))
    longer = make("alignedmtl", 4, pref_vector=[1, 2, 3, 4])(stats(silent @ silent.T))
    torch.testing.assert_close(longer[[0, 2, 3]], shorter)
    assert not torch.allclose(shorter, make("alignedmtl", 3)(stats(J @ J.T)))


def test_factor():
    for J in (jacobian(4), jacobian(4)[[0, 1, 1, 0]], torch.ones(3, 1).double()):
        G = J @ J.T
        # An eigendecomposition in float64 is exact to some times 1e-16 of the largest.
        torch.testing.assert_close(factor(G) @ factor(G).T, G, rtol=1e-12, atol=1e-12 * G.max())


@pytest.mark.parametrize(
    ("gramian", "message"),
    [(None, "`stats` should have a `gramian`"), (torch.full((3, 3), math.inf), "finite")],
)
def test_a_gramian_that_is_no_use(gramian, message):
    with pytest.raises(ValueError, match=message):
        make("mgda")(stats(gramian))


# ---------------------------------------------------------------------- names and options


@pytest.mark.parametrize("name", ["AlignedMTL", "aligned_mtl", "Aligned-MTL", "aligned mtl"])
def test_names_are_read_in_any_form(name):
    assert Gradient(("a", "b"), aggregator=name).name == "alignedmtl"


def test_every_aggregator_of_torchjd_is_usable_or_refused_with_a_reason():
    for name in aggregation.__all__:
        kind = getattr(aggregation, name)
        concrete = issubclass(kind, aggregation.Aggregator) and "Aggregator" not in name
        if concrete and name.lower() not in REFUSED:
            assert find_aggregator(name) is kind
    assert not set(REFUSED) & set(FROM_FACTOR)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_methods_say_why(name):
    with pytest.raises(ValueError, match=f"Found '{name}', which cannot be used here: it "):
        Gradient(("a", "b"), aggregator=name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("upgrat", {}, r"one of alignedmtl, .* Found 'upgrat', .* Did you mean 'upgrad'\?"),
        ("weighted_aggregator", {}, "is unknown"),
        ("mgda", {"epsilom": 1.0}, r"fit torchjd's MGDA\(epsilon.*'epsilom'"),
        ("mgda", {"epsilon": -1.0}, "epsilon must be positive"),
        ("alignedmtl", {"pref_vector": [1.0]}, r"`pref_vector` per objective .* Found \[1.0\]"),
        ("nashmtl", {"update_weights_every": 5}, "`update_weights_every` at 1, .* Found 5"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        Gradient(("a", "b"), aggregator=name, options=options)


PREFERRING = [one for one in METHODS if one.values[0] in ("alignedmtl", "dualproj", "upgrad")]


@pytest.mark.skipif(find_spec("quadprog") is None, reason="solver not installed")
@pytest.mark.parametrize("seed", range(30))
def test_with_upgrad_a_larger_importance_never_gives_a_smaller_share(seed):
    source = torch.Generator().manual_seed(seed)
    for count in (3, 4):
        J = torch.randn(count, 5, generator=source, dtype=torch.float64)
        shares = []
        for importance in (0.5, 1.0, 2.0, 4.0):
            weights = [1.0, importance, 1.0, 1.0][:count]
            w = Gradient("abcd"[:count], aggregator="upgrad", weights=weights)(stats(J @ J.T))
            shares.append(float(w[1] / w.sum()))
        # Quadratic programs are solved to about 1e-8.
        assert all(b >= a - 1e-6 for a, b in itertools.pairwise(shares)), shares
        assert shares[-1] > shares[0]


@pytest.mark.parametrize("name", PREFERRING)
def test_importances_are_torchjds_preferences(name):
    J = torch.randn(3, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    given = stats(J @ J.T)
    importances = [1.0, 2.0, 5.0]
    found = Gradient("abc", aggregator=name, weights=importances)(given)
    assert torch.equal(found, make(name, pref_vector=importances)(given))
    equal = Gradient("abc", aggregator=name, weights=[3.0, 3.0, 3.0])(given)
    assert torch.equal(equal, make(name)(given))


def test_a_method_without_preferences_says_that_importances_are_not_used(caplog):
    J = torch.randn(2, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    found = Gradient("ab", aggregator="mgda", weights=[1.0, 2.0])(stats(J @ J.T))
    assert torch.equal(found, make("mgda", 2)(stats(J @ J.T)))
    assert "MGDA of torchjd finds its own weights" in caplog.text
    caplog.clear()
    Gradient("ab", aggregator="mgda", weights=[2.0, 2.0])
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ([1.0, 2.0], {"pref_vector": [1.0, 1.0]}, "equal entries where `options` has a `pref_v"),
        ([1.0, -2.0], {}, r"positive finite entry per objective .* Found \[1.0, -2.0\]"),
        ([1.0, 2.0, 3.0], {}, "positive finite entry per objective"),
    ],
)
def test_bad_importances_are_named(weights, options, message):
    with pytest.raises(ValueError, match=message):
        Gradient(("a", "b"), aggregator="alignedmtl", weights=weights, options=options)


@pytest.mark.skipif(find_spec("clarabel") is None, reason="solver not installed")
def test_a_missing_option_is_named():
    with pytest.raises(ValueError, match=r"torchjd's CAGrad\(c: float.* argument: 'c'"):
        Gradient(("a", "b"), aggregator="cagrad")


def test_without_torchjd_the_install_line_is_given(monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "torchjd"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ImportError, match=r'pip install "moa-diffusion\[gradient\]"'):
        Gradient(("a", "b"))


def test_without_a_solver_the_packages_are_named(monkeypatch):
    found = sys.modules["torchjd._mixins"].find_spec

    def without(name: str) -> object:
        return None if name == "quadprog" else found(name)

    monkeypatch.setattr("torchjd._mixins.find_spec", without)
    with pytest.raises(ImportError, match=r"'quadprog'.*pip install \"moa-diffusion\[gradient\]\""):
        Gradient(("a", "b"))


def test_the_package_loads_without_torchjd(monkeypatch):
    real = builtins.__import__

    def without(name: str, *rest: Any) -> object:
        assert not name.startswith("torchjd"), "imported at module level"
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "moa_diffusion.objectives.gradient")
    monkeypatch.setattr(builtins, "__import__", without)
    __import__("moa_diffusion.objectives.gradient")


# ---------------------------------------------------------------------- it improves


def test_two_objectives_of_very_different_scale_both_improve():
    """Ascent on -|x - p|^2 and -1e3 |x - q|^2: the plain sum would go to q alone."""
    p, q = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    aims: Sequence[tuple[float, Tensor]] = ((1.0, p), (1e3, q))
    x, weighting = torch.zeros(2).double(), make("imtlg", 2)
    for _ in range(200):
        J = torch.stack([-2 * scale * (x - aim) for scale, aim in aims])
        x = x + 0.02 * unit(weighting(stats(J @ J.T)) @ J)
        if (x - (p + q) / 2).norm() < 0.03:
            break
    torch.testing.assert_close(x, (p + q) / 2, atol=0.03, rtol=0)  # steps are 0.02 long
