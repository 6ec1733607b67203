"""Losses along the forward process against the papers' formulas, in float64, by autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moa_diffusion.config.presets import PRESETS
from moa_diffusion.config.schema import ForwardConfig, LossConfig, SamplingConfig
from moa_diffusion.policies import matching
from moa_diffusion.policies.sd3.renoised import RenoisedImages
from moa_diffusion.types import Request, Rollout

SHAPE = (2, 3, 3)
N = 4
KL = 0.3


@dataclass(frozen=True, slots=True)
class Case:
    """Velocities ``[n, C, h, w]`` and what they should lead to."""

    x: Tensor  # noisy image
    image: Tensor
    t: Tensor  # [n]
    v: Tensor
    v_old: Tensor
    v_ref: Tensor

    @property
    def u(self) -> Tensor:
        return (self.x - self.image) / self.t[:, None, None, None]


def mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


# ---------------------------------------------------------------- the papers' losses, per decision


def nft(case: Case, A: Tensor, *, beta: float = 1.0, kl: float = KL) -> Tensor:
    """DiffusionNFT's: two predicted images, each over its own error, weighed by r in [0, 1]."""
    r = (A.clamp(-5, 5) / 5 / 2 + 0.5).clamp(0, 1)
    errors = []
    for v in (
        case.v_old + beta * (case.v - case.v_old),
        case.v_old - beta * (case.v - case.v_old),
    ):
        gap = case.x - case.t[:, None, None, None] * v - case.image
        errors.append(mean(gap**2) / mean(gap.abs()).clip(min=1e-5).detach())
    policy = 5 * (r * errors[0] + (1 - r) * errors[1]) / beta
    return policy + kl * mean((case.v - case.v_ref) ** 2)


def awm(case: Case, A: Tensor, *, ema: float = 1.0, kl: float = KL) -> Tensor:
    """AWM's: a clipped surrogate of a generalised Huber loss; its moving average is ``v_old``."""
    error = mean((case.v - case.u) ** 2) + 1e-10
    score = -case.t * (error**0.25 - 1e-10**0.25) / 0.25
    ratio, advantage = (score - score.detach()).exp(), A.clamp(-5, 5) / 5
    surrogate = torch.maximum(-advantage * ratio, -advantage * ratio.clip(0, 2))
    anchors = kl * mean((case.v - case.v_ref) ** 2) + ema * mean((case.v - case.v_old) ** 2)
    return surrogate + anchors


def ram(case: Case, R: Tensor, *, kl: float = 1.0) -> Tensor:
    """RAM's: regression towards a target that holds still."""
    target = case.v_ref + R[:, None, None, None] / kl * (case.u - case.v)
    return kl * mean((case.v - target.detach()) ** 2)


PAPERS: dict[str, Callable[..., Tensor]] = {"nft": nft, "awm": awm, "ram": ram}


def normal(*shape: int, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def random_case(seed: int = 0) -> Case:
    image, noise, *velocities = (normal(N, *SHAPE, seed=10 * seed + i) for i in range(5))
    t = torch.linspace(0.2, 1.0, N, dtype=torch.float64)
    part = t[:, None, None, None]
    v, v_old, v_ref = velocities
    x = (1 - part) * image + part * noise
    return Case(x, image, t, v.requires_grad_(), v_old, v_ref)


def gradient(loss: Tensor, v: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), v, retain_graph=True)[0]


def close(found: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 1e-3
    # Float64, eps 2e-16, of numbers of up to about 10, through some hundred operations.
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- whole presets


class Line:
    """A transformer of one number per element: ``v = x (1 + theta)``; the reference has none."""

    def __init__(self) -> None:
        self.theta = nn.Parameter(normal(*SHAPE, seed=1))
        self.trainable, self.on, self.seen = {"theta": self.theta}, True, []  # type: ignore[var-annotated]

    def __call__(self, x: Tensor, s: Tensor, embeds: Any, guidance: float) -> Tensor:
        self.seen.append((x, s))
        return x * (1 + self.theta) if self.on else x + 0

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.on = False
        yield
        self.on = True


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_loss_is_the_papers(preset: str) -> None:
    """With gradients; the constant between two surrogates' values is the same for all."""
    levels = [i / 10 for i in range(10, 0, -1)]
    schedule: Any = SimpleNamespace(sigma=torch.tensor(levels), sigmas=[*levels, 0.0])
    line: Any = Line()
    images = RenoisedImages(
        line,
        schedule,
        sampling=SamplingConfig(guidance=1.0),
        loss=LossConfig(kind="forward", forward=ForwardConfig(preset=preset)),
        shape=SHAPE,
    )
    (name,) = images.copies or (None,)
    assert name == {"nft": "old", "awm": "average", "ram": None}[preset]
    behind = normal(*SHAPE, seed=2)
    if name is not None:
        images.copies[name].values["theta"].copy_(behind)
    draws = PRESETS[preset].draws
    requests = tuple(Request(prompt="", seed=i) for i in range(N))
    rollout = Rollout(
        requests=requests,
        log_probs=torch.zeros(N, draws),
        mask=torch.ones(N, draws, dtype=torch.bool),
        trace={
            "latents": normal(N, *SHAPE, seed=3),
            "levels": torch.stack([images._times(one.seed) for one in requests]).double(),
        },
        bare=True,
    )
    terms = images.terms(rollout, slice(0, draws), (torch.zeros(0), torch.zeros(0)), with_kl=True)
    A = torch.linspace(-4, 5, N, dtype=torch.float64)
    kl = 1.0 if preset == "ram" else KL
    assert terms.kl is not None
    found = -A[:, None] * terms.log_probs + kl * terms.kl
    if terms.pull is not None:
        found = found + terms.pull

    x, t = line.seen[-1]
    case = Case(
        x,
        rollout.trace["latents"].repeat_interleave(draws, 0),
        t,
        x * (1 + line.theta),
        x * (1 + behind),
        x,
    )
    expected = PAPERS[preset](case, A.repeat_interleave(draws), kl=kl)
    close(gradient(found, line.theta), gradient(expected, line.theta))


# ---------------------------------------------------------------- losses of single decisions


def ours(match: matching.Match, A: Tensor, pull: Tensor) -> Tensor:
    return -A * match.score + pull


def test_two_branches_are_the_papers() -> None:
    """Also in value: its r, both errors and both weights, the pull to the reference."""
    A = torch.linspace(-5, 5, N, dtype=torch.float64)
    for seed, beta in ((0, 1.0), (1, 0.1), (2, 0.7)):
        case = random_case(seed)
        match = matching.branches(case.v, case.u, case.v_old, case.t, beta)
        assert match.pull is not None
        pull = 5 * match.pull + KL * matching.distance(case.v, case.v_ref)
        found, expected = ours(match, A, pull), nft(case, A, beta=beta)
        close(found, expected)
        close(gradient(found, case.v), gradient(expected, case.v))


def test_the_root_is_advantage_weighted_matching() -> None:
    case, A = random_case(), torch.linspace(-5, 5, N, dtype=torch.float64)
    match = matching.huber(case.v, case.u)
    anchors = (case.v_ref, KL), (case.v_old, 1.0)
    pull = sum(weight * matching.distance(case.v, v) for v, weight in anchors)
    found = ours(matching.Match(case.t * match.score), A / 5, pull)  # type: ignore[arg-type]
    close(gradient(found, case.v), gradient(awm(case, A), case.v))


def test_the_square_with_a_pull_to_the_reference_is_regression_towards_it() -> None:
    """RAM; and Advantage Weighted Matching with a square and beta is beta RAM of A / beta."""
    case, A = random_case(), torch.linspace(-2, 2, N, dtype=torch.float64)
    match, pull = matching.mse(case.v, case.u), matching.distance(case.v, case.v_ref)
    close(gradient(ours(match, A, pull), case.v), gradient(ram(case, A), case.v))
    beta = 0.25
    found = gradient(ours(match, A, beta * pull), case.v)
    close(found, beta * gradient(ram(case, A / beta), case.v))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_branches_of_equal_weight_are_regression_towards_a_point(beta: float) -> None:
    """Towards ``v_old + A / (5 beta) (u - v_old)``, up to a constant."""
    case, A = random_case(), torch.linspace(-5, 5, N, dtype=torch.float64)
    # Both sides are as far from u: where one half has v - v_old, the other has its opposite.
    half, gap = normal(2, N, *SHAPE, seed=5)
    v_old = torch.cat([case.v_old, case.v_old], 1)
    v = (v_old + torch.cat([half, -half], 1)).requires_grad_()
    u = v_old + torch.cat([gap, gap], 1)
    match = matching.branches(v, u, v_old, case.t, beta)
    assert match.pull is not None
    found = ours(match, A, 5 * match.pull)

    w = case.t * mean((v_old + beta * (v - v_old) - u).detach().abs())
    target = v_old + (A / (5 * beta))[:, None, None, None] * (u - v_old)
    regression = 5 * beta * case.t**2 / w * mean((v - target) ** 2)
    close(gradient(found, v), gradient(regression, v))
    constant = (5 / beta - A**2 / (5 * beta)) * case.t**2 / w * mean((u - v_old) ** 2)
    close(found, regression + constant)


def test_at_the_old_velocity_the_gradient_is_that_of_flow_matching() -> None:
    """Times A, whatever beta is: beta decides how strong the pull to old is."""
    case, A = random_case(), torch.linspace(-5, 5, N, dtype=torch.float64)
    v = case.v_old.clone().requires_grad_()
    weight = case.t**2 / (case.t * mean((v - case.u).abs())).detach()
    expected = gradient(A * weight * mean((v - case.u) ** 2), v)
    for beta in (0.1, 1.0):
        match = matching.branches(v, case.u, case.v_old, case.t, beta)
        assert match.pull is not None
        close(gradient(ours(match, A, 5 * match.pull), v), expected)
        assert gradient(match.pull, v).abs().max() < 1e-12


@pytest.mark.parametrize("paper", PAPERS)
def test_the_papers_losses_are_linear_in_the_advantage(paper: str) -> None:
    """So the gradient of a weighted advantage is the weighted sum of the objectives' gradients."""
    case, loss = random_case(), PAPERS[paper]
    advantages = normal(3, N, seed=7)
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)

    def without_pull(A: Tensor) -> Tensor:
        pull = gradient(loss(case, torch.zeros_like(A)), case.v)
        return gradient(loss(case, A), case.v) - pull

    expected = sum(w * without_pull(A) for w, A in zip(weights, advantages, strict=True))
    assert isinstance(expected, Tensor)
    close(without_pull(weights @ advantages), expected)


def test_where_nothing_is_left_to_match_gradients_are_finite() -> None:
    """At the image itself, and where the velocity is the right one; in float32."""
    u = normal(N, *SHAPE, seed=0).float()
    for t in (torch.zeros(N), torch.ones(N)):
        v = u.clone().requires_grad_()
        for match in (
            matching.mse(v, u),
            matching.huber(v, u),
            matching.branches(v, u, u, t, 0.1),
        ):
            assert gradient(match.score, v).isfinite().all()
            if match.pull is not None:
                assert gradient(match.pull, v).isfinite().all()
