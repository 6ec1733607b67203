"""Whether offline MOPO's bounds can be kept at all, found out before anything is trained.

A bound is out of reach if no multipliers up to the largest bring the objective's level up to it. A
level of the mean rises with its own multiplier. A pessimistic one need not: the tilt that favours
an objective also widens ``rho q``, and the worst case of a wide distribution is far below its mean
(``mopo_offline.py``), so that the largest level lies at some multiplier in between.

Bounds that can be kept one by one may still exclude each other. For weights ``c`` on the simplex,
``sum_k c_k G_k`` is at most ``mean_x max_y sum_k c_k q_k``, whatever the policy over the responses.
If that is below ``sum_k c_k b_k``, the bounds are out of reach, whatever the reference and the
multipliers. Such a ``c`` is looked for by mirror descent. Of pessimistic levels, which are below
the means, it is a sufficient sign.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moa_diffusion.objectives.mopo_offline import OfflineMopo

TOLERANCE = 1e-4  # a win rate that misses its bound by less is not called out of reach
STEPS = 40  # multipliers that are tried, over five powers of ten, and again around the best
DESCENT = 300  # steps towards the weights of bounds that exclude each other


@dataclass(frozen=True, slots=True, kw_only=True)
class OutOfReach:
    """Bounds that no multipliers keep."""

    weights: Tensor  # [K] on the simplex: 1 for a single bound, or the mean that is out of reach
    level: float  # the most that this mean can be

    def bounds(self, mopo: OfflineMopo) -> str:
        """Return the bounds in words."""
        pairs = zip(mopo.secondary, mopo.bounds().tolist(), self.weights.tolist(), strict=True)
        involved = [(name, bound, weight) for name, bound, weight in pairs if weight > 0.01]
        listed = " and ".join(f"{bound:g} for `{name}`" for name, bound, _ in involved)
        if len(involved) == 1:
            return listed
        shares = " + ".join(f"{weight:.2g} {name}" for name, _, weight in involved)
        mean = sum(bound * weight for _, bound, weight in involved)
        return f"{listed}, which exclude each other: they ask {mean:.4g} of the mean {shares}"


def check_bounds(mopo: OfflineMopo, *, reference_known: bool = True) -> None:
    """Check that some multipliers keep the bounds.

    Args:
        mopo: The weights whose bounds are checked.
        reference_known: Whether its reference is the one that it will have; if not, what no
            reference can keep is found.

    Raises:
        ValueError: Naming the objectives, the bounds, what can be reached, and what to change.
    """
    if not (excluded := _out_of_reach(mopo, reference_known)):
        return
    eps, maximum = mopo.settings.eps, mopo.settings.maximum
    pessimism = f" in the worst case within `eps` = {eps:g}" if eps else ""
    raise ValueError(
        f"Parameter `bounds` should be within reach of the responses that are there. Found "
        f"{excluded.bounds(mopo)}; the most that multipliers up to {maximum:g} reach is "
        f"{excluded.level:.4g}{pessimism}. Lower the bounds"
        f"{', or `eps` (0 takes the mean itself)' if eps else ''}, or `preferences.smoothing`, "
        "which draws win rates towards 1/2; several comparisons per response help as well."
    )


def _out_of_reach(mopo: OfflineMopo, reference_known: bool) -> OutOfReach | None:
    """Return the first bound, or bounds together, that cannot be kept."""
    bounds = mopo.bounds()  # [K]
    for k, bound in enumerate(bounds.tolist() if reference_known else ()):
        level = _largest_level(mopo, k, bound - TOLERANCE)
        if level < bound - TOLERANCE:  # False if nothing is known
            weights = torch.zeros_like(bounds)
            weights[k] = 1.0
            return OutOfReach(weights=weights, level=level)
    return _excluding(mopo, bounds) if len(bounds) else None


def _largest_level(mopo: OfflineMopo, k: int, enough: float) -> float:
    """Return the largest level of secondary objective k, or some level that is ``enough``.

    The search is over its multiplier, and then over the others'.
    """
    best = torch.zeros(len(mopo.secondary), dtype=torch.float64)

    def level(lambdas: Tensor) -> float:
        return mopo.level_at(mopo.tilted(lambdas), k + 1, eps=mopo.settings.eps)

    most = level(best)
    for j in [k, *(j for j in range(len(best)) if j != k)]:
        if not most < enough:
            break

        def along(value: float, j: int = j) -> float:
            trial = best.clone()
            trial[j] = value
            return level(trial)

        value, reached = _maximum(along, mopo.settings.maximum, enough)
        if reached > most:
            best[j], most = value, reached
    return most


def _maximum(level: Callable[[float], float], largest: float, enough: float) -> tuple[float, float]:
    """Return where in (0, largest] a level is largest, and how large; ends early at ``enough``."""
    values = (largest * torch.logspace(0, -5, STEPS, dtype=torch.float64)).tolist()
    visited: list[tuple[float, float]] = []
    for _ in range(2):
        for value in values:
            visited.append((level(value), value))
            if not visited[-1][0] < enough:
                return value, visited[-1][0]
        centre = max(visited)[1]
        values = (centre * torch.logspace(-0.13, 0.13, STEPS, dtype=torch.float64)).tolist()
        values = [value for value in values if value <= largest]
    most, value = max(visited)
    return value, most


def _excluding(mopo: OfflineMopo, bounds: Tensor) -> OutOfReach | None:
    """Return the weights under which policies miss the bounds' mean by the most."""
    applies = (mopo.applies[1:] & ~mopo.log_ref.isnan().any(1)).double()  # [K, P]
    counts = applies.sum(1)
    if (counts == 0).any():
        return None
    share = (applies / counts[:, None])[:, :, None]  # [K, P, 1]
    possible = mopo.log_data > -torch.inf  # [P, Y]
    scores = torch.where(possible, mopo.rates[1:] * share, 0.0)  # [K, P, Y]
    log_weights = torch.zeros_like(bounds)
    worst, witness = TOLERANCE, None
    for step in range(DESCENT if len(bounds) > 1 else 1):
        weights = log_weights.softmax(0)
        mean = torch.einsum("k,kpy->py", weights, scores).masked_fill(~possible, -torch.inf)
        best, chosen = mean.max(1)  # [P]
        level = float(best.sum())
        if (gap := float(weights @ bounds) - level) > worst:
            worst, witness = gap, OutOfReach(weights=weights, level=level)
        levels = scores.gather(2, chosen.expand(len(bounds), -1)[:, :, None]).sum((1, 2))  # [K]
        log_weights = log_weights - 10 * (levels - bounds) / (1 + step) ** 0.5
    return witness
