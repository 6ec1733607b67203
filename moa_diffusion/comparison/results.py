"""Which method lifts which objective: gains over the start of training, with bootstrap intervals.

A gain is a difference to what training starts from (the base model, or that with the LoRA of
``policy.adapter``) on the same held-out prompts and seeds, in units of the start's spread within a
prompt, so that objectives of any unit stand in one table.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from moa_diffusion.comparison.read import RunData, training_seconds
from moa_diffusion.files.json_values import without_nan
from moa_diffusion.report.markdown import markdown
from moa_diffusion.statistics.bootstrap import (
    LEVEL,
    RESAMPLES,
    Array,
    Estimate,
    estimate,
    resample,
    resampled_means,
)
from moa_diffusion.statistics.pareto import hypervolumes
from moa_diffusion.types import ConfigError

FILES = ("results.json", "table.md", "compare.png")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One run; gains are in the start's spread within a prompt."""

    method: str
    seed: int
    folder: str
    rollouts: int
    minutes: float  # time spent on training, without evaluations
    gains: Mapping[str, float]  # by objective
    worst: float  # the smallest of them
    above: float  # share of the objectives with a gain above 0
    hypervolume: float  # all evaluations' together; the start is the reference point
    path: Mapping[int, Mapping[str, float]]  # gains by rollouts finished
    shares: Mapping[str, float]  # the advantage's variance by objective, mean over rollouts
    seconds: Mapping[str, float]  # per rollout, by phase


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSummary:
    """All runs of a method: means over runs."""

    method: str
    seeds: tuple[int, ...]
    gains: Mapping[str, Estimate]
    worst: Estimate
    hypervolume: Estimate
    above: float
    shares: Mapping[str, float]
    rollouts: float
    minutes: float
    seconds: Mapping[str, float]

    def biggest(self) -> tuple[str, float]:
        """Return the objective of the largest share of the advantage's variance, and the share."""
        known = {name: share for name, share in self.shares.items() if not math.isnan(share)}
        name = max(known, key=lambda key: known[key], default="")
        return name, known.get(name, math.nan)

    @property
    def tells_of_seeds(self) -> bool:
        """Whether its intervals are over several runs, so that something may be claimed."""
        return len(self.seeds) > 1

    def below(self) -> list[str]:
        """Return the objectives whose whole interval lies below the start; none with one run."""
        if not self.tells_of_seeds:
            return []
        return [name for name, gain in self.gains.items() if gain.high < 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything a table or a plot needs; methods are sorted, the best worst gain first."""

    names: tuple[str, ...]  # length K
    units: Mapping[str, float]  # by objective: the start's spread within a prompt
    methods: tuple[MethodSummary, ...]
    runs: tuple[RunSummary, ...]
    prompts: int  # held out, distinct
    images: int  # held out, all prompts together


# ---------------------------------------------------------------------- statistics


def start_units(runs: Sequence[RunData]) -> Array:
    """Return the start's spread within a prompt, of every objective: ``[K]``.

    All runs start from the same model; what noisy rewards make of it is averaged.

    Raises:
        ValueError: If runs drew different samples, or have different objectives.
    """
    first = runs[0]
    for run in runs:
        if run.drawn != first.drawn or run.names != first.names:
            raise ValueError(
                f"`{run.folder}` should have the held-out samples and objectives of "
                f"`{first.folder}`. Found others."
            )
    units: Array = numpy.sqrt(numpy.mean(numpy.square([run.spread for run in runs]), axis=0))
    return units


def run_points(run: RunData, units: Array, draws: Array) -> Array:
    """Return a run's gains at each evaluation, on the prompts of each resample: ``[B, E, K]``.

    Args:
        run: The run, with P held-out prompts.
        units: The unit of each objective's gains, ``[K]``.
        draws: How often each prompt is in each resample, ``[B, P]``.
    """
    return resampled_means(run.changes / units[:, None], run.counts, draws)


def compare(runs: Sequence[RunData], *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Return the gains of every method, with intervals.

    Runs (seeds) and prompts are resampled with replacement, independently; the same prompts for
    all runs of a resample, since all draw the same. With a few runs such an interval is too narrow.

    Args:
        runs: Finished runs, of the same held-out samples and objectives.
        resamples: The number of resamples of the bootstrap.
        seed: The seed of the bootstrap.

    Raises:
        ValueError: If the runs cannot be compared.
    """
    if not runs:
        raise ValueError("No run has finished: there is nothing to compare.")
    units = start_units(runs)
    names = runs[0].names
    prompts = len(runs[0].prompts)
    prompt_draws = resample(prompts, resamples=resamples, seed=seed)
    labels = list(dict.fromkeys(run.method for run in runs))
    methods, summaries = [], []
    for label in labels:
        mine = [run for run in runs if run.method == label]
        own = [run_points(run, units, numpy.ones((1, prompts))) for run in mine]  # [1, E, K]
        again = [run_points(run, units, prompt_draws) for run in mine]  # R of [B, E, K]
        own_runs = [
            _summarise_run(run, points[0], float(hypervolumes(points)[0]))
            for run, points in zip(mine, own, strict=True)
        ]
        run_draws = resample(len(mine), resamples=resamples, seed=seed + 1)
        last = numpy.stack([points[0, -1] for points in own])  # [R, K]
        last_again = numpy.stack([points[:, -1] for points in again])  # [R, B, K]
        methods.append(
            MethodSummary(
                method=label,
                seeds=tuple(run.seed for run in mine),
                gains={
                    name: estimate(last[:, k], last_again[:, :, k], run_draws)
                    for k, name in enumerate(names)
                },
                worst=estimate(last.min(1), last_again.min(2), run_draws),
                hypervolume=estimate(
                    numpy.array([run.hypervolume for run in own_runs]),
                    numpy.stack([hypervolumes(points) for points in again]),
                    run_draws,
                ),
                above=_mean([run.above for run in own_runs]),
                shares=_means([run.shares for run in own_runs]),
                rollouts=_mean([run.rollouts for run in own_runs]),
                minutes=_mean([run.minutes for run in own_runs]),
                seconds=_means([run.seconds for run in own_runs]),
            )
        )
        summaries += own_runs
    methods.sort(key=lambda method: _last_if_nan(method.worst.value))
    return Comparison(
        names=names,
        units=dict(zip(names, units.tolist(), strict=True)),
        methods=tuple(methods),
        runs=tuple(summaries),
        prompts=prompts,
        images=runs[0].images,
    )


def _summarise_run(run: RunData, path: Array, hypervolume: float) -> RunSummary:
    """Summarise one run; ``path [E, K]`` are its gains at each evaluation."""
    gains = path[-1].tolist()
    rows = run.metrics
    phases = sorted({key for row in rows for key in row if key.startswith("seconds/")})
    return RunSummary(
        method=run.method,
        seed=run.seed,
        folder=run.folder,
        rollouts=run.steps[-1],
        minutes=training_seconds(rows) / 60,
        gains=dict(zip(run.names, gains, strict=True)),
        worst=float(numpy.min(path[-1])),
        above=_mean([float(gain > 0) for gain in gains if not math.isnan(gain)]),
        hypervolume=hypervolume,
        path={
            step: dict(zip(run.names, point.tolist(), strict=True))
            for step, point in zip(run.steps[1:], path, strict=True)
        },
        shares={
            name: _mean([share for row in rows if (share := row.get(f"share/{name}")) is not None])
            for name in run.names
        },
        seconds={
            key.removeprefix("seconds/"): _mean([row.get(key) or 0.0 for row in rows])
            for key in phases
        },
    )


def opposed(comparison: Comparison) -> tuple[str, str]:
    """Return the two objectives whose final gains correlate most negatively over all runs."""
    pairs = list(itertools.combinations(comparison.names, 2))

    def correlation(pair: tuple[str, str]) -> float:
        rows = numpy.array([[run.gains[name] for name in pair] for run in comparison.runs])
        rows = rows[~numpy.isnan(rows).any(1)]
        if len(rows) < 3 or not (rows.std(0) > 0).all():
            return math.inf  # two points always correlate with 1 or -1
        return float(numpy.corrcoef(rows.T)[0, 1])

    return min(pairs, key=correlation)


def read_pair(text: str | None, names: Sequence[str]) -> tuple[str, str] | None:
    """Return the two objectives that ``"a,b"`` names; None if the text is None.

    Raises:
        ConfigError: If it does not name two different objectives.
    """
    if text is None:
        return None
    pair = [name.strip() for name in text.split(",")]
    if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(names):
        raise ConfigError(f"--pair: should name two of {', '.join(names)}. Found {text!r}.")
    return pair[0], pair[1]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over mappings by key; a missing key counts as 0, NaN not at all."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return {
        key: _mean([value for row in rows if not math.isnan(value := row.get(key, 0.0))])
        for key in keys
    }


def _last_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else -value


# ---------------------------------------------------------------------- writing


def table(comparison: Comparison, failures: Mapping[str, str]) -> str:
    """Return a Markdown table, one row per method, and a sentence about each method that harms.

    Columns are padded, so that it reads as well on a terminal.

    Args:
        comparison: The comparison of the runs that finished.
        failures: What runs that died said last, by name.
    """
    heads = ["method", *comparison.names, "worst", "hypervolume", "biggest share"]
    rows = [[*heads, "rollouts", "minutes"]]
    for method in comparison.methods:
        name, share = method.biggest()
        gains = [*method.gains.values(), method.worst]
        rows.append(
            [
                method.method,
                *(gain.text("+.2f") for gain in gains),
                method.hypervolume.text(".3f"),
                f"{share:.0%} {name}" if name else "-",
                f"{method.rollouts:.4g}",
                f"{method.minutes:.1f}",
            ]
        )
    return "\n\n".join([markdown(rows), *_sentences(comparison, failures)]) + "\n"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return everything, per method and per run, with null for what is not known."""
    values: dict[str, Any] = without_nan(dataclasses.asdict(comparison))
    return values


def _sentences(comparison: Comparison, failures: Mapping[str, str]) -> list[str]:
    counts = sorted({len(method.seeds) for method in comparison.methods})
    seeds = "-".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    runs = "run" if seeds == "1" else "runs"
    sentences = [
        f"Gains over the start of training, in units of its spread within a prompt; "
        f"{comparison.prompts} held-out prompts, {comparison.images} samples, {seeds} {runs} each. "
        f"In brackets {LEVEL:.0%} bootstrap intervals over runs and prompts, too narrow with few "
        "runs. The hypervolume is that between the start and what the evaluations of a run "
        "dominate; it is 0 where none has all objectives above the start."
    ]
    if alone := [one.method for one in comparison.methods if not one.tells_of_seeds]:
        sentences.append(
            f"With one run the interval is over prompts alone and says nothing about other seeds, "
            f"so nothing is claimed of {', '.join(alone)}."
        )
    for method in comparison.methods:
        if below := method.below():
            gains = ", ".join(f"{name} {method.gains[name].text('+.2f')}" for name in below)
            sentences.append(f"{method.method} ends significantly below the start: {gains}.")
    sentences += [f"Not in the table: {name} died: {words}" for name, words in failures.items()]
    return sentences
