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
class Reached:
    """When a method's mean over runs reaches the best of a reference method's."""

    method: str
    best: float  # of its own mean, over its evaluations
    at: int  # images that it had then trained on
    until: int | None  # images until it reaches the reference's best; None: never


def paired_worst(
    runs: Sequence[RunData], subject: str, other: str, units: Mapping[str, float], *, seed: int = 0
) -> Estimate:
    """Return the worst gain of a method less that of another one, with its bootstrap interval.

    Runs of the same seed are paired, and resampled together; so are prompts.

    Args:
        runs: Finished runs of both, and of others.
        subject: The method in question.
        other: The method that it is compared with.
        units: Unit of each objective's gains, by name.
        seed: The seed of the bootstrap.

    Raises:
        ValueError: If no seed has runs of both.
    """
    by_seed = {
        method: {run.seed: run for run in runs if run.method == method}
        for method in (subject, other)
    }
    seeds = sorted(by_seed[subject].keys() & by_seed[other].keys())
    if not seeds:
        raise ValueError(
            f"`{subject}` and `{other}` should have runs of the same seed. Found none."
        )
    scale = numpy.array(list(units.values()))
    prompts = len(runs[0].prompts)
    draws = resample(prompts, resamples=RESAMPLES, seed=seed)

    def worst(method: str, drawn: Array) -> Array:
        chosen = [by_seed[method][one] for one in seeds]
        return numpy.stack([run_points(run, scale, drawn)[:, -1].min(1) for run in chosen])

    own = worst(subject, ones := numpy.ones((1, prompts)))[:, 0] - worst(other, ones)[:, 0]
    again = worst(subject, draws) - worst(other, draws)  # [R, B]
    return estimate(own, again, resample(len(seeds), resamples=RESAMPLES, seed=seed + 1))


def reached(
    comparison: Comparison, reference: str, *, images: Mapping[str, int], volume: bool
) -> list[Reached]:
    """Return for every method when its mean over runs reaches the best of the reference's.

    Args:
        comparison: The comparison of all methods.
        reference: The method whose best value is the target.
        images: Images per rollout, by method.
        volume: Whether the value is the hypervolume of the evaluations so far, or, if not, the
            worst gain.
    """
    curves = {
        method.method: _mean_curve(
            [run for run in comparison.runs if run.method == method.method], volume=volume
        )
        for method in comparison.methods
    }
    target = max(curves[reference].values())
    found = []
    for method, curve in curves.items():
        best = max(curve.values())
        until = [step for step, value in curve.items() if value >= target]
        at = next(step for step, value in curve.items() if value == best)
        found.append(
            Reached(
                method=method,
                best=best,
                at=at * images[method],
                until=min(until) * images[method] if until else None,
            )
        )
    return found


def _mean_curve(runs: Sequence[RunSummary], *, volume: bool) -> dict[int, float]:
    """Return the mean over runs by rollouts, at evaluations that all of them have."""
    steps = sorted(set.intersection(*(set(run.path) for run in runs)))
    values = []
    for run in runs:
        points = numpy.array([list(run.path[step].values()) for step in steps])  # [E, K]
        if volume:
            values.append(
                [float(hypervolumes(points[None, : e + 1])[0]) for e in range(len(steps))]
            )
        else:
            values.append(points.min(1).tolist())
    return dict(zip(steps, numpy.mean(values, axis=0).tolist(), strict=True))


def tables(
    differences: Mapping[str, Estimate],
    subject: str,
    curves: Mapping[str, Sequence[Reached]],
    reference: str,
) -> str:
    """Return both as Markdown, each with a sentence on how to read it.

    Args:
        differences: The subject's worst gain less that of each other method.
        subject: The method in question.
        curves: When methods reach the reference's best, by the name of the value.
        reference: The method whose best is the target.
    """
    rows = [["method", f"worst gain of {subject} less its own"]]
    rows += [[method, value.text("+.2f")] for method, value in differences.items()]
    parts = [
        markdown(rows),
        "Runs of the same seed are paired; the intervals are over seeds and prompts.",
    ]
    for name, found in curves.items():
        target = next(one.best for one in found if one.method == reference)
        head = ["method", f"best {name}", "at images", f"images until {reference}'s best"]
        rows = [
            [
                one.method,
                f"{one.best:+.3f}",
                str(one.at),
                "never" if one.until is None else str(one.until),
            ]
            for one in sorted(found, key=lambda one: math.inf if one.until is None else one.until)
        ]
        note = f"Means over runs at each evaluation; {reference}'s best {name} is {target:+.3f}."
        if name == "hypervolume" and target == 0:
            note += " It never has all objectives above the start, which any value equals."
        parts += [markdown([head, *rows]), note]
    return "\n\n".join(parts) + "\n"
