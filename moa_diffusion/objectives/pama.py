"""PAMA, Pareto multi-objective alignment (arXiv 2508.07768): min-norm weights in O(K).

MGDA looks for the shortest convex combination of K gradients. PAMA bounds its norm by a problem
between K scalar advantages, ``min_c |sum_k c_k A_k|^2`` on the simplex. Its solution is the
projection of 0 on ``[min A, max A]``::

    s* = 0 if min <= 0 <= max,  min_k A_k if all are positive,  max_k A_k if all are negative
       = relu(min_k A_k) - relu(-max_k A_k)

Behind Noon (``noon.py``), where no advantage is negative, ``s* = min_k A_k``: a sample is worth
what it is worth to the objective that it serves least.

Deviations: the sources leave open what ``A_k`` is a scalar *over*; the granularity is our reading.
``Pama`` solves the problem for every sample, which keeps credit assignment and makes the bound
tight; ``PamaVector`` takes each objective's advantages over the batch as one vector. (The third
reading, one batch mean as the advantage of every decision, cannot learn: its direction does not
depend on the rewards.) The carry-over from PPO's value heads to groups of siblings is an
adaptation. An objective that cannot tell a sample's siblings apart is left out of the minimum. The
KL to the base model is a loss of its own (``loss.kl_weight``), for images and for texts: in the
paper's PPO it is part of each objective's reward, token by token, before advantages are estimated,
where Noon would delete what pulls back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moa_diffusion.objectives.base import Weighting
from moa_diffusion.statistics.groups import group_moments
from moa_diffusion.types import ObjectiveStats

TIE = 1e-12  # relative: advantages that differ by less are the same
RIDGE = 1e-10  # relative to an objective's own diagonal: makes the minimum unique
GAP = 1e-12  # the duality gap at which an active-set solve is done


class Pama(Weighting):
    """Weights of each sample, ``[K, N]``, under which ``combine`` gives ``s*``.

    Out of the minimum are, per sample, the objectives that do not apply to it and those that are
    constant in its group; where none is left, weights are equal. The normalizer has to put all
    objectives on one scale, since a minimum compares them.
    """

    def forward(self, stats: ObjectiveStats) -> Tensor:
        """Return weights ``[K, N]``: each sample's own minimum-norm weights."""
        _, c = min_norm_scalar(stats.advantages, tells_apart(stats))
        return c


class PamaVector(Weighting):
    """Weights ``[K]`` that minimise ``||sum_k c_k a_k||^2``, ``a_k`` the batch's advantages.

    An objective that is constant in every group has weight 0; if all are, weights are equal.
    Deviation: where an objective does not apply, its advantage counts as 0.
    """

    def forward(self, stats: ObjectiveStats) -> Tensor:
        """Return the minimum-norm weights of the whole batch, ``[K]``."""
        varies = tells_apart(stats).any(1)  # [K]
        a = stats.advantages[varies]  # [objectives that vary, N]
        weights = a.new_zeros(len(varies))
        if not varies.any():
            return torch.full_like(weights, 1 / len(varies))
        weights[varies] = min_norm_weights(a @ a.T)
        return weights


def tells_apart(stats: ObjectiveStats) -> Tensor:
    """Return where an objective applies to the sample and varies in its group: ``[K, N]`` bool."""
    _, std, _ = group_moments(stats.rewards.values, stats.rewards.groups)
    return (std > 0) & ~torch.isnan(stats.rewards.values)


def min_norm_scalar(advantages: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scalar problem, for each sample: ``s*`` and weights ``c`` that attain it.

    ``c`` is not unique. Where the valid advantages have one sign it is uniform over those nearest
    to 0; where some are exactly 0, uniform over these; where they straddle 0, it is on the smallest
    and the largest, ``hi / (hi - lo)`` and ``-lo / (hi - lo)``, in equal parts among equal ones.

    Args:
        advantages: Advantages ``[K, N]``.
        valid: Which of them take part, ``[K, N]`` bool.

    Returns:
        ``s* [N]``, 0 where nothing is valid, and ``c [K, N]``, there uniform over K. Each column
        of ``c`` is on the simplex.
    """
    A = advantages
    lo = torch.where(valid, A, torch.inf).amin(0)  # [N]
    hi = torch.where(valid, A, -torch.inf).amax(0)  # [N]
    s = torch.where(valid.any(0), lo.relu() - (-hi).relu(), 0.0)

    nearest = _uniform(valid & _equal(A, s))  # [K, N], zero where 0 is strictly inside
    share = torch.where((lo < 0) & (hi > 0), hi / (hi - lo), 0.0)  # [N], of the smallest
    inside = share * _uniform(valid & _equal(A, lo)) + (1 - share) * _uniform(valid & _equal(A, hi))
    c = torch.where(nearest.any(0), nearest, inside)
    return s, torch.where(valid.any(0), c, 1 / len(A))


def _equal(A: Tensor, value: Tensor) -> Tensor:
    """Compare up to rounding: in a group of two, all z-scores are 1 or -1, give or take a bit."""
    return (A - value).abs() <= TIE * value.abs()


def _uniform(members: Tensor) -> Tensor:
    """Turn ``[K, N]`` bool into equal weights in each column; zeros in one without members."""
    return members.double() / members.sum(0).clamp(min=1)


def min_norm_weights(gramian: Tensor) -> Tensor:
    """Return the weights on the simplex that minimise ``c' G c``: ``[K]``.

    An active set grows by the vector that violates optimality most and shrinks where a weight
    would turn negative (Wolfe's nearest-point method, in terms of the Gramian). It ends after
    finitely many steps. A ridge of ``1e-10 G_kk`` makes the solution unique: duplicates share.

    Args:
        gramian: Gramian ``[K, K]``, symmetric and positive semi-definite; it may be singular.

    Returns:
        Float64; uniform over the zero rows if there are any.
    """
    G = gramian.double()
    K = len(G)
    zero = G.diagonal() <= 0  # [K]
    if zero.any():
        return zero.double() / zero.sum()
    G = (G + G.T) / (2 * G.diagonal().mean())
    G = G + RIDGE * G.diagonal().diag()
    c = torch.zeros(K, dtype=torch.float64)
    active = [int(G.diagonal().argmin())]
    c[active] = 1.0
    for _ in range(20 * K):
        slope = G @ c  # [K], half the gradient
        entering = int(slope.argmin())
        gap = c @ slope - slope[entering]
        if entering in active or gap <= GAP * (c @ G.diagonal()):
            break
        active.append(entering)
        while True:
            y = _affine_minimum(G[active][:, active])  # [active]
            if (y > 0).all():
                c[active] = y
                break
            x = c[active]
            ratio = torch.where(y <= 0, x / (x - y), torch.inf)
            out = int(ratio.argmin())
            c[active] = (x + ratio[out] * (y - x)).clamp(min=0)
            c[active[out]] = 0.0
            del active[out]
    return c / c.sum()


def _affine_minimum(G: Tensor) -> Tensor:
    """Return the minimum of ``y' G y`` with ``sum y = 1`` and no constraint on signs."""
    scale = G.diagonal().rsqrt()  # rows of very different length: solve between unit vectors
    y: Tensor = scale * torch.linalg.solve(scale[:, None] * G * scale, scale)
    return y / y.sum()
