"""Which checkpoints stay: the front of the held-out rewards, and the newest.

A run with several objectives has no best checkpoint, but a front: those that no other beats in one
objective without losing in another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa_diffusion.files.writing import write_text
from moa_diffusion.storage import checkpoint
from moa_diffusion.storage.log import ALARMS, METRICS, read_metrics

NAME = "front.json"


def nondominated(points: Tensor) -> list[bool]:
    """Which of E points no other dominates; equal points are both in.

    Args:
        points: ``[E, K]``, higher is better. A column with a NaN is left out for all; without any
            other column no point is in.
    """
    known = points[:, ~points.isnan().any(0)]
    if known.shape[1] == 0:
        return [False] * len(points)
    weakly = (known[:, None] >= known[None]).all(2)  # [E, E]: row at least as good as column
    strictly = (known[:, None] > known[None]).any(2)
    return [not found for found in (weakly & strictly).any(0).tolist()]


def spread_out(points: Tensor, limit: int) -> list[int]:
    """At most ``limit`` of E points, far from each other: indices in order.

    One by one the point with the smallest crowding distance leaves (Deb et al. 2002, NSGA-II,
    section III-B), so the best in each objective stay longest; of equal ones the first leaves.

    Args:
        points: ``[E, K]``.
        limit: at least 0.
    """
    kept = list(range(len(points)))
    while len(kept) > limit:
        distances = crowding(points[kept])
        del kept[distances.index(min(distances))]
    return kept


def crowding(points: Tensor) -> list[float]:
    """NSGA-II's crowding distance of E points ``[E, K]``; infinite at the ends of a column."""
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


def retain(
    run: Path,
    objectives: Sequence[str],
    *,
    newest: int,
    front: int,
    best: Collection[int] = (),
) -> None:
    """Write ``front.json`` and delete the checkpoints that nothing speaks for.

    Args:
        run: folder of the run.
        objectives: K rewards whose means in evaluations decide.
        newest: checkpoints that stay for being new; 0 keeps all.
        front: checkpoints that stay at most for being on the front; 0 for none.
        best: rollouts of checkpoints that a rollback may go back to.
    """
    saved = [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(run)]
    means = _means(run, objectives)
    evaluated = [step for step in saved if step in means]
    points = torch.tensor([means[step] for step in evaluated]).reshape(-1, len(objectives))
    inside = nondominated(points)
    candidates = [i for i, is_in in enumerate(inside) if is_in]
    chosen = {evaluated[candidates[i]] for i in spread_out(points[candidates], front)}
    groups = {"last": saved[-newest:], "front": chosen, "best": best}  # saved[-0:] is all of them
    reasons = {
        step: [word for word, members in groups.items() if step in members] for step in saved
    }
    kept = [step for step in saved if reasons[step]]
    rows = [
        {
            "step": step,
            "means": dict(zip(objectives, _plain(means[step]), strict=True))
            if step in means
            else None,
            "non_dominated": step in evaluated and inside[evaluated.index(step)],
            "kept_for": reasons[step],
        }
        for step in kept
    ]
    text = json.dumps({"objectives": list(objectives), "checkpoints": rows}, indent=2)
    write_text(run / NAME, text + "\n")
    checkpoint.prune(run, kept)


def _means(run: Path, objectives: Sequence[str]) -> dict[int, list[float]]:
    """Held-out means by rollouts; after a rollback those of the weights that it went back to."""
    found: dict[int, list[float]] = {}
    for row in read_metrics(run / METRICS):
        if all(f"eval_mean/{name}" in row for name in objectives):
            values = [row[f"eval_mean/{name}"] for name in objectives]
            found[row["step"]] = [math.nan if value is None else value for value in values]
    for alarm in read_metrics(run / ALARMS):
        if alarm["to_step"] in found:
            found[alarm["step"]] = found[alarm["to_step"]]
        elif alarm["to_step"] is not None:  # evaluated by the run that this one was resumed from
            found.pop(alarm["step"], None)
    return found


def _plain(values: Sequence[float]) -> list[Any]:
    return [None if math.isnan(value) else value for value in values]
