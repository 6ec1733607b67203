"""Weights solved inside the optimizer step: the same step as plain training, and exact Gramians."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from moa_diffusion import tiny
from moa_diffusion.distributed import Comm, LocalComm
from moa_diffusion.policies.sd3 import SD3Policy, load_pipeline
from moa_diffusion.policies.toy import ToyPolicy
from moa_diffusion.training.ema import EMA
from moa_diffusion.training.geometry import Geometry
from moa_diffusion.training.loss import surrogate_coefficients
from moa_diffusion.training.stepper import TrainingError
from moa_diffusion.training.update import Surrogate, Updater
from moa_diffusion.types import Request, Rollout

WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
LR = 100.0  # so that a step is far larger than rounding
PROMPTS = ['a red sign that says "GO"', "a blue circle on a white background"]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline(str(tiny.PIPELINE_PATH))


@pytest.fixture(params=["toy", "sd3"])
def policy(request: pytest.FixtureRequest, pipeline: Any) -> Any:
    """Two policies: one whose rows come from K backward passes, one from its LoRA layers."""
    if request.param == "toy":
        return ToyPolicy(steps=2)
    made = SD3Policy(
        copy.deepcopy(pipeline),
        device=torch.device("cpu"),
        seed=0,
        resolution=64,
        steps=4,
        guidance=1.0,
        max_sequence_length=16,
        lora_rank=4,
        step_batch=2,
    )
    made.prepare(PROMPTS)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.trainable().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=source))
    return made


def updater(
    policy: Any,
    *,
    micro: int = 4,
    updates: int = 1,
    kl_weight: float = 0.0,
    comm: Comm | None = None,
) -> Updater:
    comm = comm or LocalComm()
    parameters = list(policy.trainable().values())
    return Updater(
        policy=policy,
        geometry=Geometry.solve(
            groups=2,
            group_size=4,
            updates=updates,
            world_size=comm.world_size,
            max_sample_batch=8,
            max_micro_batch=micro,
        ),
        comm=comm,
        optimizer=torch.optim.SGD(parameters, lr=LR),  # Adam would hide the step's length
        lr=lambda count: LR,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        ema=EMA(policy.trainable(), decay=0.9, every=1),
        surrogate=Surrogate(
            clip_range=0.05,
            advantage_clip=5.0,
            kl_weight=kl_weight,
            max_grad_norm=1e9,
            ratio_tolerance=1e-4,
            max_skipped=3,
        ),
        seed=0,
        progress=False,
    )


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


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
@pytest.mark.parametrize("micro", [2, 8])
def test_on_policy_a_fused_step_is_the_step_on_the_weighted_advantages(
    policy: Any, kl_weight: float, micro: int
) -> None:
    rollout, advantages = draw(policy)
    plain = updater(policy, kl_weight=kl_weight)
    before = copy.deepcopy(plain.state_dict())
    start = values(policy)
    told = plain(rollout, WEIGHTS @ advantages, step=0)
    expected = values(policy)

    plain.load_state_dict(before)
    assert torch.equal(values(policy), start)
    fused = updater(policy, micro=micro, kl_weight=kl_weight)
    found, weights = fused.fused(rollout, advantages, lambda gramian: WEIGHTS, step=0)
    assert torch.equal(weights, WEIGHTS)
    moved = (expected - start).abs().max()
    assert moved > 0
    # Gradients by objective, weighted and summed, or of the sum, whose terms go in another order:
    # some 100 roundings of float32, 6e-8 each, of the step; and the parameter itself is rounded.
    rounding = 2 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (values(policy) - expected).abs().max() < 1e-5 * moved + rounding
    assert found["policy/grad_norm"] == pytest.approx(told["policy/grad_norm"], rel=1e-4)
    if kl_weight:
        assert found["policy/kl"] == pytest.approx(told["policy/kl"], rel=1e-4)


def test_a_fused_steps_kl_has_the_unit_that_was_settled_with_the_weights(policy: Any) -> None:
    """Half the KL, said before or once the weights are known; powers of two round nothing."""
    rollout, advantages = draw(policy)
    steps = updater(policy, updates=2, kl_weight=0.5)
    before = copy.deepcopy(steps.state_dict())
    settled: list[float] = []

    def solve(gramian: torch.Tensor) -> torch.Tensor:
        settled.append(0.5)
        return WEIGHTS

    found = []
    for options in ({"kl_scale": 0.5}, {"kl_unit": lambda: settled[-1]}, {}):
        steps.load_state_dict(before)
        settled.clear()
        steps.fused(rollout, advantages, solve, step=0, **options)
        assert len(settled) == 2
        found.append(values(policy))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_gramian_is_that_of_separate_backward_passes(policy: Any) -> None:
    """Also what a probe measures on all samples, and in any micro-batch."""
    rollout, advantages = draw(policy)
    parameters = list(policy.trainable().values())
    rows = []
    for advantage in advantages:
        total = torch.zeros(())
        for steps in policy.step_chunks(rollout.log_probs.shape[1]):
            log_probs, _ = policy.log_probs(rollout, steps)
            total = total - (advantage.float()[:, None] * log_probs).sum()
        gradients = torch.autograd.grad(total / rollout.mask.sum(), parameters)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
    expected = torch.stack(rows) @ torch.stack(rows).T

    seen = []
    updater(policy).fused(
        rollout, advantages, lambda gramian: seen.append(gramian) or WEIGHTS, step=0
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
        updater(policy, micro=micro, updates=2).measure(rollout, advantages, step=0, share=share)
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
    found, weights = updater(policy).fused(
        rollout, advantages * float("nan"), lambda gramian: pytest.fail("asked"), step=0
    )
    assert found["policy/skipped_updates"] == 1
    assert weights.isfinite().all()
    assert torch.equal(values(policy), before)


def test_after_the_first_step_every_objective_has_its_own_clip() -> None:
    """Coefficients are the derivative of each objective's own clipped surrogate."""
    from moa_diffusion.training.loss import clipped_surrogate

    source = torch.Generator().manual_seed(0)
    old = torch.randn(6, 4, generator=source)
    new = (old + 0.1 * torch.randn(6, 4, generator=source)).requires_grad_()
    advantages = torch.randn(3, 6, generator=source)
    found = surrogate_coefficients(new, old, advantages, 0.05)
    for k, advantage in enumerate(advantages):
        (expected,) = torch.autograd.grad(clipped_surrogate(new, old, advantage, 0.05).sum(), new)
        # A few operations in float32: torch's default is 1.3e-6.
        torch.testing.assert_close(found[k], expected)
    assert 0 < (found == 0).float().mean() < 1


def test_a_fused_step_with_a_loss_scale_is_the_same_step(policy: Any) -> None:
    """As float16 has it; the scale comes into being with the first loss."""
    rollout, advantages = draw(policy)
    plain = updater(policy)
    before = copy.deepcopy(plain.state_dict())
    plain.fused(rollout, advantages, lambda gramian: WEIGHTS, step=0)
    expected = values(policy)

    plain.load_state_dict(before)
    scaled = updater(policy)
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=True)
    found, _ = scaled.fused(rollout, advantages, lambda gramian: WEIGHTS, step=0)
    assert found["policy/skipped_updates"] == 0
    # A scale that is a power of two rounds nothing; what is left is below the steps' own rounding.
    torch.testing.assert_close(values(policy), expected, rtol=1e-5, atol=1e-6)


def test_a_probe_takes_the_advantages_as_they_are(policy: Any) -> None:
    """It is on-policy by definition: what rounding makes of the ratio does not count."""
    rollout, advantages = draw(policy)
    expected = updater(policy).measure(rollout, advantages, step=0, share=1.0)
    off = dataclasses.replace(rollout, log_probs=rollout.log_probs + 1.0)
    assert torch.equal(updater(policy).measure(off, advantages, step=0, share=1.0), expected)


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


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
@pytest.mark.parametrize("way", ["plain", "fused", "probe"])
def test_any_number_of_processes_ends_in_the_same_bits(
    policy: Any, way: str, kl_weight: float
) -> None:
    rollout, advantages = draw(policy)

    def improved(rank: int, comm: LocalComm) -> torch.Tensor:
        mine = copy.deepcopy(policy)
        share = len(rollout) // comm.world_size
        index = torch.arange(rank * share, (rank + 1) * share)
        part, local = rollout.select(index), advantages[:, index]
        steps = updater(mine, micro=1, updates=2, kl_weight=kl_weight, comm=comm)
        if way == "plain":
            steps(part, WEIGHTS @ local, step=0)
        elif way == "fused":
            steps.fused(part, local, lambda gramian: gramian.diagonal() / gramian.trace(), step=0)
        else:
            return steps.measure(part, local, step=0, share=0.75)
        return values(mine)

    expected = improved(0, LocalComm())
    for world_size in (2, 4):
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
    update, before = updater(policy), values(policy)
    with pytest.raises(TrainingError, match=r"wrong in 2 of .*blocks\.0\.attn\.to_v\.lora_"):
        if mode == "fused":
            update.fused(rollout, advantages, lambda gramian: WEIGHTS, step=0)
        else:
            update.measure(rollout, advantages, step=0, share=0.5)
    assert torch.equal(values(policy), before)
    layer.forward = product
    update.check_gradients(rollout)
