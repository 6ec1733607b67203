"""Images that are noised again: what is drawn, with which adapter, and what trains it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sections import sd3_policy
from torch import Tensor

from benchmarks.pipelines import SMALLEST, random_pipeline
from moa_diffusion.config.schema import ForwardConfig, LossConfig, SamplingConfig
from moa_diffusion.policies import matching
from moa_diffusion.policies.sd3 import SD3Policy
from moa_diffusion.policies.sd3.renoised import SHIFT, RenoisedImages
from moa_diffusion.types import ConfigError, Request, Rollout

PROMPTS = ['a red sign that says "GO"', "a blue circle on a white background"]
STEPS = 4


@pytest.fixture(scope="module")
def pipeline() -> Any:
    shape = {**SMALLEST.transformer, "sample_size": 8, "pos_embed_max_size": 4}
    return random_pipeline(replace(SMALLEST, transformer=shape))


@pytest.fixture
def make(pipeline: Any) -> Any:
    def build(*, seed: int = 1, **options: Any) -> SD3Policy:
        """A policy away from its start, with copies of where it began."""
        small = {"resolution": 16, "steps": STEPS, "guidance": 1.0, "max_sequence_length": 16}
        policy = sd3_policy(copy.deepcopy(pipeline), **(small | {"lora_rank": 4} | options))
        policy.prepare(PROMPTS)
        disturb(policy, 1)
        for one in policy.copies.values():
            one.restart()
        disturb(policy, 2)
        return policy

    return build


def disturb(policy: Any, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=source))


def requests(count: int) -> list[Request]:
    return [
        Request(prompt=PROMPTS[i % 2], group=i % 2, sibling=i // 2, seed=100 + i)
        for i in range(count)
    ]


class Watched:
    """A transformer that notes what it is asked for."""

    def __init__(self, policy: SD3Policy) -> None:
        self.velocity, self.asked = policy._velocity, []  # type: ignore[var-annotated]
        self.trainable = self.velocity.trainable
        policy._decisions._velocity = self  # type: ignore[attr-defined]

    def __call__(self, x: Tensor, s: Tensor, embeds: Any, guidance: float) -> Tensor:
        self.asked.append((x.detach().clone(), s.clone()))
        return self.velocity(x, s, embeds, guidance)

    @contextmanager
    def reference(self) -> Iterator[None]:
        with self.velocity.reference():
            yield


def images_of(levels: list[float], **forward: Any) -> RenoisedImages:
    """Decisions without a model, whose sampling has these noise levels."""
    velocity: Any = SimpleNamespace(trainable={})
    schedule: Any = SimpleNamespace(sigma=torch.tensor(levels), sigmas=[*levels, 0.0])
    return RenoisedImages(
        velocity,
        schedule,
        sampling=SamplingConfig(guidance=1.0),
        loss=LossConfig(kind="forward", forward=ForwardConfig(**forward)),
        shape=(4, 2, 2),
    )


# ---------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("times", ["grid", "strata", "uniform", "logit_normal"])
def test_draws_depend_on_a_samples_seed_alone(make: Any, times: str) -> None:
    policy = make(forward={"times": times, "draws": 3})
    watched, asked = Watched(policy), requests(8)
    together = policy.sample(asked, step=0)
    pair = policy.sample([asked[5], asked[2]], step=3)
    assert torch.equal(pair.trace["levels"], together.trace["levels"][[5, 2]])
    assert len({tuple(row) for row in together.trace["levels"].tolist()}) > 4
    # Kernels of another batch sum in another order: some products of float32 after each other.
    torch.testing.assert_close(pair.images, together.images[[5, 2]], rtol=0, atol=1e-4)

    watched.asked.clear()
    policy.log_probs(together, slice(0, 3))
    policy.log_probs(together.select(torch.tensor([5, 2])), slice(1, 3))
    (whole, levels), (part, some) = watched.asked
    assert torch.equal(levels.view(8, 3), together.trace["levels"])
    assert torch.equal(some.view(2, 2), together.trace["levels"][[5, 2], 1:])
    assert torch.equal(part.view(2, 2, -1), whole.view(8, 3, -1)[[5, 2], 1:])
    # Each draw has noise of its own, of variance 1.
    s, image = levels[:, None], together.trace["latents"].repeat_interleave(3, 0).flatten(1)
    noise = (whole.flatten(1) - (1 - s) * image) / s
    assert noise.std() == pytest.approx(1, abs=0.1)
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.5


LEVELS = [1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.1]


def test_a_grid_has_each_noise_level_of_sampling_once_at_most() -> None:
    images = images_of(LEVELS, times="grid", draws=5, first=0.35, last=0.95)
    seen = [images._times(seed) for seed in range(100)]
    assert all(len(set(times.tolist())) == 5 for times in seen)
    found = torch.stack(seen).unique(return_counts=True)
    torch.testing.assert_close(found[0], torch.tensor(LEVELS[1:8][::-1]))
    assert found[1].min() > 50  # each in 5 of 7 draws


def test_strata_have_one_noise_level_of_each_part() -> None:
    images = images_of(LEVELS, times="strata", draws=3, first=0.3, last=1.0)  # of nine levels
    seen = torch.stack([images._times(seed) for seed in range(100)])
    for column, part in zip(seen.T, (LEVELS[:3], LEVELS[3:6], LEVELS[6:9]), strict=True):
        torch.testing.assert_close(column.unique(), torch.tensor(part[::-1]))


@pytest.mark.parametrize("draws", [3, 6])
def test_the_last_stratum_ends_with_the_last_noise_level(
    monkeypatch: pytest.MonkeyPatch, draws: int
) -> None:
    """Its number plus the largest below 1 rounds to the next number."""
    images = images_of(LEVELS, times="strata", draws=draws)
    largest = math.nextafter(1.0, 0.0)
    monkeypatch.setattr(
        torch, "rand", lambda count, dtype, **options: torch.full((count,), largest, dtype=dtype)
    )
    assert images._times(0)[-1] == pytest.approx(LEVELS[-1])


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_continuous_noise_levels_are_stratified_within_their_range(times: str) -> None:
    images = images_of(LEVELS, times=times, draws=4, first=0.2, last=0.9)
    seen = torch.stack([images._times(seed) for seed in range(300)]).double()
    place = (seen - 0.2) / 0.7
    if times == "logit_normal":  # back to the quantile
        sigma = place / (SHIFT - (SHIFT - 1) * place)
        place = torch.special.ndtr(sigma.logit())
    edges = torch.arange(4) / 4
    inside = place - edges
    # Of a quarter each; float32 rounds by 6e-8, and the quantile is up to five times as steep.
    assert inside.min() > -1e-6
    assert inside.max() < 0.25 + 1e-6
    assert inside.mean() == pytest.approx(0.125, abs=4 * 0.25 / math.sqrt(12 * 1200))


def test_images_are_drawn_by_the_adapter_that_is_asked_for(make: Any) -> None:
    asked, images = requests(4), {}
    policies = {name: make(forward={"draws_with": name}) for name in ("current", "old")}
    for name, policy in policies.items():
        before = {key: p.detach().clone() for key, p in policy.trainable().items()}
        images[name] = policy.sample(asked, step=0).images
        assert all(torch.equal(p, before[key]) for key, p in policy.trainable().items())
    assert policies["current"].copies == {}
    policy = policies["current"]
    with torch.no_grad():
        for name, values in policies["old"].copies["old"].values.items():
            policy.trainable()[name].copy_(values)
    assert torch.equal(policy.sample(asked, step=0).images, images["old"])
    assert not torch.equal(images["current"], images["old"])
    # Without noise in between: an evaluation of as many steps draws the same.
    torch.testing.assert_close(
        make(forward={}, eval_steps=STEPS, eval_guidance=1.0).generate(asked).outputs,
        images["current"],
    )


# ---------------------------------------------------------------- what it trains


def test_terms_do_not_depend_on_how_draws_are_cut(make: Any) -> None:
    policy = make(forward={"preset": "nft", "draws": 3, "average": {"weight": 0.5}})
    rollout = policy.sample(requests(4), step=0)
    whole = policy.log_probs(rollout, slice(0, 3), with_kl=True)
    for rows in ([0, 1, 2, 3], [3, 1]):
        part = rollout.select(torch.tensor(rows))
        cut = [policy.log_probs(part, slice(i, i + 1), with_kl=True) for i in range(3)]
        for name in ("log_probs", "kl", "pull"):
            found = torch.cat([getattr(terms, name) for terms in cut], dim=1)
            # Kernels of another number of rows: some products of float32 after each other.
            torch.testing.assert_close(found, getattr(whole, name)[rows], rtol=1e-4, atol=1e-6)
            assert found.abs().min() > 0


def test_the_pulls_are_distances_of_velocities(make: Any) -> None:
    """To the reference as ``kl: velocity`` has it; to a copy with its weight."""
    policy = make(forward={"draws": 2, "old": {"weight": 0.5}, "average": {"weight": 2.0}})
    with torch.no_grad():
        for values in policy.copies["average"].values.values():
            values.mul_(1.5)
    watched, rollout = Watched(policy), policy.sample(requests(2), step=0)
    watched.asked.clear()
    terms = policy.log_probs(rollout, slice(0, 2), with_kl=True)
    assert len(watched.asked) == 4
    x, s = watched.asked[-1]
    embeds = tuple(
        part.repeat_interleave(2, 0) for part in policy._embeds([r.prompt for r in requests(2)], 1)
    )
    with torch.no_grad():
        v, others = policy._velocity(x, s, embeds, 1.0), {}
        for name, one in policy.copies.items():
            with one.applied():
                others[name] = policy._velocity(x, s, embeds, 1.0)
        with policy.reference():
            others["reference"] = policy._velocity(x, s, embeds, 1.0)
    gaps = {name: matching.distance(v, other).view(2, 2) for name, other in others.items()}
    step = policy._schedule.deterministic[0:1]
    kl = step.kl(v, others["reference"], "velocity").view(2, 2)
    assert min(gap.min() for gap in gaps.values()) > 1e-6
    torch.testing.assert_close(terms.kl, kl)
    torch.testing.assert_close(terms.pull, 0.5 * gaps["old"] + 2.0 * gaps["average"])


@pytest.mark.parametrize("preset", ["nft", "awm", "ram"])
def test_gradients_reach_the_whole_adapter(make: Any, preset: str) -> None:
    """As far as those of denoising steps do: the last block leaves out what it has of texts."""
    reverse = make()
    steps = reverse.sample(requests(2), step=0)
    parameters = list(reverse.trainable().values())
    found = torch.autograd.grad(reverse.log_probs(steps, slice(0, 2))[0].sum(), parameters)
    reached = [bool(gradient.any()) for gradient in found]
    assert sum(reached) > 0.8 * len(reached)
    policy = make(forward={"preset": preset, "draws": 2})
    rollout = policy.sample(requests(2), step=0)
    terms = policy.log_probs(rollout, slice(0, 2))
    assert (terms.pull is None) == (preset == "ram")
    for part in (terms.log_probs, terms.pull):
        if part is not None:
            found = torch.autograd.grad(
                part.sum(), list(policy.trainable().values()), retain_graph=True
            )
            assert [bool(gradient.any()) for gradient in found] == reached


@pytest.mark.parametrize(
    ("forward", "passes"),
    [
        ({"preset": "nft", "draws": 2}, 2),
        ({"preset": "awm", "draws": 2}, 2),
        ({"preset": "ram"}, 1),
        ({"draws_with": "old"}, 1),  # which draws, and is no anchor
        ({"preset": "awm", "draws": 2, "average": {"weight": 0.0}}, 1),
    ],
)
def test_a_decision_takes_a_pass_and_one_of_each_anchor(
    make: Any, forward: dict[str, Any], passes: int
) -> None:
    policy = make(forward=forward)
    watched, rollout = Watched(policy), policy.sample(requests(1), step=0)
    assert len(watched.asked) == STEPS
    for with_kl in (False, True):
        watched.asked.clear()
        policy.log_probs(rollout, slice(0, 1), with_kl=with_kl)
        assert len(watched.asked) == passes + with_kl


def learned(policy: SD3Policy, rollout: Rollout) -> list[Tensor]:
    """Terms and gradients."""
    terms = policy.log_probs(rollout, slice(0, 2), with_kl=True)
    assert terms.kl is not None
    assert terms.pull is not None
    loss = (terms.kl + terms.pull - terms.log_probs).sum()
    gradients = torch.autograd.grad(loss, list(policy.trainable().values()), materialize_grads=True)
    return [part.detach() for part in (*terms, *gradients) if part is not None]


def test_checkpointing_gives_the_same_numbers(make: Any) -> None:
    """Parameters change places with copies before there is a graph, and not until it is used."""
    forward = {"preset": "nft", "draws": 2}
    plain = make(forward=forward)
    rollout = plain.sample(requests(2), step=0)
    expected = learned(plain, rollout)
    found = learned(make(forward=forward, gradient_checkpointing=True), rollout)
    assert all(map(torch.equal, found, expected))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 2.0}, r"^sampling\.guidance: should be at most 1 .* Found 2\."),
        (
            {"forward": {"preset": "nft"}},
            r"^loss\.forward\.draws: should be at most 4, .* for times grid\. Found 9\.",
        ),
        (
            {"forward": {"times": "strata", "first": 0.8, "draws": 3}},
            r"^loss\.forward\.draws: should be at most 2, .* from 0\.8 to 1, .* Found 3\.",
        ),
        (
            {"forward": {"match": "branches"}},
            r"^loss\.forward\.old\.weight: should be positive for match branches",
        ),
        (
            {"forward": {"first": 0.5, "last": 0.5}},
            r"^loss\.forward\.first: should be less than last, 0\.5\. Found 0\.5\.",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    make: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**({"forward": {}} | options))
