"""The policy-gradient surrogate of ``[N, T]`` log-probabilities, and what holds it back.

PPO's clipped objective (Schulman et al., arXiv 1707.06347, eq. 7) as GRPO (arXiv 2402.03300) and
Flow-GRPO (arXiv 2505.05470, eq. 4) use it: one advantage per sample, shared by its decisions.

Deviation: the mean is over all decisions of a minibatch. For images, which all have equally many,
that is the papers' mean. Of texts, GRPO takes the mean over the tokens of a response first and then
over responses; here each token counts the same, so a long response counts more (as in DAPO, arXiv
2503.14476).

Which decisions the clip takes from the gradient is a choice, as their size is one of the policy:
see ``Clip``. Of images, early steps have log ratios so small that PPO's clip never acts on them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moa_diffusion.config.schema import LossConfig
from moa_diffusion.policies.base import Terms

KL_STEP = 0.2  # share by which the weight of the KL changes per rollout, at most
KL_RANGE = 100  # factor by which it may leave what it began with


@dataclass(frozen=True, slots=True)
class Clip:
    """Which decisions no longer add to the gradient: those that have moved far enough.

    - ``ratio``: a ratio beyond ``1 + range`` where the advantage is positive, below ``1 - range``
      where it is negative (PPO, arXiv 1707.06347, eq. 7).
    - ``normalized``: the same of the ratio that ``samplers.Steps.moved`` normalises, after the idea
      of GRPO-Guard (arXiv 2510.22319); the gradient stays that of the ratio.
    - ``divergence``: a KL of at least ``range`` to the policy that sampled, where the ratio has
      moved as the advantage asks (the mask of Flow-DPPO, arXiv 2606.11025).

    Args:
        range: The distance, positive: of ratios averaged over latent dimensions about 1e-4.
        kind: What is looked at.
    """

    range: float
    kind: Literal["ratio", "normalized", "divergence"] = "ratio"

    def clipped(self, log_ratio: Tensor, advantage: Tensor, moved: Tensor | None = None) -> Tensor:
        """Return which decisions ``[n, t]`` no longer add to the gradient (bool).

        Args:
            log_ratio: New minus old log-probs ``[n, t]``.
            advantage: Advantages ``[n]``, or ``[n, t]`` if each decision has its own.
            moved: What another kind than ``ratio`` measures, ``[n, t]``: see ``Terms``.

        Raises:
            ValueError: If another kind than ``ratio`` is not given what it measures.
        """
        log_ratio, sign = log_ratio.detach(), _by_decision(advantage).sign()
        if self.kind != "ratio":
            if moved is None:
                raise ValueError(
                    f"`Policy.log_probs` should return `moved` where `loss.clip` is {self.kind}."
                )
            if self.kind == "divergence":
                return (moved >= self.range) & (sign * log_ratio > 0)
            log_ratio = moved
        ratio = torch.exp(log_ratio)
        return ((sign > 0) & (ratio > 1 + self.range)) | ((sign < 0) & (ratio < 1 - self.range))


def clipped_surrogate(
    log_probs: Tensor, old_log_probs: Tensor, advantage: Tensor, clipped: Tensor
) -> Tensor:
    """Return the loss of each decision: ``-A r``, ``r = exp(new - old)``, constant where clipped.

    With a ``ratio`` clip its gradient is that of ``max(-A r, -A clip(r, 1 - e, 1 + e))``.

    Args:
        log_probs: Log-probs ``[n, t]`` under the policy being trained, with gradient.
        old_log_probs: Log-probs ``[n, t]`` under the policy that sampled.
        advantage: Advantages ``[n]``, or ``[n, t]`` if each decision has its own; constant.
        clipped: Which decisions are clipped, ``[n, t]`` bool: see ``Clip``.

    Returns:
        ``[n, t]``; its mean is minimised.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    ratio = torch.where(clipped, ratio.detach(), ratio)
    return -_by_decision(advantage).to(ratio.dtype) * ratio


def surrogate_coefficients(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip: Clip,
    moved: Tensor | None = None,
) -> Tensor:
    """Return the derivative of ``clipped_surrogate`` by the log-prob, for K sets of advantages.

    It is ``-A r`` where the clip does not act and 0 where it does, so each objective has its own
    clip mask. With it, objective k's gradient is ``sum c_knt grad log p_nt``.

    A weighted sum of these gradients is not the gradient of the clipped surrogate of the weighted
    advantage. Once the ratio of a sample is above ``1 + range``, the objectives that ask for more
    of it are silent, and those that ask for less go on: the sample is pushed down, also where the
    weighted advantage is positive and its own surrogate would leave it alone (below ``1 - range``
    the other way round). The objectives that oppose a step thus hold it to the clip.

    Args:
        log_probs: Log-probs ``[n, t]`` under the policy being trained; no gradient is kept.
        old_log_probs: Log-probs ``[n, t]`` under the policy that sampled.
        advantages: Advantages ``[K, n]`` of the K objectives.
        clip: Says which decisions are clipped.
        moved: What the clip measures, as ``Clip.clipped`` has it.

    Returns:
        ``[K, n, t]``.
    """
    log_ratio = log_probs.detach() - old_log_probs
    ratio = torch.exp(log_ratio)
    rows = [
        torch.where(clip.clipped(log_ratio, advantage, moved), 0.0, -advantage[:, None] * ratio)
        for advantage in advantages.to(ratio.dtype)
    ]
    return torch.stack(rows)


class ReferencePull:
    """What holds the policy to the reference: the KL, whose weight may follow a target, and a norm.

    The penalty on the norm is NormGuard's (arXiv 2606.27771): training inflates velocities beyond
    the reference's, which spoils images before rewards tell. It acts only where they are longer.
    Only the paper's abstract was read; the form, a squared relative excess, is ours. It is at most
    ``|v - v_ref|^2 / |v_ref|^2``: it lets velocities turn.

    Args:
        settings: The section ``loss``: the weights, and the KL's target.

    Attributes:
        kl_weight: The weight of the KL as it is.
    """

    def __init__(self, settings: LossConfig) -> None:
        self.kl_weight = self._start = settings.kl_weight
        self._target = settings.kl_target
        self._norm_weight = settings.norm_weight
        self.compares = settings.kl_weight > 0 or settings.norm_weight > 0

    def kl(self, terms: Terms) -> Tensor | None:
        """Return the KL ``[n, t]``; None if it has no weight."""
        return terms.kl if self.kl_weight else None

    def penalty(self, terms: Terms) -> Tensor | None:
        """Return the losses ``[n, t]`` that are weighted already: of the norm, and of copies."""
        parts = [] if terms.pull is None else [terms.pull]
        if self._norm_weight:
            if terms.norm is None:
                raise ValueError(
                    "`Policy.log_probs` should return `norm` where `loss.norm_weight` is positive."
                )
            parts.append(self._norm_weight * torch.relu(terms.norm - 1).square())
        return sum(parts[1:], parts[0]) if parts else None

    def follow(self, kl: float) -> None:
        """Change the KL's weight by what a rollout's KL was, equal on every process.

        ``weight <- weight (1 + clip(kl / target - 1, -0.2, 0.2))``: the proportional controller of
        Ziegler et al. (arXiv 1909.08593), whose horizon is one rollout here. It stays within
        ``KL_RANGE`` of what it began with: what takes long to fall takes long to rise again.
        """
        if self._target is not None and math.isfinite(kl):
            weight = self.kl_weight * (1 + min(max(kl / self._target - 1, -KL_STEP), KL_STEP))
            self.kl_weight = min(max(weight, self._start / KL_RANGE), self._start * KL_RANGE)

    def state_dict(self) -> dict[str, Any]:
        """Return the weight of the KL if it follows a target."""
        adapted = {"kl_weight": self.kl_weight, "start": self._start}
        return {} if self._target is None else adapted

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved weight.

        Without a target it is the configuration's, or if that has been changed since.
        """
        if self._target is not None and state.get("start") == self._start:
            self.kl_weight = state["kl_weight"]


def _by_decision(advantage: Tensor) -> Tensor:
    return advantage[:, None] if advantage.ndim == 1 else advantage
