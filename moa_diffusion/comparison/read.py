"""What a finished run left: its held-out rewards and its metrics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy
import torch

from moa_diffusion.statistics.bootstrap import Array, prompt_sums
from moa_diffusion.statistics.groups import same_prompt, spread_within
from moa_diffusion.storage.log import read_metrics

Sample: TypeAlias = tuple[int, int, str, int]  # prompt's index, sibling, prompt, seed


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What a finished run left, as much of it as tables and plots need."""

    method: str
    seed: int
    folder: str
    names: tuple[str, ...]  # length K
    steps: tuple[int, ...]  # E + 1 rollouts finished at the evaluations; the first is 0
    prompts: tuple[str, ...]  # P held out, each once
    images: int  # held out, of all prompts together
    drawn: str  # equal for two runs whose held-out images have the same prompts and seeds
    spread: tuple[float, ...]  # the start's within a prompt, of K rewards in their own units
    changes: Array  # [E, K, P] sums over a prompt's images of the change since the start
    counts: Array  # [E, K, P] images that count: both have the reward
    metrics: Sequence[Mapping[str, Any]]  # a row per rollout, from 1


def read_run(folder: Path, *, method: str, seed: int, names: Sequence[str]) -> RunData:
    """Read a run's evaluations and metrics.

    Args:
        folder: The folder of the run.
        method: Label of the run's method.
        seed: The seed of the run.
        names: Its K objectives.

    Raises:
        ValueError: If there is no evaluation of the start or none after it, if two of them
            drew different samples, or if gains would have no unit; the message names the file.
    """
    paths = sorted(folder.glob("evaluation/step-*.jsonl"))
    steps = [int(path.stem.removeprefix("step-")) for path in paths]
    if len(steps) < 2 or steps[0] != 0:
        raise ValueError(
            f"`{folder}` should hold evaluations of the start (step 0) and of later steps. "
            f"Found steps {steps}."
        )
    first, start = _read_evaluation(paths[0], names)
    changes = []
    for path in paths[1:]:
        samples, values = _read_evaluation(path, names)
        if samples != first:
            raise ValueError(f"`{path}` should hold the samples of `{paths[0]}`. Found others.")
        changes.append(values - start)
    prompts = [sample[2] for sample in first]
    sums, counts = prompt_sums(numpy.stack(changes), same_prompt(prompts).numpy())
    metrics = read_metrics(folder / "metrics.jsonl")
    return RunData(
        method=method,
        seed=seed,
        folder=str(folder),
        names=tuple(names),
        steps=tuple(steps),
        prompts=tuple(dict.fromkeys(prompts)),
        images=len(first),
        drawn=hashlib.sha256(json.dumps(first).encode()).hexdigest()[:16],
        spread=tuple(_spread(names, first, start)),
        changes=sums,
        counts=counts,
        metrics=[row for row in metrics if row["step"] > 0],
    )


def check_base(folder: Path, names: Sequence[str]) -> None:
    """Check the evaluation of the start, as soon as there is one.

    Raises:
        ValueError: If gains would have no unit.
    """
    _spread(names, *_read_evaluation(folder / "evaluation" / "step-000000.jsonl", names))


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


def _spread(names: Sequence[str], samples: Sequence[Sample], values: Array) -> list[float]:
    """Return each objective's spread of rewards ``[K, M]`` within a prompt, the unit of gains.

    Raises:
        ValueError: If there is one image per prompt, or if an objective varies within none.
    """
    siblings = torch.tensor([sample[0] for sample in samples])
    if len(siblings.unique()) == len(siblings):
        raise ValueError(
            "Parameter `images_per_prompt` should be at least 2: gains are in units of the "
            "spread within a prompt. Found 1."
        )
    spread: list[float] = spread_within(torch.from_numpy(values), siblings).tolist()
    for name, unit in zip(names, spread, strict=True):
        if not unit > 0:
            raise ValueError(
                f"Objective `{name}` should vary within a prompt: its spread before training "
                f"is the unit of its gain. Found {unit:g} over {len(samples)} held-out samples."
            )
    return spread


def training_seconds(metrics: Sequence[Mapping[str, Any]]) -> float:
    """Return the wall time of a run's rollouts without its evaluations, in seconds."""
    return sum(
        row["seconds/total"] - row.get("seconds/evaluate", 0.0) for row in metrics if row["step"]
    )
