"""Noon ("no negative"), the normalisation of PAMA (arXiv 2508.07768), carried over to GRPO.

Noon PPO keeps only the advantages that say "do this more often"::

    A_ki = max(A'_ki, 0),   A'_ki = (r_ki - m_kg) / (s_kg + eps)

Then the clipped surrogate ``min(u A, clip(u, 1 - e, 1 + e) A)`` equals ``A min(u, 1 + e)``: the
lower clip never acts. PAMA's scalar problem becomes ``s* = min_k A_ki`` (see ``pama.py``).

Deviations: an adaptation. PAMA whitens generalised advantage estimates of one value head per
objective; here ``A'`` is GRPO's group z-score, as in GDPO's first stage, without any value head.
Stage 2, ``match_rms``, is not in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moa_diffusion.objectives.base import Normalizer, combine
from moa_diffusion.statistics.groups import group_centred
from moa_diffusion.types import RewardMatrix


class Noon(Normalizer):
    """Group z-score per objective, clamped at 0; the weighted mean is left as it is.

    A minimum over K objectives is far smaller than their mean, and the step with it: for
    independent objectives in groups of 24 its RMS is 0.43, 0.27, 0.18, 0.07 of that of the mean
    z-score, for K = 2, 3, 4, 6. ``match_rms`` undoes this up to the clamp. The whole batch is
    scaled by one factor, so that what one sample counts relative to another stays; prompts to which
    fewer objectives apply weigh more, by these numbers.

    Nothing is remembered between the two stages: stage 1 depends on the rewards alone, so stage 2
    computes it again.

    Args:
        objectives: Names of the K objectives.
        eps: Number that is added to each spread, in the objective's own unit, at least 0; anything
            but 0 favours rewards of small numbers in the minimum.
        match_rms: Whether the weighted mean is scaled so that its RMS over the batch is that of the
            plain mean over the objectives that apply, of the same clamped advantages.
    """

    def __init__(
        self, objectives: Sequence[str], *, eps: float = 0.0, match_rms: bool = False
    ) -> None:
        super().__init__(objectives)
        if not eps >= 0:
            raise ValueError(f"Parameter `eps` should be at least 0. Found {eps}.")
        self.eps, self.match_rms = eps, match_rms

    def per_objective(self, rewards: RewardMatrix) -> Tensor:
        """Return each reward's z-score in its group where it is positive, else 0."""
        centred, std = group_centred(rewards)  # [K, N], exactly 0 for NaN and without spread
        scale = std + self.eps
        return (centred / torch.where(scale > 0, scale, 1.0)).clamp(min=0)

    def combined(self, advantage: Tensor, rewards: RewardMatrix) -> Tensor:
        """Return the weighted mean, with ``match_rms`` at the RMS that equal weights would give."""
        if not self.match_rms:
            return advantage
        applies = ~torch.isnan(rewards.values)  # [K, N]
        equal = advantage.new_ones(len(self.objectives))  # [K]
        target = _rms(combine(self.per_objective(rewards), equal, applies))
        own = _rms(advantage)
        return advantage * (target / torch.where(own > 0, own, 1.0))


def _rms(values: Tensor) -> Tensor:
    """Return the root mean square of ``[N]``.

    Values are scaled first, so that tiny ones do not underflow.
    """
    largest = values.abs().amax() if len(values) else values.new_zeros(())
    scale = torch.where(largest > 0, largest, 1.0)
    return scale * (values / scale).square().mean().sqrt()
