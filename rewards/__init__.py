"""Reward heads for images and texts: a small contract, an open registry, and heads that keep it.

>>> from rewards import RewardBatch, create
>>> head = create("colourfulness")
>>> import torch
>>> head(RewardBatch(prompts=["a grey wall"], images=torch.full((1, 3, 64, 64), 0.5)))
tensor([0.])
"""

from rewards.base import RewardBatch, RewardError, RewardHead, Scores
from rewards.functions import FunctionHead
from rewards.registry import HeadInfo, available, create, register

__all__ = [
    "FunctionHead",
    "HeadInfo",
    "RewardBatch",
    "RewardError",
    "RewardHead",
    "Scores",
    "available",
    "create",
    "register",
]
