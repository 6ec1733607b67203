"""How a rollout is cut into forward passes, and where passes would round differently."""

from __future__ import annotations

import logging

from moa_diffusion.config import Config
from moa_diffusion.training.geometry import Geometry

logger = logging.getLogger(__name__)


def solve_geometry(settings: Config, world_size: int) -> Geometry:
    """Cut a rollout over this many processes, with a warning of smaller batches than stated.

    Raises:
        ConfigError: If the samples cannot be shared evenly.
    """
    options, half = settings.trainer, settings.policy.dtype != "float32"
    geometry = Geometry.solve(
        groups=options.groups,
        group_size=options.group_size,
        updates=options.updates,
        world_size=world_size,
        max_sample_batch=options.sample_batch,
        max_micro_batch=options.micro_batch,
        equal_rows=_rows_per_sample(settings) if half else None,
    )
    for key, stated, used, share in (
        ("sample_batch", options.sample_batch, geometry.sample_batch, geometry.per_rank),
        ("micro_batch", options.micro_batch, geometry.micro_batch, geometry.per_update),
    ):
        if used != stated:
            logger.warning(
                "trainer.%s: %d does not fit the %d samples that a process has%s%s; %d are taken. "
                "Forward passes of another size round differently: a run with another number of "
                "processes ends in the same parameters only if its passes have %d samples too.",
                *(key, stated, share),
                " in an optimizer step" if key == "micro_batch" else "",
                ", in passes of sampling and training that are to be equal" if half else "",
                *(used, used),
            )
    return geometry


def _rows_per_sample(settings: Config) -> int:
    """Return the rows that a sample has in a training pass.

    Guidance is not counted, since it doubles the rows of sampling as well.
    """
    if settings.policy.name == "causal_lm":
        return 1
    trained = settings.sampling.window or settings.sampling.steps - 1
    return min(settings.policy.step_batch, trained)


def unequal_batches(settings: Config, geometry: Geometry) -> str | None:
    """Return what to change if passes in half precision differ in size, and so in rounding."""
    if settings.policy.dtype == "float32":
        return None
    rows = _rows_per_sample(settings)
    trained = settings.sampling.window or settings.sampling.steps - 1
    if settings.policy.name != "causal_lm" and trained % rows:
        return (
            f"policy.step_batch: should divide the {trained} trained steps of a rollout in half "
            f"precision: forward passes of other sizes round differently. Found {rows}."
        )
    if geometry.sample_batch != geometry.micro_batch * rows:
        return (
            "trainer.sample_batch: should be at least policy.step_batch, and a number of samples "
            "that divides a process's share, in half precision: passes of sampling and training "
            f"then have equally many rows and round alike. Found {geometry.sample_batch} rows in "
            f"sampling and {geometry.micro_batch * rows} in training."
        )
    return None
