"""What a training run left: its curves, its alarms, its front, its configuration."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_diffusion.storage.front import NAME as FRONT
from moa_diffusion.storage.log import ALARMS, METRICS, REWARDS, read_metrics
from moa_diffusion.types import ConfigError

POINTS = 500  # a curve has no more; a longer one is averaged over neighbours
FILES = ("config.yaml", REWARDS)
CHECKPOINT = ("step", "means", "non_dominated", "kept_for")  # what front.json says of each
ALARM = ("step", "kind", "name", "action", "message")  # what every line of alarms.jsonl has


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One number of a run over its rollouts."""

    steps: tuple[float, ...]  # rollouts finished; their mean, where neighbours are averaged
    values: tuple[float | None, ...]  # None: not a number


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One run."""

    name: str  # its series in the table
    curves: Mapping[str, Mapping[str, Curve]]  # by group, by name
    pooled: int  # rollouts that one point of the longest curve stands for
    objectives: tuple[str, ...]  # trained on
    heldout: tuple[str, ...]  # only evaluated
    alarms: tuple[Mapping[str, Any], ...]  # as in alarms.jsonl
    front: tuple[Mapping[str, Any], ...]  # the checkpoints of front.json
    files: Mapping[str, str]  # text by file name
    rollouts: int = 0  # finished
    seconds: float = 0.0  # of wall time that they took, evaluations included


def read_training(name: str, folder: Path) -> Training:
    """Read a run's folder; what a method does not write is empty.

    Args:
        name: The name of the series.
        folder: The folder of the run.

    Raises:
        ConfigError: If a file is damaged; the message names it.
    """
    rows = _rows(folder / METRICS)
    # A run that was killed between two files may have left a rollout twice: the later one counts.
    rows = sorted({row["step"]: row for row in rows}.values(), key=lambda row: row["step"])
    full = _curves(rows)
    trained = tuple(full.get("reward_mean", {}))
    longest = max((len(one.steps) for group in full.values() for one in group.values()), default=0)
    return Training(
        name=name,
        curves={
            group: {key: _thin(one) for key, one in members.items()}
            for group, members in full.items()
        },
        pooled=max(1, -(-longest // POINTS)),
        objectives=trained,
        heldout=tuple(key for key in full.get("eval_mean", {}) if trained and key not in trained),
        alarms=_alarms(folder / ALARMS),
        front=_front(folder / FRONT),
        files={
            file: (folder / file).read_text(encoding="utf-8")
            for file in FILES
            if (folder / file).is_file()
        },
        rollouts=max((row["step"] for row in rows), default=0),
        seconds=sum(row.get("seconds/total") or 0.0 for row in rows),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    points: dict[str, dict[str, list[tuple[int, float | None]]]] = {}
    for row in rows:
        for key, value in row.items():
            group, slash, name = key.partition("/")
            if slash:
                points.setdefault(group, {}).setdefault(name, []).append((row["step"], value))
    return {
        group: {
            name: Curve(steps=tuple(s for s, _ in pairs), values=tuple(v for _, v in pairs))
            for name, pairs in members.items()
        }
        for group, members in points.items()
    }


def _thin(curve: Curve) -> Curve:
    each = -(-len(curve.steps) // POINTS)
    if each <= 1:
        return curve
    starts = range(0, len(curve.steps), each)
    known = [[v for v in curve.values[i : i + each] if v is not None] for i in starts]
    return Curve(
        steps=tuple(statistics.fmean(curve.steps[i : i + each]) for i in starts),
        values=tuple(statistics.fmean(some) if some else None for some in known),
    )


def _alarms(path: Path) -> tuple[Mapping[str, Any], ...]:
    alarms = _rows(path)
    for number, alarm in enumerate(alarms, start=1):
        if missing := [key for key in ALARM if key not in alarm]:
            raise ConfigError(f"{path}:{number}: An alarm should have {', '.join(missing)}.")
    return tuple(alarms)


def _front(path: Path) -> tuple[Mapping[str, Any], ...]:
    if not path.is_file():
        return ()
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["checkpoints"]
        return tuple({key: row[key] for key in CHECKPOINT} for row in rows)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"`{path}` is damaged: {error!r}.") from error
