"""The learning rate over a run."""

from __future__ import annotations

import math

import pytest

from moa_diffusion.assembly.learning_rate import learning_rate
from moa_diffusion.config.schema import OptimizerConfig


def rates(updates: int, **options: object) -> list[float]:
    rate = learning_rate(OptimizerConfig(lr=2.0, **options), updates)
    return [rate(count) for count in range(updates + 2)]


def test_it_rises_and_stays() -> None:
    assert rates(4, warmup=3) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rates(2) == [2.0] * 4


def test_it_falls_after_the_warmup_and_no_step_is_without_effect() -> None:
    assert rates(5, warmup=1, schedule="linear") == [1.0, 2.0, 1.5, 1.0, 0.5, 0.5, 0.5]
    half = 1 + math.cos(math.pi / 4)
    assert rates(4, schedule="cosine")[:2] == pytest.approx([2.0, half])  # float64
    assert min(rates(4, schedule="cosine")) > 0


def test_a_warmup_longer_than_the_run_ends_in_it() -> None:
    assert rates(2, warmup=3, schedule="linear") == [0.5, 1.0, 1.5, 2.0]
