"""Weightings: the suite that each must pass; then how weights are applied and what they cost."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

from moa_diffusion.objectives.apex import Apex
from moa_diffusion.objectives.base import Weighting
from moa_diffusion.objectives.chebyshev import Chebyshev
from moa_diffusion.objectives.gradient import Gradient
from moa_diffusion.objectives.mopo import Mopo
from moa_diffusion.objectives.pama import Pama, PamaVector
from moa_diffusion.objectives.static import Static
from moa_diffusion.types import ObjectiveStats, RewardMatrix
from objective_stats import NAMES, rewards_at, stats

CHOSEN = {"a": 0.2, "b": 0.8, "c": 3.0}


# A new weighting enters the common suite here, by one line.
WEIGHTINGS: dict[str, Callable[[Sequence[str]], Weighting]] = {
    "static_equal": Static,
    "static": lambda names: Static(names, weights=[CHOSEN[name] for name in names]),
    "chebyshev": Chebyshev,
    "mopo": lambda names: Mopo(names, primary="a", bounds={"b": 0.5, "c": 0.52}),
    "mopo_barrier": lambda names: Mopo(names, primary="a", variant="barrier"),
    "pama": Pama,
    "pama_vector": PamaVector,
    **{
        f"gradient_{name}": partial(Gradient, aggregator=name, options=options)
        for name, options in {
            **dict.fromkeys(("upgrad", "mgda", "pcgrad", "alignedmtl", "imtlg", "dualproj")),
            **dict.fromkeys(("config", "random", "mean", "sum")),
            "cagrad": {"c": 0.4},
            "fairgrad": {"alpha": 1.0},
        }.items()
    },
    "apex": lambda names: Apex(names, warmup=1),
    "apex_gradients": lambda names: Apex(names, warmup=1, conflict="gradients"),
    "apex_need": lambda names: Apex(names, warmup=1, potential=0, conflict="off"),
}


@pytest.fixture(params=WEIGHTINGS)
def make(request: pytest.FixtureRequest) -> Callable[[Sequence[str]], Weighting]:
    return WEIGHTINGS[request.param]


@pytest.fixture(scope="module")
def shown(matrices: dict[str, RewardMatrix]) -> dict[str, list[ObjectiveStats]]:
    """What the trainer would show of each matrix in its first rollouts; nothing may change it."""
    return {name: [stats(zoo, step) for step in range(3)] for name, zoo in matrices.items()}


# ---------------------------------------------------------------------- the common suite


def test_weights_are_finite_and_not_all_zero(make, matrices, shown, naming):
    for name, zoo in matrices.items():
        with naming(name):
            weighting = make(zoo.names)
            for found in shown[name]:
                before = found.advantages.clone()
                weights = weighting(found)
                assert weights.shape in {(3,), (3, len(zoo.groups))}
                assert weights.dtype == torch.float64
                assert not weights.requires_grad
                assert weights.isfinite().all()
                assert weights.any()
                assert torch.equal(found.advantages, before)


def test_order_of_objectives_does_not_matter(make, matrices, shown, naming):
    for name, zoo in matrices.items():
        with naming(name):
            order = [2, 0, 1]
            other = RewardMatrix(
                names=tuple(zoo.names[k] for k in order),
                values=zoo.values[order],
                groups=zoo.groups,
                prompts=zoo.prompts,
            )
            torch.testing.assert_close(
                make(other.names)(stats(other)), make(NAMES)(shown[name][0])[order]
            )


def test_order_of_samples_does_not_matter(make, matrices, shown, naming):
    for name, zoo in matrices.items():
        with naming(name):
            order = torch.randperm(len(zoo.groups), generator=torch.Generator().manual_seed(3))
            other = RewardMatrix(
                names=NAMES,
                values=zoo.values[:, order],
                groups=zoo.groups[order],
                prompts=tuple(zoo.prompts[i] for i in order.tolist()),
            )
            weights, moved = make(NAMES)(shown[name][0]), make(NAMES)(stats(other))
            torch.testing.assert_close(moved, weights if weights.ndim == 1 else weights[:, order])


def test_adding_a_constant_to_an_objective_changes_nothing(make, matrices, shown, naming):
    for name, zoo in matrices.items():
        with naming(name):
            shift = torch.tensor([[3.0], [-2.0], [0.5]]) * zoo.values.nan_to_num(0).abs().amax(
                1, keepdim=True
            )
            other = RewardMatrix(
                names=NAMES, values=zoo.values + shift, groups=zoo.groups, prompts=zoo.prompts
            )
            # Rewards that are moved by three times their size round by some 1e-15 of it, and
            # spreads may be a hundredth of the size; where there is none, an eps of 1e-4 keeps it.
            torch.testing.assert_close(
                make(NAMES)(stats(other)), make(NAMES)(shown[name][0]), rtol=1e-6, atol=1e-6
            )


def test_saved_state_continues_identically(make):
    straight, before = make(NAMES), make(NAMES)
    for step in range(3):
        straight(stats(rewards_at(step), step))
        before(stats(rewards_at(step), step))
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    resumed = make(NAMES)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        shown = stats(rewards_at(step), step)
        assert torch.equal(resumed(shown), straight(shown))
