"""The learning rate over a run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moa_diffusion.config.schema import OptimizerConfig


def learning_rate(options: OptimizerConfig, updates: int) -> Callable[[int], float]:
    """Return the learning rate after so many optimizer steps.

    It rises over ``warmup`` steps, the first of which already moves, and then follows the schedule
    of transformers of that name. It depends on the count alone, so that a run goes on with it after
    a resume, also where the run has become longer.

    Args:
        options: The section ``optimizer``.
        updates: Optimizer steps of the whole run; behind them it stays where it ended.
    """
    from transformers import get_scheduler

    falls = get_scheduler(
        options.schedule,
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        num_warmup_steps=0,
        num_training_steps=max(updates - options.warmup, 1),
    ).lr_lambdas[0]

    def rate(count: int) -> float:
        rise = min(1.0, (count + 1) / (options.warmup + 1))
        later = min(max(count - options.warmup, 0), max(updates - options.warmup - 1, 0))
        return options.lr * rise * float(falls(later))

    return rate
