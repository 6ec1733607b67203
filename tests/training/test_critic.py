"""Value heads: estimates by hand, decisions in the samples' place, and that they learn."""

from __future__ import annotations

import math

import pytest
import torch

from moa_diffusion.config.schema import CriticConfig
from moa_diffusion.distributed import LocalComm
from moa_diffusion.objectives.noon import Noon
from moa_diffusion.objectives.normalize import GDPO
from moa_diffusion.training.critic import Critic, gae
from moa_diffusion.types import Request, RewardMatrix, Rollout

NAN = math.nan
D, T = 6, 5


def rollout(n: int = 8, *, seed: int = 0, features: torch.Tensor | None = None) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.arange(n) % T + 1
    return Rollout(
        requests=tuple(Request(prompt=f"p{i // 2}", group=i // 2, sibling=i % 2) for i in range(n)),
        log_probs=torch.zeros(n, T),
        mask=torch.arange(T)[None] < lengths[:, None],
        trace={"features": torch.randn(n, T, D, generator=generator)}
        if features is None
        else {"features": features},
        texts=tuple(str(i) for i in range(n)),
    )


def matrix(values: list[list[float]]) -> RewardMatrix:
    rewards = torch.tensor(values, dtype=torch.float64)
    n = rewards.shape[1]
    return RewardMatrix(
        names=("a", "b")[: len(values)],
        values=rewards,
        groups=torch.arange(n) // 2,
        prompts=tuple(f"p{i // 2}" for i in range(n)),
    )


def critic(batch: int = 4, **changes) -> Critic:
    seed = changes.pop("seed", 0)
    device = torch.device("cpu")
    settings = CriticConfig(**changes)
    return Critic(
        ("a", "b"), settings, width=D, comm=LocalComm(), device=device, seed=seed, batch=batch
    )


def test_estimates_by_hand():
    values = torch.tensor([[[1.0, 2.0, 4.0, 9.0]]]).double()  # the last is behind the end
    mask = torch.tensor([[True, True, True, False]])
    found = gae(values, torch.tensor([[10.0]]).double(), mask, gamma=0.5, lam=0.5)
    last = 10 - 4
    middle = (0.5 * 4 - 2) + 0.25 * last
    first = (0.5 * 2 - 1) + 0.25 * middle
    assert found[0, 0].tolist() == [first, middle, last, 0]


def test_lambda_one_is_the_return_minus_the_value_and_zero_is_one_step():
    values = torch.randn(2, 3, T, generator=torch.Generator().manual_seed(0)).double()
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 5.0]]).double()
    mask = torch.ones(3, T, dtype=torch.bool)
    long = gae(values, rewards, mask, gamma=1, lam=1)
    # Float64, sums of a few terms: torch's default of 1e-7 is far above their rounding.
    torch.testing.assert_close(long, rewards[:, :, None] - values)
    short = gae(values, rewards, mask, gamma=1, lam=0)
    torch.testing.assert_close(short[:, :, :-1], values[:, :, 1:] - values[:, :, :-1])
    torch.testing.assert_close(short[:, :, -1], rewards - values[:, :, -1])


def test_what_does_not_apply_stays_unknown():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rewards = torch.tensor([[NAN, 1.0]]).double()
    found = gae(torch.zeros(1, 2, 3).double(), rewards, mask, gamma=1, lam=0.9)
    assert found[0, 0].isnan().tolist() == [True, True, False]
    assert found[0, 1].tolist() == [1, 0, 0]


def test_decisions_stand_in_the_samples_place():
    drawn, rewards = rollout(), matrix([[float(i) for i in range(8)], [1.0] * 7 + [NAN]])
    credit = critic(epochs=1).assign_credit(drawn, rewards)
    judged, decisions = credit.matrix, int(drawn.mask.sum())
    assert judged.values.shape == (2, decisions)
    assert torch.equal(credit.columns >= 0, drawn.mask)
    assert set(judged.groups.tolist()) == {0}
    assert judged.prompts[0] == "p0"
    assert judged.prompts[-1] == "p3"
    assert judged.values[1].isnan().sum() == drawn.mask[7].sum()
    # The heads say 0 at first, so estimates are of the rewards (GDPO adds 1e-4 to the spread).
    whitened = GDPO(("a", "b")).per_objective(judged)
    assert float(whitened[0].mean()) == pytest.approx(0, abs=1e-9)  # float64
    assert float(whitened[0].std(correction=0)) == pytest.approx(1, rel=1e-3)  # 5e-5 less
    assert (Noon(("a", "b")).per_objective(judged) >= 0).all()


def test_advantages_go_back_to_their_places():
    heads, drawn = critic(), rollout()
    credit = heads.assign_credit(drawn, matrix([[1.0] * 8, [2.0] * 8]))
    numbered = torch.arange(1.0, credit.matrix.values.shape[1] + 1)
    placed = credit.placed(numbered)
    assert torch.equal(placed[drawn.mask], numbered)
    assert (placed[~drawn.mask] == 0).all()


def test_a_sample_may_count_as_a_whole():
    heads, drawn = critic(granularity="sample"), rollout()
    credit = heads.assign_credit(drawn, matrix([[float(i) for i in range(8)], [NAN] * 8]))
    assert credit.matrix.values.shape == (2, 8)
    assert credit.matrix.values[1].isnan().all()
    placed = credit.placed(torch.arange(8.0))
    assert torch.equal(placed, torch.where(drawn.mask, torch.arange(8.0)[:, None], 0.0))
    with pytest.raises(ValueError, match=r"(?s)granularity.*should be 'decision' or 'sample'"):
        critic(granularity="token")


def test_heads_learn_what_features_say_whatever_the_unit_of_a_reward():
    """The reward is a feature; once that is known, nothing is better than expected."""
    small, large = (critic(batch=32, epochs=30, lr=1e-2) for _ in range(2))
    losses, spreads = [], []
    for step in range(12):
        drawn = rollout(32, seed=step)
        features = drawn.trace["features"]
        truth = torch.randn(32, generator=torch.Generator().manual_seed(step + 99))
        features[:, :, 0] = 4 * truth[:, None]
        drawn = rollout(32, features=features)
        found = small.assign_credit(drawn, matrix([truth.tolist(), (-truth).tolist()]))
        other = large.assign_credit(drawn, matrix([(1e4 * truth).tolist(), (-truth).tolist()]))
        values, units = found.matrix.values, torch.tensor([[1e4], [1.0]]).double()
        # Heads in float32 that learned for 360 steps from numbers that are rounded otherwise.
        # Found: 7e-7 apart, and Adam does not grow it by much where it settles.
        torch.testing.assert_close(values, other.matrix.values / units, rtol=1e-4, atol=1e-4)
        losses.append(found.metrics["policy/value_loss"])
        spreads.append(float(values[0].std()))
    assert losses[-1] < 0.25 * losses[0]  # 0.08 of it
    assert spreads[-1] < 0.6 * spreads[0]  # 0.25 of it


def test_state_goes_on_where_it_was_and_the_rate_is_this_runs():
    straight, first = critic(), critic()
    rewards = matrix([[float(i) for i in range(8)], [1.0] * 7 + [NAN]])
    for step in range(2):
        straight.assign_credit(rollout(seed=step), rewards)
    first.assign_credit(rollout(seed=0), rewards)
    second = critic(seed=5, lr=0.5)
    second.load_state_dict(first.state_dict())
    assert second.optimizer.param_groups[0]["lr"] == 0.5
    second.optimizer.param_groups[0]["lr"] = 1e-3
    second.assign_credit(rollout(seed=1), rewards)
    for mine, other in zip(second.heads.parameters(), straight.heads.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(second.mean, straight.mean)


def test_the_seed_decides_and_no_global_generator():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, same, other = critic(), critic(), critic(seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.heads[1].weight, same.heads[1].weight)
    assert not torch.equal(one.heads[1].weight, other.heads[1].weight)
