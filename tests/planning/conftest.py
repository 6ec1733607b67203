"""Costs of a transformer that need not be counted, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from moa_diffusion.planning import planner
from moa_diffusion.planning.passes import Linear, TransformerCost


def stated(shape: Any, policy: Any, *, resolution: int, tapped: bool) -> TransformerCost:
    """Costs that grow with the resolution, and that checkpointing changes."""
    area = resolution**2 / 64**2
    saved = 1e6 if policy.gradient_checkpointing else 50e6
    passes = 4 if policy.gradient_checkpointing else 3
    return TransformerCost(
        frozen_bytes=200_000_000,
        blocks_bytes=160_000_000,
        block_bytes=10_000_000,
        trained=1_000_000,
        adapted=10,
        forward_flops=1e12 * area,
        training_flops=passes * 1e12 * area,
        forward_moved=Linear(fixed=1e8, each=1e9 * area),
        training_moved=Linear(fixed=2e8, each=3e9 * area),
        forward_peak=Linear(fixed=0, each=1e6 * area),
        saved=Linear(fixed=2e6, each=saved * area),
        temporary=Linear(fixed=-1e6, each=2e6 * area),
    )


@pytest.fixture(scope="module")
def stated_costs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "transformer_cost", stated)
        yield
