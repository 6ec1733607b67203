"""Which checkpoints stay: the front of the held-out rewards, and the newest.

A run with several objectives has no best checkpoint, but a front: those that no other beats in one
objective without losing in another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from moa_diffusion.files.json_values import without_nan
from moa_diffusion.files.writing import write_text
from moa_diffusion.statistics.pareto import nondominated, thinned
from moa_diffusion.storage import checkpoint
from moa_diffusion.storage.log import ALARMS, METRICS, read_metrics

NAME = "front.json"


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
        run: Folder of the run.
        objectives: K rewards whose means in evaluations decide.
        newest: Checkpoints that stay for being new; 0 keeps all.
        front: Checkpoints that stay at most for being on the front; 0 for none.
        best: Rollouts of checkpoints that a rollback may go back to.
    """
    saved = [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(run)]
    means = _means(run, objectives)
    evaluated = [step for step in saved if step in means]
    points = torch.tensor([means[step] for step in evaluated]).reshape(-1, len(objectives))
    inside = nondominated(points)
    candidates = [i for i, is_in in enumerate(inside) if is_in]
    chosen = {evaluated[candidates[i]] for i in thinned(points[candidates], front)}
    groups = {"last": saved[-newest:], "front": chosen, "best": best}  # saved[-0:] is all of them
    reasons = {
        step: [word for word, members in groups.items() if step in members] for step in saved
    }
    kept = [step for step in saved if reasons[step]]
    rows = [
        {
            "step": step,
            "means": dict(zip(objectives, without_nan(means[step]), strict=True))
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
    """Return held-out means by rollouts; after a rollback, of the weights that it went back to."""
    means: dict[int, list[float]] = {}
    for row in read_metrics(run / METRICS):
        if all(f"eval_mean/{name}" in row for name in objectives):
            values = [row[f"eval_mean/{name}"] for name in objectives]
            means[row["step"]] = [math.nan if value is None else value for value in values]
    for alarm in read_metrics(run / ALARMS):
        if alarm["to_step"] in means:
            means[alarm["step"]] = means[alarm["to_step"]]
        elif alarm["to_step"] is not None:  # evaluated by the run that this one was resumed from
            means.pop(alarm["step"], None)
    return means
