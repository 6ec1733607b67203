"""Rewards of two objectives, in groups of two samples."""

from __future__ import annotations

import math

import torch

from moa_diffusion.types import RewardMatrix

NAN = math.nan


def matrix(values) -> RewardMatrix:
    values = torch.tensor(values).double()
    return RewardMatrix(
        names=("a", "b"),
        values=values,
        groups=torch.arange(values.shape[1]) // 2,
        prompts=("p",) * values.shape[1],
    )
