"""Bootstrap intervals over prompts."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TypeAlias

import numpy
from numpy.typing import NDArray

Array: TypeAlias = NDArray[numpy.float64]

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean and its bootstrap interval; NaN where nothing is known."""

    value: float
    low: float
    high: float

    def text(self, form: str) -> str:
        """Return ``value [low, high]``, or a dash.

        Args:
            form: Format of each number, such as ``+.2f``.
        """
        if math.isnan(self.value):
            return "-"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def prompt_sums(values: Array, prompts: NDArray[numpy.int64]) -> tuple[Array, Array]:
    """Return the sum and the number of the values of each prompt's images: two ``[E, K, P]``.

    Args:
        values: Rewards ``[E, K, M]``; NaN does not count.
        prompts: Prompt of each image, ``[M]``.
    """
    known = ~numpy.isnan(values)
    _, index = numpy.unique(prompts, return_inverse=True)
    belongs = numpy.eye(index.max() + 1)[index]  # [M, P]
    return numpy.where(known, values, 0.0) @ belongs, known.astype(numpy.float64) @ belongs


def resampled_means(sums: Array, counts: Array, draws: Array) -> Array:
    """Return means over the images of resampled prompts: ``[B, E, K]``.

    Args:
        sums: Sums of each prompt's rewards, ``[E, K, P]``.
        counts: Number of images of each prompt that count, ``[E, K, P]``.
        draws: Number of times that each prompt is in each resample, ``[B, P]``; ones for the sample
            itself.

    Returns:
        NaN where an objective applies to none of the prompts drawn.
    """
    total = numpy.moveaxis(sums @ draws.T, -1, 0)  # [B, E, K]
    number = numpy.moveaxis(counts @ draws.T, -1, 0)
    return numpy.divide(total, number, out=numpy.full_like(total, math.nan), where=number > 0)


def resample(count: int, *, resamples: int, seed: int) -> Array:
    """Return how often each of ``count`` units is drawn with replacement, ``[B, count]``.

    Args:
        count: Number of units, such as prompts.
        resamples: Number B of resamples.
        seed: The seed of the draws.
    """
    generator = numpy.random.default_rng(seed)
    shares = numpy.full(count, 1 / count)
    return generator.multinomial(count, shares, size=resamples).astype(numpy.float64)


def estimate(own: Array, resampled: Array, runs: Array) -> Estimate:
    """Return the mean over R runs, with the interval of a bootstrap over runs and prompts.

    Args:
        own: Values ``[R]`` of the sample itself, one per run.
        resampled: Values ``[R, B]`` of each run on the prompts of each resample.
        runs: Number of times that each run is in each resample, ``[B, R]``.
    """
    drawn = numpy.where(runs.T > 0, runs.T * resampled, 0.0).sum(0) / len(own)  # [B]
    return Estimate(value=float(own.mean()), **_interval(drawn))


def estimate_one(own: float, resampled: Array) -> Estimate:
    """Return a statistic of one sample, with the percentile interval of a bootstrap ``[B]``."""
    return Estimate(value=float(own), **_interval(resampled))


def means_over_prompts(
    values: Array, prompts: NDArray[numpy.int64], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Estimate]:
    """Return the mean of each of K rewards, with the interval of a bootstrap over prompts.

    Args:
        values: Values ``[K, M]``; NaN does not count.
        prompts: Prompt of each value, ``[M]``.
        resamples: The number of resamples.
        seed: The seed of the draws.
    """
    sums, counts = prompt_sums(values[None], prompts)  # [1, K, P]
    number = sums.shape[-1]
    own = resampled_means(sums, counts, numpy.ones((1, number)))[0, 0]  # [K]
    drawn = resampled_means(sums, counts, resample(number, resamples=resamples, seed=seed))[:, 0]
    return [estimate_one(mean, again) for mean, again in zip(own, drawn.T, strict=True)]


def _interval(drawn: Array) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where nothing is known, NaN says so
        low, high = numpy.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"low": float(low), "high": float(high)}
