"""Rewards with known statistics, calibrated."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moa_diffusion.calibration.describe import calibrate
from moa_diffusion.storage.calibration_file import Calibration
from moa_diffusion.types import RewardMatrix

NAN = math.nan


def matrix(values: Tensor | list[list[float]], size: int = 4) -> RewardMatrix:
    """Objectives ``a``, ``b``, ... on groups of ``size``."""
    values = torch.as_tensor(values, dtype=torch.float64)
    groups = torch.arange(values.shape[1]) // size
    return RewardMatrix(
        names=tuple("abcdef"[: len(values)]),
        values=values,
        groups=groups,
        prompts=tuple(str(group) for group in groups.tolist()),
    )


def calibrated(rewards: RewardMatrix, **options: Any) -> Calibration:
    count = len(rewards.names)
    defaults: dict[str, Any] = {
        "retest": rewards.values,
        "weights": [1.0] * count,
        "milliseconds": [2.0] * count,
        "model": "tiny",
        "seed": 3,
    }
    return calibrate(rewards, **(defaults | options))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
