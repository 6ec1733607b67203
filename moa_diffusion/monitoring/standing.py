"""Where each reward stands: before training, now, and the gain in between with its uncertainty."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moa_diffusion.statistics.bootstrap import Estimate, means_over_prompts
from moa_diffusion.statistics.groups import mean_and_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One reward in the last evaluation; NaN where nothing is known.

    Gains are in the unit of ``eval_gain``: the start's spread within a prompt.
    """

    name: str
    trained: bool  # whether it is an objective, and not only watched
    base: float  # mean before training, in the reward's unit
    now: float  # mean in the last evaluation, in the reward's unit
    gain: float
    error: float  # standard error of the gain, over prompts
    interval: Estimate  # of the gain, over prompts


def standings(
    names: Sequence[str],
    trained: Collection[str],
    *,
    base: Tensor,
    unit: Tensor,
    start: Tensor,
    latest: Tensor,
    prompts: Tensor,
) -> tuple[Standing, ...]:
    """Compare an evaluation with the one before training, sample by sample.

    Args:
        names: Names of the K rewards.
        trained: Those of them that are trained on.
        base: Means before training, ``[K]``.
        unit: The start's spread within a prompt, ``[K]``.
        start: Rewards before training, ``[K, M]``; NaN where one does not apply.
        latest: Rewards now, ``[K, M]``, of the same prompts and seeds.
        prompts: Prompt of each sample, ``[M]`` int64, equal for equal texts.
    """
    unit = torch.where(unit > 0, unit, torch.nan)
    now = latest.nanmean(1)  # [K]
    gains = (now - base) / unit
    changes = (latest - start) / unit[:, None]  # [K, M]
    intervals = means_over_prompts(changes.numpy(), prompts.numpy())
    return tuple(
        Standing(
            name=name,
            trained=name in trained,
            base=float(base[k]),
            now=float(now[k]),
            gain=float(gains[k]),
            error=mean_and_error(changes[k], prompts)[1],
            interval=intervals[k],
        )
        for k, name in enumerate(names)
    )
