"""One method against others: differences of paired runs, and images until another's best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy

from moa_diffusion.comparison.read import RunData
from moa_diffusion.comparison.results import Comparison, RunSummary, run_points
from moa_diffusion.report.markdown import markdown
from moa_diffusion.statistics.bootstrap import RESAMPLES, Array, Estimate, estimate, resample
from moa_diffusion.statistics.pareto import hypervolumes


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """The difference of two methods' worst gains, over pairs of runs."""

    seeds: tuple[int, ...]  # of the pairs
    difference: Estimate  # NaN without a pair


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """When a method's mean over runs reaches the best of a reference method's."""

    method: str
    best: float  # of its own mean, over its evaluations; NaN: it is known at none
    at: int | None  # images that it had then trained on
    until: int | None  # images until it reaches the reference's best; None: never, or no target


def paired_worst(
    runs: Sequence[RunData], subject: str, other: str, units: Mapping[str, float], *, seed: int = 0
) -> Paired:
    """Return the worst gain of a method less that of another one, with its bootstrap interval.

    Runs of the same seed are paired, and resampled together; so are prompts. Without such runs
    the difference is not known.

    Args:
        runs: Finished runs of both, and of others.
        subject: The method in question.
        other: The method that it is compared with.
        units: Unit of each objective's gains, by name.
        seed: The seed of the bootstrap.
    """
    by_seed = {
        method: {run.seed: run for run in runs if run.method == method}
        for method in (subject, other)
    }
    seeds = sorted(by_seed[subject].keys() & by_seed[other].keys())
    if not seeds:
        return Paired(seeds=(), difference=Estimate(value=math.nan, low=math.nan, high=math.nan))
    scale = numpy.array(list(units.values()))
    prompts = len(runs[0].prompts)
    draws = resample(prompts, resamples=RESAMPLES, seed=seed)

    def worst(method: str, drawn: Array) -> Array:
        chosen = [by_seed[method][one] for one in seeds]
        return numpy.stack([run_points(run, scale, drawn)[:, -1].min(1) for run in chosen])

    own = worst(subject, ones := numpy.ones((1, prompts)))[:, 0] - worst(other, ones)[:, 0]
    again = worst(subject, draws) - worst(other, draws)  # [R, B]
    seed_draws = resample(len(seeds), resamples=RESAMPLES, seed=seed + 1)
    return Paired(seeds=tuple(seeds), difference=estimate(own, again, seed_draws))


def reached(
    comparison: Comparison, reference: str, *, images: Mapping[str, int], volume: bool
) -> list[Reached]:
    """Return for every method when its mean over runs reaches the best of the reference's.

    Args:
        comparison: The comparison of all methods.
        reference: The method whose best value is the target.
        images: Images per rollout, by method.
        volume: Whether the value is the hypervolume of the evaluations so far, or, if not, the
            worst gain. A best hypervolume of 0 is no target: every method has it at once.
    """
    curves = {
        method.method: _mean_curve(
            [run for run in comparison.runs if run.method == method.method], volume=volume
        )
        for method in comparison.methods
    }
    target = max(curves[reference].values(), default=math.nan)
    none = volume and target == 0
    return [
        Reached(
            method=method,
            best=(best := max(curve.values(), default=math.nan)),
            at=_first(curve, best, images[method]),
            until=None if none else _first(curve, target, images[method]),
        )
        for method, curve in curves.items()
    ]


def _first(curve: Mapping[int, float], target: float, images: int) -> int | None:
    """Return the images until a curve by rollouts first is at least the target; None: never."""
    steps = [step for step, value in curve.items() if value >= target]
    return min(steps) * images if steps else None


def _mean_curve(runs: Sequence[RunSummary], *, volume: bool) -> dict[int, float]:
    """Return the mean over runs by rollouts, at evaluations at which it is known of all."""
    steps = sorted(set.intersection(*(set(run.path) for run in runs)))
    if not steps:
        return {}
    values = []
    for run in runs:
        points = numpy.array([list(run.path[step].values()) for step in steps])  # [E, K]
        if volume:
            values.append(
                [float(hypervolumes(points[None, : e + 1])[0]) for e in range(len(steps))]
            )
        else:
            values.append(points.min(1).tolist())
    means = zip(steps, numpy.mean(values, axis=0).tolist(), strict=True)
    return {step: value for step, value in means if not math.isnan(value)}


def paired_table(pairs: Mapping[str, Paired], subject: str) -> str:
    """Return the differences to other methods as Markdown, with a note on how to read it.

    Args:
        pairs: The subject's worst gain less that of each other method, by method.
        subject: The method in question.
    """
    rows = [["method", f"worst gain of {subject} less its own", "pairs"]]
    rows += [
        [method, one.difference.text("+.2f"), str(len(one.seeds))] for method, one in pairs.items()
    ]
    note = (
        f"Above 0, {subject} is better. Runs of the same seed are paired; the intervals are over "
        "seeds and prompts, and with one pair over prompts alone."
    )
    return markdown(rows) + f"\n\n{note}\n"


def reached_table(found: Sequence[Reached], reference: str, name: str) -> str:
    """Return when methods reach the reference's best as Markdown, with a note on how to read it.

    Args:
        found: A row per method.
        reference: The method whose best is the target.
        name: The name of the value.
    """
    target = next(one.best for one in found if one.method == reference)
    none = all(one.until is None for one in found)  # the reference itself reaches a target
    rows = [["method", f"best {name}", "at images", f"images until {reference}'s best"]]
    rows += [
        [
            one.method,
            "-" if one.at is None else f"{one.best:+.3f}",
            "-" if one.at is None else str(one.at),
            "-" if none else "never" if one.until is None else str(one.until),
        ]
        for one in sorted(found, key=lambda one: math.inf if one.until is None else one.until)
    ]
    note = "Means over runs at each evaluation"
    if not none:
        note += f"; {reference}'s best {name} is {target:+.3f}."
    elif math.isnan(target):
        note += f". The {name} of {reference} is not known, so there is nothing to reach."
    else:
        note += f". {reference} never has all above the start, so there is nothing to reach."
    return markdown(rows) + f"\n\n{note}\n"
