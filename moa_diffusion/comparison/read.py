"""What a finished run left: its held-out rewards and its metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy
from numpy.typing import NDArray

from moa_diffusion.statistics.bootstrap import (
    Array,
)
from moa_diffusion.statistics.groups import same_prompt
from moa_diffusion.storage.log import read_metrics

Sample: TypeAlias = tuple[int, int, str, int]  # prompt's index, sibling, prompt, seed


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What a finished run left: held-out rewards and metrics."""

    method: str
    seed: int
    folder: Path
    names: tuple[str, ...]  # length K
    steps: tuple[int, ...]  # E + 1 rollouts finished at the evaluations; the first is 0
    samples: tuple[Sample, ...]  # length M
    values: Array  # [E + 1, K, M] raw rewards, NaN: does not apply
    metrics: Sequence[Mapping[str, Any]]  # a row per rollout, from 1

    def prompts(self) -> NDArray[numpy.int64]:
        """Return the number of each sample's prompt, ``[M]``.

        A prompt that is held out twice has one number.
        """
        return same_prompt([sample[2] for sample in self.samples]).numpy()


def read_run(folder: Path, *, method: str, seed: int, names: Sequence[str]) -> RunData:
    """Read a run's evaluations and metrics.

    Args:
        folder: The folder of the run.
        method: Label of the run's method.
        seed: The seed of the run.
        names: Its K objectives.

    Raises:
        ValueError: If there is no evaluation of the start or none after it, or if two of them
            drew different samples; the message names the file.
    """
    paths = sorted(folder.glob("evaluation/step-*.jsonl"))
    steps = [int(path.stem.removeprefix("step-")) for path in paths]
    if len(steps) < 2 or steps[0] != 0:
        raise ValueError(
            f"`{folder}` should hold evaluations of the start (step 0) and of later steps. "
            f"Found steps {steps}."
        )
    first, rows = _read_evaluation(paths[0], names)
    values = [rows]
    for path in paths[1:]:
        samples, rows = _read_evaluation(path, names)
        if samples != first:
            raise ValueError(f"`{path}` should hold the samples of `{paths[0]}`. Found others.")
        values.append(rows)
    metrics = read_metrics(folder / "metrics.jsonl")
    return RunData(
        method=method,
        seed=seed,
        folder=folder,
        names=tuple(names),
        steps=tuple(steps),
        samples=first,
        values=numpy.stack(values),
        metrics=[row for row in metrics if row["step"] > 0],
    )


def _read_evaluation(path: Path, names: Sequence[str]) -> tuple[tuple[Sample, ...], Array]:
    """Return the samples in a fixed order, and their rewards ``[K, M]``."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: (row["group"], row["sibling"]))
    samples = tuple((row["group"], row["sibling"], row["prompt"], row["seed"]) for row in rows)
    missing = [name for name in names if rows and f"reward/{name}" not in rows[0]]
    if missing:
        raise ValueError(f"`{path}` should have the reward {missing[0]!r}. Found {list(rows[0])}.")
    columns = [[row[f"reward/{name}"] for row in rows] for name in names]
    return samples, numpy.array(columns, dtype=numpy.float64)  # None becomes NaN


def training_seconds(metrics: Sequence[Mapping[str, Any]]) -> float:
    """Return the wall time of a run's rollouts without its evaluations, in seconds."""
    return sum(
        row["seconds/total"] - row.get("seconds/evaluate", 0.0) for row in metrics if row["step"]
    )
