"""Points that no other dominates, how they are thinned out, and the volume that they dominate."""

from __future__ import annotations

import math

import numpy
from torch import Tensor

from moa_diffusion.statistics.bootstrap import Array


def nondominated(points: Tensor) -> list[bool]:
    """Return which of E points no other dominates; equal points are both in.

    Args:
        points: Points ``[E, K]``, higher is better. A column with a NaN is left out for all;
            without any other column no point is in.
    """
    known = points[:, ~points.isnan().any(0)]
    if known.shape[1] == 0:
        return [False] * len(points)
    weakly = (known[:, None] >= known[None]).all(2)  # [E, E]: row at least as good as column
    strictly = (known[:, None] > known[None]).any(2)
    return [not dominated for dominated in (weakly & strictly).any(0).tolist()]


def thinned(points: Tensor, limit: int) -> list[int]:
    """Thin out E points to at most ``limit``, far from each other: return indices in order.

    One by one the point with the smallest crowding distance leaves (Deb et al. 2002, NSGA-II,
    section III-B), so the best in each objective stay longest; of equal ones the first leaves.

    Args:
        points: Points ``[E, K]``, higher is better.
        limit: Largest number of points, at least 0.
    """
    kept = list(range(len(points)))
    while len(kept) > limit:
        distances = crowding(points[kept])
        del kept[distances.index(min(distances))]
    return kept


def crowding(points: Tensor) -> list[float]:
    """Return NSGA-II's crowding distance of E points ``[E, K]``; infinite at a column's ends."""
    distances = [0.0] * len(points)
    for column in points.T.tolist():
        order = sorted(range(len(column)), key=lambda i: column[i])
        extent = column[order[-1]] - column[order[0]]
        if not extent > 0:  # also a column with NaN says nothing
            continue
        distances[order[0]] = distances[order[-1]] = math.inf
        for before, i, after in zip(order, order[1:], order[2:], strict=False):
            distances[i] += (column[after] - column[before]) / extent
    return distances


def hypervolumes(points: Array) -> Array:
    """Return the volume between 0 and what is dominated by any of E points: ``[B]``.

    At 0 is the model that gains are over. Exact (``moocore``). A point below it in
    one objective adds nothing.

    Args:
        points: Points ``[B, E, K]``, higher is better; NaN gives NaN.
    """
    import moocore

    if points.shape[1] == 1:  # a box, as in every resample of one model
        boxes: Array = numpy.maximum(points[:, 0], 0.0).prod(axis=1)
        return boxes
    volume = moocore.Hypervolume(ref=numpy.zeros(points.shape[2]))  # moocore minimises
    known = ~numpy.isnan(points.sum(axis=(1, 2)))
    return numpy.array(
        [volume(front) if good else math.nan for front, good in zip(-points, known, strict=True)]
    )
