"""MOPO's closed form and its dual (arXiv 2505.10892), for responses that are already there.

Win rates ``pbar`` (primary) and ``qbar_k`` (secondary) of each response against a fixed opponent::

    max_pi  E_pi pbar - tau KL(pi || ref)   subject to   E_pi qbar_k >= b_k

For fixed multipliers the optimum tilts the reference, ``pi = rho ref``, and the multipliers follow
the violation::

    rho(x, y) = exp((pbar + lambda . qbar) / tau - log Z(x)),   Z(x) = E_{y ~ ref} exp(...)
    G_k       = E_{x, y ~ ref} rho qbar_k
    lambda_k <- [lambda_k + eta (b_k - G_k)]_+

Axes: ``[K, P, Y]`` is secondary objectives, prompts, responses of a prompt.

Deviations: reconstructed from descriptions of the paper, without its code. ``rho`` is normalised
per prompt; the published form has a constant -1 in place of ``log Z(x)``, with which a bound on
``G`` need not bind. A cap on ``lambda`` and on ``log rho`` is ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tilt(
    pbar: Tensor,
    qbar: Tensor,
    lambdas: Tensor,
    tau: float,
    log_ref: Tensor,
    *,
    log_cap: float = math.inf,
) -> Tensor:
    """Density of the optimal policy over the reference: ``rho [P, Y]``.

    Args:
        pbar: ``[P, Y]`` win rates of the primary objective.
        qbar: ``[K, P, Y]`` of the secondary ones.
        lambdas: ``[K]`` non-negative.
        tau: weight of the KL, positive.
        log_ref: ``[P, Y]``, each row the logarithm of a distribution: ``-log Y`` for responses
            that were sampled from the reference, ``-inf`` for padding.
        log_cap: largest ``log rho``. Below infinity the rows need not average 1.
    """
    if not tau > 0:
        raise ValueError(f"Parameter `tau` should be positive. Found {tau}.")
    score = (pbar + torch.einsum("k,kpy->py", lambdas, qbar)) / tau  # [P, Y]
    log_z = (score + log_ref).logsumexp(1, keepdim=True)  # [P, 1]
    return (score - log_z).clamp(max=log_cap).exp()


def constraint_levels(rho: Tensor, qbar: Tensor, log_ref: Tensor) -> Tensor:
    """``G_k``, the mean win rate of the tilted policy: ``[K]``.

    Args:
        rho: ``[P, Y]``.
        qbar: ``[K, P, Y]``.
        log_ref: ``[P, Y]``.
    """
    return (log_ref.exp() * rho * qbar).sum(2).mean(1)


def pessimistic(rho: Tensor, qbar: Tensor, log_ref: Tensor, eps: float) -> Tensor:
    """The smallest ``G_k`` over all data distributions within KL ``eps`` of this one: ``[K]``.

    That is ``max_chi -chi log E_ref exp(-rho qbar_k / chi) - chi eps`` over ``chi > 0``. With
    ``f = rho qbar`` the worst distribution is ``~ ref exp(-f / chi)``; its KL falls with ``chi``,
    which is found by bisection.

    Args:
        rho: ``[P, Y]``.
        qbar: ``[K, P, Y]``.
        log_ref: ``[P, Y]``.
        eps: radius of the ball in nats; 0 gives ``constraint_levels``.
    """
    if not 0 <= eps < math.inf:
        raise ValueError(f"Parameter `eps` should be finite and not negative. Found {eps}.")
    if eps == 0:
        return constraint_levels(rho, qbar, log_ref)
    log_p = (log_ref - math.log(len(log_ref))).flatten()  # [P Y], over prompts and responses
    possible = log_p > -math.inf
    log_p, f = log_p[possible], (rho * qbar).flatten(1)[:, possible]  # [J], [K, J]
    spread = f.amax(1) - f.amin(1)  # [K]
    spread = torch.where(spread > 0, spread, 1.0)

    def worst(log_chi: Tensor) -> Tensor:  # log-probabilities [K, J]
        return (log_p - f / (spread * log_chi.exp())[:, None]).log_softmax(1)

    low, high = torch.full_like(spread, -12.0), torch.full_like(spread, 12.0)  # of log chi/spread
    for _ in range(60):
        middle = (low + high) / 2
        log_q = worst(middle)
        outside = (log_q.exp() * (log_q - log_p)).sum(1) > eps
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    return (worst(high).exp() * f).sum(1)


def dual_step(
    lambdas: Tensor, levels: Tensor, bounds: Tensor, eta: float, maximum: float = math.inf
) -> Tensor:
    """``[lambda + eta (b - G)]_+``, at most ``maximum``: ``[K]`` from three ``[K]``."""
    return (lambdas + eta * (bounds - levels)).clamp(0.0, maximum)


def barrier(levels: Tensor, bounds: Tensor, sigma: float, maximum: float) -> Tensor:
    """Multipliers of MOPO-LB, the logarithmic barrier ``sigma log(G - b)``: ``[K]``.

    ``sigma / (G - b)``, at most ``maximum``, which is also the answer at the bound and below it.
    """
    slack = levels - bounds
    inside = sigma / torch.where(slack > 0, slack, 1.0)
    return torch.where(slack > 0, inside, maximum).clamp(max=maximum)
