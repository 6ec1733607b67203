"""Losses along the forward process: how well a velocity matches the way back to an image.

An image ``x`` that a sampler drew is noised again, ``x_t = (1 - t) x + t noise``, as in
pretraining. ``u = noise - x`` is the velocity that leads from there back to it. Where flow matching
regresses the velocity ``v`` towards ``u`` for all images, here an image's advantage A decides how
much, and in which direction::

    loss = -A match(v) + pull(v)

``match`` grows as ``v`` comes closer to ``u``, and stands in the place of log-probabilities. The
pull holds ``v`` to the velocity of the reference, or of copies of the adapter. All losses here are
linear in A, so that advantages, their weights and the gradients of single objectives are what they
are for log-probabilities. Where ``v`` is ``v_old``, the first term's gradient is A times that of a
weighted flow-matching loss, and the pull's is 0.

- ``mse``: ``-mean((v - u)^2)``. With a pull of weight 1 to the reference the gradient is that of
  regression towards ``v_ref + A (u - v)``, held constant: RAM (arXiv 2605.10759; equation as quoted
  in a survey, code not seen).
- ``huber``: ``-(e^p - eps^p) / p`` with ``e = mean((v - u)^2) + eps``, p = 1/4: AWM (arXiv
  2509.25050), times t there.
- ``branches``: DiffusionNFT (arXiv 2509.16117). Its loss is ``5 (r e_plus + (1 - r) e_minus) /
  beta`` with ``r = 1/2 + A / 10``, and ``e`` the squared error of the image that each of ``v_old +-
  beta (v - v_old)`` predicts, over its own mean absolute error. Sorted by A that is ``-A (e_minus -
  e_plus) / (2 beta) + 5 (e_plus + e_minus) / (2 beta)``: the match, and 5 times the pull to old.

All functions are pure, of tensors ``[N, C, H, W]`` and noise levels ``[N]`` in any floating type.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

HUBER_POWER, HUBER_EPS = 0.25, 1e-10  # AWM's
SMALLEST_ERROR = 1e-5  # DiffusionNFT's, of the mean absolute error that it divides by


@dataclass(frozen=True, slots=True)
class Match:
    """What the advantage is multiplied with, and the pull to old that goes with it."""

    score: Tensor  # [N]
    pull: Tensor | None = None  # [N]


def distance(v: Tensor, other: Tensor) -> Tensor:
    """Return the mean squared distance ``[N]`` of velocities."""
    return (v - other).square().flatten(1).mean(1)


def mse(v: Tensor, u: Tensor) -> Match:
    """Return minus the squared distance from the velocity that leads to the image."""
    return Match(-distance(v, u))


def huber(v: Tensor, u: Tensor) -> Match:
    """Return minus a root of the squared distance, which large distances dominate less."""
    error = distance(v, u) + HUBER_EPS
    return Match(-(error**HUBER_POWER - HUBER_EPS**HUBER_POWER) / HUBER_POWER)


def branches(v: Tensor, u: Tensor, v_old: Tensor, t: Tensor, beta: float) -> Match:
    """Return the difference of both sides of ``v_old``, and their sum as the pull to it.

    Args:
        v: Velocity of the policy.
        u: Velocity that leads to the image.
        v_old: Velocity of the old adapter, constant.
        t: Noise levels.
        beta: Distance of the two sides from ``v_old``.
    """

    def error(side: Tensor) -> Tensor:
        scale = (t * (side - u).detach().abs().flatten(1).mean(1)).clamp(min=SMALLEST_ERROR)
        return t.square() * distance(side, u) / scale  # of the image that it predicts

    plus, minus = (error(v_old + sign * beta * (v - v_old)) for sign in (1, -1))
    return Match((minus - plus) / (2 * beta), (plus + minus) / (2 * beta))
