"""Weights solved inside the optimizer step: the same step as plain training, and exact Gramians."""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from fixed_objectives import FixedObjectives
from sections import sd3_policy

from benchmarks.pipelines import SMALLEST, random_pipeline
from moa_diffusion.config.schema import GradientsConfig, LossConfig
from moa_diffusion.distributed import Comm, LocalComm
from moa_diffusion.monitoring.progress import Progress
from moa_diffusion.objectives.base import Weighting
from moa_diffusion.objectives.normalize import DualStage
from moa_diffusion.policies.sd3.renoised import RenoisedImages
from moa_diffusion.policies.toy import ToyPolicy
from moa_diffusion.training.critic import Credit
from moa_diffusion.training.ema import EMA
from moa_diffusion.training.fused import FusedUpdate
from moa_diffusion.training.geometry import Geometry
from moa_diffusion.training.loss import Clip, surrogate_coefficients
from moa_diffusion.training.stepper import Stepper, TrainingError
from moa_diffusion.training.steps import RolloutSteps
from moa_diffusion.training.update import Improvement, NoProbe, PlainUpdate, Probe, Scalarization
from moa_diffusion.types import ObjectiveStats, Request, RewardMatrix, Rollout

WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
LR = 100.0  # so that a step is far larger than rounding
PROMPTS = ['a red sign that says "GO"', "a blue circle on a white background"]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return random_pipeline(
        replace(
            SMALLEST,
            transformer={**SMALLEST.transformer, "sample_size": 8, "pos_embed_max_size": 4},
        )
    )


FORWARD = {  # images that are noised again, with pulls to copies or without
    "nft": {"preset": "nft", "draws": 3},
    "awm": {"preset": "awm", "draws": 3, "old": {"weight": 0.5}},
    "ram": {"preset": "ram", "draws": 3},
}


@pytest.fixture(params=["toy", "sd3"])
def policy(request: pytest.FixtureRequest, pipeline: Any) -> Any:
    """One whose rows come from K backward passes, and others from their LoRA layers."""
    if request.param == "toy":
        return ToyPolicy(steps=2)
    forward = FORWARD.get(request.param)
    made = sd3_policy(
        copy.deepcopy(pipeline),
        resolution=16,  # 16 tokens
        steps=4,
        guidance=1.0,
        max_sequence_length=16,
        lora_rank=4,
        step_batch=2,
        **({} if forward is None else {"forward": forward}),
    )
    made.prepare(PROMPTS)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.trainable().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=source))
    return made


def is_forward(policy: Any) -> bool:
    return isinstance(getattr(policy, "_decisions", None), RenoisedImages)


def steps_of(
    policy: Any,
    *,
    micro: int = 4,
    updates: int = 1,
    kl_weight: float = 0.0,
    norm_weight: float = 0.0,
    comm: Comm | None = None,
) -> RolloutSteps:
    comm = comm or LocalComm()
    parameters = list(policy.trainable().values())
    stepper = Stepper(
        policy=policy,
        optimizer=torch.optim.SGD(parameters, lr=LR),  # Adam would hide the step's length
        lr=lambda count: LR,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        ema=EMA(policy.trainable(), decay=0.9, every=1),
        max_grad_norm=1e9,
        max_skipped=3,
    )
    for one in policy.copies.values():  # so that they pull
        for behind in one.values.values():
            behind.mul_(0.5)
    return RolloutSteps(
        policy=policy,
        stepper=stepper,
        geometry=Geometry.solve(
            groups=2,
            group_size=4,
            updates=updates,
            world_size=comm.world_size,
            max_sample_batch=8,
            max_micro_batch=micro,
        ),
        settings=LossConfig(
            kind="forward" if is_forward(policy) else "grpo",
            clip_range=0.05,
            kl_weight=kl_weight,
            norm_weight=norm_weight,
            ratio_tolerance=1e-4,
        ),
        progress=Progress(comm, bars=False),
        seed=0,
    )


def plain(steps: RolloutSteps) -> PlainUpdate:
    return PlainUpdate(steps, NoProbe())


def fused(
    steps: RolloutSteps,
    rollout: Rollout,
    advantages: torch.Tensor,
    solve: Callable[[torch.Tensor], Any] = lambda gramian: WEIGHTS,
    *,
    kl_scale: float = 1.0,
    kl_unit: Callable[[], float] = lambda: 1.0,
) -> Improvement:
    objectives: Any = FixedObjectives(advantages, solve, kl_unit)
    return FusedUpdate(steps).improve(rollout, objectives, kl_scale=kl_scale)


def probe(steps: RolloutSteps, rollout: Rollout, advantages: torch.Tensor, share: float) -> Any:
    return Probe(steps, GradientsConfig(share=share)).measure(rollout, advantages)


def draw(policy: Any) -> tuple[Rollout, torch.Tensor]:
    """Eight samples, and advantages of three objectives ``[3, 8]``."""
    requests = [
        Request(prompt=PROMPTS[i % 2], group=i % 2, sibling=i // 2, seed=i) for i in range(8)
    ]
    source = torch.Generator().manual_seed(0)
    advantages = torch.randn(3, 8, generator=source, dtype=torch.float64)
    return policy.sample(requests, step=0), advantages


def values(policy: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.trainable().values()]).clone()


@pytest.mark.parametrize(
    ("policy", "kl_weight", "micro"),
    [
        *product(["toy", "sd3"], [0.0, 0.5], [2, 8]),
        ("nft", 0.5, 2),
        ("awm", 0.0, 8),
        ("ram", 0.5, 2),
    ],
    indirect=["policy"],
)
def test_on_policy_a_fused_step_is_the_step_on_the_weighted_advantages(
    policy: Any, kl_weight: float, micro: int
) -> None:
    rollout, advantages = draw(policy)
    steps = steps_of(policy, kl_weight=kl_weight)
    before = copy.deepcopy(steps.stepper.state_dict())
    start = values(policy)
    told = plain(steps).descend(rollout, WEIGHTS @ advantages)
    expected = values(policy)

    steps.stepper.load_state_dict(before)
    assert torch.equal(values(policy), start)
    done = fused(steps_of(policy, micro=micro, kl_weight=kl_weight), rollout, advantages)
    found = done.metrics
    assert torch.equal(done.weights, WEIGHTS)
    assert torch.equal(done.advantage, WEIGHTS @ advantages)
    moved = (expected - start).abs().max()
    assert moved > 0
    # Gradients by objective, weighted and summed, or of the sum, whose terms go in another order:
    # some 100 roundings of float32, 6e-8 each, of the step; and the parameter itself is rounded.
    rounding = 2 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (values(policy) - expected).abs().max() < 1e-5 * moved + rounding
    assert found["policy/grad_norm"] == pytest.approx(told["policy/grad_norm"], rel=1e-4)
    if kl_weight:
        assert found["policy/kl"] == pytest.approx(told["policy/kl"], rel=1e-4)


@pytest.mark.parametrize("policy", ["sd3", "nft"], indirect=True)
def test_a_fused_step_holds_the_norm_as_a_plain_one_does(policy: Any) -> None:
    """Also where the KL has no weight; the penalty moves the step."""
    rollout, advantages = draw(policy)
    ends: dict[tuple[float, bool], torch.Tensor] = {}
    before = copy.deepcopy(steps_of(policy).stepper.state_dict())
    for weight, fuse in ((50.0, False), (50.0, True), (0.0, True)):
        steps = steps_of(policy, norm_weight=weight)
        steps.stepper.load_state_dict(before)
        start = values(policy)
        if fuse:
            found = fused(steps, rollout, advantages).metrics
        else:
            found = plain(steps).descend(rollout, WEIGHTS @ advantages)
        assert ("policy/velocity_norm" in found) == (weight > 0)
        assert "policy/kl" not in found
        ends[weight, fuse] = values(policy) - start
    moved = ends[50.0, False].abs().max()
    # As above: the same terms in another order.
    rounding = 2 * torch.finfo(torch.float32).eps * start.abs().max()
    assert (ends[50.0, True] - ends[50.0, False]).abs().max() < 1e-5 * moved + rounding
    assert (ends[0.0, True] - ends[50.0, True]).abs().max() > 0.01 * moved


def test_a_fused_steps_kl_has_the_unit_that_was_settled_with_the_weights(policy: Any) -> None:
    """Half the KL, said before or once the weights are known; powers of two round nothing."""
    rollout, advantages = draw(policy)
    steps = steps_of(policy, updates=2, kl_weight=0.5)
    before = copy.deepcopy(steps.stepper.state_dict())
    settled: list[float] = []

    def solve(gramian: torch.Tensor) -> torch.Tensor:
        settled.append(0.5)
        return WEIGHTS

    found = []
    for options in ({"kl_scale": 0.5}, {"kl_unit": lambda: settled[-1]}, {}):
        steps.stepper.load_state_dict(before)
        settled.clear()
        fused(steps, rollout, advantages, solve, **options)  # type: ignore[arg-type]
        assert len(settled) == 2
        found.append(values(policy))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("policy", ["nft"], indirect=True)
def test_a_fused_steps_pull_has_no_other_unit(policy: Any) -> None:
    """One sum of gradients holds it and the KL's."""
    rollout, advantages = draw(policy)
    with pytest.raises(TrainingError, match=r"^loss: norm_weight and pulls to copies .* unit"):
        fused(steps_of(policy), rollout, advantages, kl_unit=lambda: 0.5)


@pytest.mark.parametrize("policy", ["toy", "sd3", *FORWARD], indirect=True)
def test_the_gramian_is_that_of_separate_backward_passes(policy: Any) -> None:
    """Also what a probe measures on all samples, and in any micro-batch."""
    rollout, advantages = draw(policy)
    optimizer_steps = steps_of(policy)
    parameters = list(policy.trainable().values())
    rows = []
    for advantage in advantages:
        row = torch.zeros(())
        for steps in policy.step_chunks(rollout.log_probs.shape[1]):
            log_probs = policy.log_probs(rollout, steps).log_probs
            total = -(advantage.float()[:, None] * log_probs).sum() / rollout.mask.sum()
            gradients = torch.autograd.grad(total, parameters)
            row = row + torch.cat([gradient.flatten() for gradient in gradients]).double()
        rows.append(row)
    expected = torch.stack(rows) @ torch.stack(rows).T

    seen: list[torch.Tensor] = []
    fused(
        optimizer_steps,
        rollout,
        advantages,
        lambda gramian: seen.append(gramian) or WEIGHTS,  # type: ignore[func-returns-value]
    )
    scale = expected.diagonal().mean()
    # Rows as above: twice as much of a product.
    torch.testing.assert_close(seen[0] / scale, expected / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_probe_of_whole_steps_does_not_depend_on_the_micro_batch(
    policy: Any, share: float
) -> None:
    """And it moves nothing."""
    rollout, advantages = draw(policy)
    before = values(policy)
    found = [
        probe(steps_of(policy, micro=micro, updates=2), rollout, advantages, share)
        for micro in (1, 2, 4)
    ]
    for gramian in found[1:]:
        # Passes of other batches, whose kernels round otherwise: some 100 times 6e-8 of the rows.
        torch.testing.assert_close(gramian, found[0], rtol=1e-4, atol=1e-4 * float(found[0].max()))
    assert torch.equal(values(policy), before)
    assert all(p.grad is None for p in policy.trainable().values())


def test_a_gradient_that_is_not_finite_skips_the_step(policy: Any) -> None:
    rollout, advantages = draw(policy)
    before = values(policy)
    done = fused(
        steps_of(policy), rollout, advantages * float("nan"), lambda gramian: pytest.fail("asked")
    )
    assert done.metrics["policy/skipped_updates"] == 1
    assert done.weights.isfinite().all()
    assert torch.equal(values(policy), before)


def test_after_the_first_step_every_objective_has_its_own_clip() -> None:
    """Coefficients are the derivative of PPO's surrogate, of each objective by itself."""
    source = torch.Generator().manual_seed(0)
    old = torch.randn(6, 4, generator=source)
    new = (old + 0.1 * torch.randn(6, 4, generator=source)).requires_grad_()
    advantages = torch.randn(3, 6, generator=source)
    found = surrogate_coefficients(new, old, advantages, Clip(0.05))
    for k, advantage in enumerate(advantages):
        ratio, gain = (new - old).exp(), -advantage[:, None]
        losses = torch.maximum(gain * ratio, gain * ratio.clamp(1 - 0.05, 1 + 0.05))
        (expected,) = torch.autograd.grad(losses.sum(), new)
        # A few operations in float32: torch's default is 1.3e-6.
        torch.testing.assert_close(found[k], expected)
    assert 0 < (found == 0).float().mean() < 1


def test_a_fused_step_with_a_loss_scale_is_the_same_step(policy: Any) -> None:
    """As float16 has it; the scale comes into being with the first loss."""
    rollout, advantages = draw(policy)
    unscaled = steps_of(policy)
    before = copy.deepcopy(unscaled.stepper.state_dict())
    fused(unscaled, rollout, advantages)
    expected = values(policy)

    unscaled.stepper.load_state_dict(before)
    scaled = steps_of(policy)
    scaled.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=True)
    assert fused(scaled, rollout, advantages).metrics["policy/skipped_updates"] == 0
    # A scale that is a power of two rounds nothing; what is left is below the steps' own rounding.
    torch.testing.assert_close(values(policy), expected, rtol=1e-5, atol=1e-6)


def test_a_probe_takes_the_advantages_as_they_are(policy: Any) -> None:
    """It is on-policy by definition: what rounding makes of the ratio does not count."""
    rollout, advantages = draw(policy)
    expected = probe(steps_of(policy), rollout, advantages, 1.0)
    off = dataclasses.replace(rollout, log_probs=rollout.log_probs + 1.0)
    assert torch.equal(probe(steps_of(policy), off, advantages, 1.0), expected)


class ThreadComm(LocalComm):
    """One of several processes that are threads of this one; sums go round from another start.

    Args:
        rank: of this one.
        posted: what each has posted, by rank; shared.
        barrier: of all; shared.
    """

    def __init__(self, rank: int, posted: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(posted)
        self._posted, self._barrier = posted, barrier

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        self._posted[self.rank] = [tensor.clone() for tensor in tensors]
        self._barrier.wait()
        last_first = self._posted[::-1]
        for i, tensor in enumerate(tensors):
            tensor.copy_(sum((part[i] for part in last_first[1:]), last_first[0][i]))
        self._barrier.wait()


@pytest.mark.parametrize(
    ("policy", "way", "kl_weight"),
    [
        *product(["toy"], ["plain", "fused", "probe"], [0.0, 0.5]),
        ("sd3", "plain", 0.5),
        ("sd3", "fused", 0.5),
        ("sd3", "probe", 0.0),  # it takes the gradients of the objectives alone
        ("nft", "fused", 0.5),
        ("awm", "plain", 0.0),
        ("ram", "fused", 0.5),
    ],
    indirect=["policy"],
)
def test_any_number_of_processes_ends_in_the_same_bits(
    policy: Any, way: str, kl_weight: float
) -> None:
    rollout, advantages = draw(policy)

    def improved(rank: int, comm: LocalComm) -> torch.Tensor:
        mine = copy.deepcopy(policy)
        share = len(rollout) // comm.world_size
        index = torch.arange(rank * share, (rank + 1) * share)
        part, local = rollout.select(index), advantages[:, index]
        steps = steps_of(mine, micro=1, updates=2, kl_weight=kl_weight, comm=comm)
        if way == "plain":
            plain(steps).descend(part, WEIGHTS @ local)
        elif way == "fused":
            fused(steps, part, local, lambda gramian: gramian.diagonal() / gramian.trace())
        else:
            return probe(steps, part, local, 0.75)  # type: ignore[no-any-return]
        return values(mine)

    expected = improved(0, LocalComm())
    for world_size in (2,) if is_forward(policy) else (2, 4):  # those passes are dear
        posted: list[Any] = [None] * world_size
        barrier = threading.Barrier(world_size)
        comms = [ThreadComm(rank, posted, barrier) for rank in range(world_size)]
        with ThreadPoolExecutor(world_size) as threads:
            for found in threads.map(improved, range(world_size), comms):
                assert torch.equal(found, expected)


@pytest.mark.parametrize("policy", ["sd3"], indirect=True)  # the other has no layers
@pytest.mark.parametrize("mode", ["fused", "probe"])
def test_rows_of_another_sample_are_noticed_before_they_are_used(policy: Any, mode: str) -> None:
    """A layer of the image model takes its samples in another order, as it may be written."""
    rollout, advantages = draw(policy)
    taps, layer = policy.tapped(), policy.transformer.transformer_blocks[0].attn.to_v
    product = layer.forward
    layer.forward = lambda x: product(x.roll(1, 0)).roll(-1, 0)
    policy.tapped = lambda: taps
    steps, before = steps_of(policy), values(policy)
    update: Any = FusedUpdate(steps) if mode == "fused" else Probe(steps, GradientsConfig())
    objectives = FixedObjectives(advantages, lambda gramian: WEIGHTS)
    with pytest.raises(TrainingError, match=r"wrong in 2 of .*blocks\.0\.attn\.to_v\.lora_"):
        if mode == "fused":
            update.improve(rollout, objectives)
        else:
            update.measure(rollout, advantages)
    assert torch.equal(values(policy), before)
    layer.forward = product
    update.check(rollout, 4)


# ---------------------------------------------------------------- K advantages to one


class Fixed(Weighting):
    """Answers with the diagonal of the Gramian, or with equal weights; refuses a trace above 9."""

    def forward(self, stats: ObjectiveStats) -> torch.Tensor:
        if stats.gramian is None:
            return torch.ones(len(self.objectives), dtype=torch.float64)
        if stats.gramian.trace() > 9:
            raise ValueError("too steep")
        return stats.gramian.diagonal()

    def kl_scale(self) -> float:
        return 3.0


def scalarization(values: torch.Tensor, *, clip: float = 100.0, step: int = 0) -> Scalarization:
    names = tuple("abc"[: len(values)])
    n = values.shape[1]
    matrix = RewardMatrix(
        names=names,
        values=values,
        groups=torch.arange(n) // 4,
        prompts=tuple(str(i // 4) for i in range(n)),
    )
    normalizer = DualStage(names)
    return Scalarization(
        normalizer=normalizer,
        weighting=Fixed(names),
        comm=LocalComm(),
        step=step,
        credit=Credit(matrix=matrix),
        advantages=normalizer.per_objective(matrix),
        clip=clip,
    )


def random_rewards(seed: int = 0) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(3, 8, generator=source, dtype=torch.float64)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, 1.0, 1.0], r"`Answers` should return a tensor of weights \[3\]\. Found list"),
        (torch.ones(4), r"floating weights \[3\], .* or \[3, 8\]\. Found \[4\]"),
        (torch.ones(3, dtype=torch.int64), r"Found \[3\] of torch.int64"),
        (torch.tensor([1.0, math.nan, 1.0]), r"should return finite weights\. Found nan for b"),
        (torch.full((3, 8), math.inf), r"Found inf for a"),
    ],
)
def test_what_a_weighting_of_ones_own_answers_is_checked(answer: object, message: str) -> None:
    """Not a number would train nothing, silently, and other shapes end far from their cause."""

    class Answers(Weighting):
        def forward(self, stats: ObjectiveStats) -> torch.Tensor:
            return answer  # type: ignore[return-value]

    objectives = scalarization(random_rewards())
    objectives = dataclasses.replace(objectives, weighting=Answers(objectives.names))
    with pytest.raises(TrainingError, match=f"^objectives.weighting: .*{message}"):
        objectives.weigh(None)


def test_a_weight_where_an_objective_never_applies_may_be_anything() -> None:
    rewards = random_rewards()
    rewards[1] = math.nan

    class Answers(Weighting):
        def forward(self, stats: ObjectiveStats) -> torch.Tensor:
            return torch.tensor([1.0, math.nan, 2.0])

    objectives = scalarization(rewards)
    objectives = dataclasses.replace(objectives, weighting=Answers(objectives.names))
    assert objectives.weigh(None).isnan().tolist() == [False, True, False]


def test_rescaled_weights_of_gradients_give_the_combined_advantage() -> None:
    """What stage 2 divides by is a factor of the weights, whatever their own scale."""
    objectives = scalarization(random_rewards())
    weights = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    combined = objectives.combine(weights)
    assert combined.std() > 0.5
    torch.testing.assert_close(objectives.rescaled(weights) @ objectives.advantages, combined)
    torch.testing.assert_close(objectives.rescaled(5 * weights), objectives.rescaled(weights))
    silent = scalarization(torch.ones(3, 8, dtype=torch.float64))
    torch.testing.assert_close(silent.rescaled(weights), weights / 6)  # there is nothing to scale


def test_the_combined_advantage_is_clipped_and_the_objectives_own_is_not() -> None:
    objectives = scalarization(random_rewards(), clip=0.5)
    combined = objectives.combine(torch.ones(3, dtype=torch.float64))
    assert combined.abs().max() == 0.5
    assert objectives.local_advantages().abs().max() > 0.5


def test_what_a_weighting_refuses_ends_the_run_with_its_section() -> None:
    objectives = scalarization(random_rewards())
    assert objectives.weigh(None).tolist() == [1, 1, 1]
    assert objectives.weigh(torch.eye(3).double()).tolist() == [1, 1, 1]
    assert objectives.kl_scale() == 3
    with pytest.raises(TrainingError, match=r"^objectives\.weighting: too steep"):
        objectives.weigh(4 * torch.eye(3).double())


def test_rank_0_answers_for_all() -> None:
    class Second(LocalComm):
        def broadcast_(self, tensor: torch.Tensor) -> None:
            tensor.copy_(torch.tensor([1.0, 0.0, 0.0]))

    objectives = dataclasses.replace(scalarization(random_rewards()), comm=Second())
    assert objectives.weigh(None).tolist() == [1, 0, 0]


def test_a_probe_measures_now_and_then_and_keeps_what_was_finite() -> None:
    policy = ToyPolicy(steps=2)
    rollout, _ = draw(policy)
    probe = Probe(steps_of(policy), GradientsConfig(every=3))
    measured = []

    def measure(*given: Any) -> torch.Tensor:
        measured.append(1)
        return torch.full((3, 3), float("nan")) if len(measured) == 1 else 2 * torch.eye(3)

    probe.measure = measure  # type: ignore[method-assign]
    seen = []
    for step in range(5):
        gramian, metrics = probe(rollout, scalarization(random_rewards(), step=step))
        seen.append((len(measured), float(gramian.trace()), len(metrics)))
    # The first is not finite: the next rollout probes again, and then every third.
    assert seen == [(1, 3, 0), (2, 6, 3), (2, 6, 0), (3, 6, 3), (3, 6, 0)]
    again = Probe(steps_of(policy), GradientsConfig(every=3))
    again.load_state_dict(probe.state_dict())
    assert torch.equal(again.gramian, probe.gramian)
    assert NoProbe()(rollout, scalarization(random_rewards())) == (None, {})


def test_a_plain_update_descends_on_what_it_combined(policy: Any) -> None:
    rollout, _ = draw(policy)
    objectives = scalarization(random_rewards())
    steps = steps_of(policy)
    before = copy.deepcopy(steps.stepper.state_dict())
    done = plain(steps).improve(rollout, objectives)
    moved = values(policy)
    assert torch.equal(done.weights, torch.ones(3, dtype=torch.float64))
    assert torch.equal(done.advantage, objectives.combine(done.weights))
    steps.stepper.load_state_dict(before)
    metrics = plain(steps).descend(rollout, done.advantage)
    assert torch.equal(values(policy), moved)
    assert metrics == done.metrics


def test_a_fused_update_takes_no_weighting_that_looks_at_more_than_the_gramian() -> None:
    from moa_diffusion.training.trainer import Trainer

    parts: Any = dict.fromkeys(("scorer", "sampler", "normalizer", "log"))
    update = FusedUpdate(steps_of(ToyPolicy(steps=2)))
    with pytest.raises(ValueError, match=r"`update` should weigh once per rollout .* for Fixed\."):
        Trainer(update=update, weighting=Fixed(("a",)), rollouts=1, **parts)
