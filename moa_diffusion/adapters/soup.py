"""Rewarded soups (Rame et al. 2023, https://arxiv.org/abs/2306.04488): weights between runs.

The paper interpolates the weights of models fine-tuned from one base: ``sum_i w_i theta_i`` with
``sum_i w_i = 1``. A LoRA's weights are ``theta + B_i A_i``, so the soup is
``theta + sum_i w_i B_i A_i``. It is again a LoRA, of the sum of the ranks: the A's below each
other, the B's, each times its weight, side by side. Averaging A and B themselves would be cheaper
by a factor in rank, but is another model: it has products of one run's B with another's A, and
two runs that differ by a rotation inside B A alone would not even meet at their common update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moa_diffusion.files.digests import json_digest
from moa_diffusion.policies.adapters import Adapter
from moa_diffusion.types import ConfigError


def mixtures(members: int, points: int) -> list[tuple[float, ...]]:
    """Return weights at even distances, summing to 1, from the last member alone to the first.

    Args:
        members: Number N of models, at least 2.
        points: Number of points along each edge between two of them, ends included, at least 2.

    Raises:
        ConfigError: For fewer than two of either.
    """
    if members < 2:
        raise ConfigError(f"--soup: should name at least two models. Found {members}.")
    if points < 2:
        raise ConfigError(f"--points: should be at least 2, the ends of the soup. Found {points}.")
    whole = points - 1

    def shares(parts: int, left: int) -> list[tuple[int, ...]]:
        if parts == 1:
            return [(left,)]
        return [(i, *rest) for i in range(left + 1) for rest in shares(parts - 1, left - i)]

    return [tuple(share / whole for share in counts) for counts in shares(members, whole)]


def mix(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Return the LoRA whose update is the weighted sum of the others'.

    A member of weight 0 is left out, and one of weight 1 is returned itself, so the ends are exact.

    Args:
        adapters: The N members, of the same base model.
        weights: Weights of the N members.
    """
    parts = [(w, one) for w, one in zip(weights, adapters, strict=True) if w != 0]
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    layers = {}
    for name in dict.fromkeys(name for _, one in parts for name in one.layers):
        pairs = [(w, *one.layers[name]) for w, one in parts if name in one.layers]
        layers[name] = (
            torch.cat([a for _, a, _ in pairs]),  # [sum of ranks, in]
            torch.cat([w * b for w, _, b in pairs], dim=1),  # [out, sum of ranks]
        )
    # Rounded, so that a third written down and a third computed are one soup.
    made_of = sorted((one.digest, round(w, 6)) for w, one in parts)
    return Adapter(layers=layers, digest=json_digest(made_of))
