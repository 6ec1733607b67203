"""Rewards at some step, and what a weighting is shown of them."""

from __future__ import annotations

import torch

from moa_diffusion.objectives.normalize import DualStage
from moa_diffusion.types import ObjectiveStats, RewardMatrix

# Numbers are float64. Where a test gives no tolerance it takes the defaults of pytest (1e-6) and
# torch (1e-7): what is expected is often written in float32, which rounds by 6e-8.
NAMES = ("a", "b", "c")


def stats(rewards: RewardMatrix, step: int = 0) -> ObjectiveStats:
    """What the trainer would show; the Gramian is any positive semi-definite matrix."""
    advantages = DualStage(rewards.names).per_objective(rewards)
    return ObjectiveStats(
        step=step,
        rewards=rewards,
        advantages=advantages,
        gramian=advantages @ advantages.T,
        win_rates=torch.where(rewards.values.isnan(), torch.nan, advantages.sigmoid()),
    )


def rewards_at(step: int) -> RewardMatrix:
    generator = torch.Generator().manual_seed(step)
    return RewardMatrix(
        names=NAMES,
        values=torch.randn(3, 16, generator=generator, dtype=torch.float64),
        groups=torch.arange(16) // 4,
        prompts=("p",) * 16,
    )
