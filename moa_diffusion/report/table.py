"""``scores.parquet``: one row per model, prompt, seed and reward, with everything it depends on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy

from moa_diffusion.statistics.bootstrap import Array
from moa_diffusion.types import ConfigError

NAME = "scores.parquet"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One model of a table."""

    label: str
    series: str  # the run, LoRA folder or soup it belongs to; empty for the base model
    step: int | None  # rollouts, of a run's checkpoint
    weights: Mapping[str, float] | None  # the parts of a soup, by label
    model_digest: str  # with the base model
    adapter_digest: str  # empty for the base model
    ema: bool | None = None  # whether a run's weights are averaged over optimizer steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What a table says; the base model is the first of E models."""

    models: tuple[Column, ...]  # E
    prompts: tuple[str, ...]  # P
    seeds: tuple[int, ...]  # S
    rewards: tuple[str, ...]  # K
    values: Array  # [E, K, P, S]; NaN: does not apply
    # Exactly one of the two: images, or completions.
    images: tuple[tuple[tuple[Path, ...], ...], ...] | None  # [E][P][S]
    texts: tuple[tuple[tuple[str, ...], ...], ...] | None  # [E][P][S]
    units: Mapping[str, str]  # by reward
    scorers: Mapping[str, Mapping[str, Any]]  # by reward: version, digest, provenance
    sampler: Mapping[str, Any]  # settings by name


def read_table(folder: Path) -> Table:
    """Read what ``write_table`` wrote.

    Raises:
        ConfigError: If there is no table, or one that is damaged or incomplete.
    """
    from pyarrow import ArrowException, parquet

    path = folder / NAME
    if not path.is_file():
        raise ConfigError(f"`{folder}` should be the folder of an evaluation. Found no {NAME}.")
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ConfigError(f"`{path}` is damaged: {error}") from error
    models = {row["checkpoint"]: row for row in rows}
    prompts = {row["prompt_index"]: row["prompt"] for row in rows}
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    rewards = {row["reward"]: row for row in rows}
    places: list[dict[Any, int]] = [
        {key: i for i, key in enumerate(keys)} for keys in (models, rewards, prompts, seeds)
    ]
    values = numpy.full([len(place) for place in places], math.nan)
    files: dict[tuple[int, int, int], Path] = {}
    texts: dict[tuple[int, int, int], str] = {}
    for row in rows:
        keys = (row["checkpoint"], row["reward"], row["prompt_index"], row["seed"])
        e, k, p, s = (place[key] for place, key in zip(places, keys, strict=True))
        values[e, k, p, s] = math.nan if row["score"] is None else row["score"]
        if "text" in row:
            texts[e, p, s] = row["text"]
        else:
            files[e, p, s] = folder / row["image"]
    if len(rows) != values.size:
        raise ConfigError(f"`{path}` should have {values.size} rows. Found {len(rows)}.")
    first = rows[0]
    return Table(
        models=tuple(
            Column(
                label=label,
                series=row["series"],
                step=row["step"],
                weights=None if row["weights"] is None else json.loads(row["weights"]),
                model_digest=row["model_digest"],
                adapter_digest=row["adapter_digest"],
                ema=row["ema"],
            )
            for label, row in models.items()
        ),
        prompts=tuple(prompts.values()),
        seeds=tuple(seeds),
        rewards=tuple(rewards),
        values=values,
        images=_nested(files, len(models), len(prompts), len(seeds)) if files else None,
        texts=_nested(texts, len(models), len(prompts), len(seeds)) if texts else None,
        units={name: row["unit"] for name, row in rewards.items()},
        scorers={
            name: {
                "version": row["scorer_version"],
                "digest": row["scorer_digest"],
                "provenance": json.loads(row["scorer_provenance"]),
            }
            for name, row in rewards.items()
        },
        sampler={
            key.removeprefix("sampler_"): value
            for key, value in first.items()
            if key.startswith("sampler_")
        },
    )


def _nested(
    cells: Mapping[tuple[int, int, int], T], models: int, prompts: int, seeds: int
) -> tuple[tuple[tuple[T, ...], ...], ...]:
    return tuple(
        tuple(tuple(cells[e, p, s] for s in range(seeds)) for p in range(prompts))
        for e in range(models)
    )
