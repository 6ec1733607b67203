"""The policy-gradient surrogate, as a function of ``[N, T]`` log-probabilities.

PPO's clipped objective (Schulman et al., arXiv 1707.06347, eq. 7) as GRPO (arXiv 2402.03300) and
Flow-GRPO (arXiv 2505.05470, eq. 4) use it: one advantage per sample, shared by its decisions.

Deviation: the mean is over all decisions of a minibatch. For images, which all have equally many,
that is the papers' mean. Of texts, GRPO takes the mean over the tokens of a response first and then
over responses; here each token counts the same, so a long response counts more (as in DAPO, arXiv
2503.14476).
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(
    log_probs: Tensor, old_log_probs: Tensor, advantage: Tensor, clip_range: float
) -> Tensor:
    """Return the loss of each decision.

    It is ``max(-A r, -A clip(r, 1 - e, 1 + e))`` with ``r = exp(new - old)``.

    Args:
        log_probs: Log-probs ``[n, t]`` under the policy being trained, with gradient.
        old_log_probs: Log-probs ``[n, t]`` under the policy that sampled.
        advantage: Advantages ``[n]``, or ``[n, t]`` if each decision has its own; constant.
        clip_range: ``e`` > 0. Log-probs averaged over latent dimensions want about 1e-4.

    Returns:
        ``[n, t]``; its mean is minimised.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    advantage = _by_decision(advantage).to(ratio.dtype)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def surrogate_coefficients(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float
) -> Tensor:
    """Return the derivative of ``clipped_surrogate`` by the log-prob, for K sets of advantages.

    It is ``-A r`` where the clip does not act and 0 where it does, so each objective has its own
    clip mask. With it, objective k's gradient is ``sum c_knt grad log p_nt``.

    A weighted sum of these gradients is not the gradient of the clipped surrogate of the weighted
    advantage. Once the ratio of a sample is above ``1 + clip_range``, the objectives that ask for
    more of it are silent, and those that ask for less go on: the sample is pushed down, also where
    the weighted advantage is positive and its own surrogate would leave it alone (below ``1 -
    clip_range`` the other way round). The objectives that oppose a step thus hold it to the clip.

    Args:
        log_probs: Log-probs ``[n, t]`` under the policy being trained; no gradient is kept.
        old_log_probs: Log-probs ``[n, t]`` under the policy that sampled.
        advantages: Advantages ``[K, n]`` of the K objectives.
        clip_range: As for ``clipped_surrogate``.

    Returns:
        ``[K, n, t]``.
    """
    ratio = torch.exp(log_probs.detach() - old_log_probs)
    rows = []
    for advantage in advantages.to(ratio.dtype):
        clipped = clip_fraction(log_probs.detach(), old_log_probs, advantage, clip_range)
        rows.append(torch.where(clipped, 0.0, -advantage[:, None] * ratio))
    return torch.stack(rows)


def clip_fraction(
    log_probs: Tensor, old_log_probs: Tensor, advantage: Tensor, clip_range: float
) -> Tensor:
    """Return which decisions ``[n, t]`` the clip has cut off from the gradient (bool).

    Args:
        log_probs: Log-probs ``[n, t]`` under the policy being trained.
        old_log_probs: Log-probs ``[n, t]`` under the policy that sampled.
        advantage: Advantages ``[n]``, or ``[n, t]`` if each decision has its own.
        clip_range: As for ``clipped_surrogate``.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    sign = _by_decision(advantage).sign()
    return ((sign > 0) & (ratio > 1 + clip_range)) | ((sign < 0) & (ratio < 1 - clip_range))


def _by_decision(advantage: Tensor) -> Tensor:
    return advantage[:, None] if advantage.ndim == 1 else advantage
