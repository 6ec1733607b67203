"""Reward heads for images and texts: a small contract, an open registry, and heads that keep it.

>>> from rewards import RewardBatch, create
>>> head = create("colourfulness")
>>> import torch
>>> head(RewardBatch(prompts=["a grey wall"], images=torch.full((1, 3, 64, 64), 0.5)))
tensor([0.])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    "base": ("RewardBatch", "RewardError", "RewardHead", "Scores"),
    "functions": ("FunctionHead",),
    "registry": ("HeadInfo", "available", "create", "register"),
}


def __getattr__(name: str) -> Any:
    """Import a name of this package when it is first asked for, and PyTorch with it."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"rewards.{module}"), name)
    raise AttributeError(f"module `rewards` has no attribute `{name}`")
