"""Other settings that a run could have: what each would change, and what makes a run fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from moa_diffusion.config import Config
from moa_diffusion.planning.forecast import Forecast
from moa_diffusion.planning.gpus import Gpu
from moa_diffusion.planning.planner import Planner
from moa_diffusion.training.geometry import Geometry
from moa_diffusion.types import ConfigError

GUIDANCE, WINDOW, RESOLUTIONS, BATCHES = 4.5, 2, (512, 1024), (16, 8, 4, 2, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A run with other settings."""

    changes: tuple[str, ...]  # options and values; empty for the run as configured
    settings: Config
    geometry: Geometry
    judges: bool = True  # whether reward models stand on the card

    def forecast(self, planner: Planner) -> Forecast:
        """Return what it takes."""
        return planner.forecast(self.settings, geometry=self.geometry, judges=self.judges)

    def changed(self, section: str, **values: Any) -> Variant:
        """Return this variant with other values in a section of the configuration."""
        changed = replace(getattr(self.settings, section), **values)
        settings = replace(self.settings, **{section: changed})
        return replace(self, settings=settings, changes=(*self.changes, *_options(section, values)))

    def cut(self, size: int) -> Variant:
        """Return this variant with micro-batches of another size.

        Passes of sampling keep their ratio to them in half precision, where they round alike.
        """
        values = {"micro_batch": size}
        if self.settings.policy.dtype != "float32":
            values["sample_batch"] = size * self.geometry.sample_batch // self.geometry.micro_batch
        changes = (*self.changes, *_options("trainer", values))
        return replace(self, geometry=replace(self.geometry, **values), changes=changes)

    def elsewhere(self) -> Variant:
        """Return this variant with reward models on another card."""
        changes = (*self.changes, "reward models on a server (the head `remote`)")
        return replace(self, judges=False, changes=changes)


def variants(planner: Planner) -> Iterator[Variant]:
    """Return the run as it is configured, and those that differ from it by one setting."""
    own = Variant(changes=(), settings=planner.settings, geometry=planner.geometry)
    sampling, policy = planner.settings.sampling, planner.settings.policy
    yield own
    if planner.settings.loss.kind != "forward":  # which has neither windows nor guidance
        for window in (0, WINDOW):
            if window != sampling.window and window < sampling.steps:
                yield own.changed("sampling", window=window)
        yield own.changed("sampling", guidance=1.0 if sampling.guidance > 1 else GUIDANCE)
    yield own.changed("policy", gradient_checkpointing=not policy.gradient_checkpointing)
    if planner.gpus > 1:
        yield own.changed("policy", shard=not policy.shard)
    yield from map(own.cut, _sizes(planner, smaller=False))
    for resolution in RESOLUTIONS:
        if resolution != sampling.resolution and _can_draw(planner, resolution):
            yield own.changed("sampling", resolution=resolution)
    if any(judge.weights for judge in planner.judges):
        yield own.changed("scoring", offload=not planner.settings.scoring.offload)
        yield own.elsewhere()


def remedy(planner: Planner, card: Gpu) -> Variant | None:
    """Return the cheapest change by which the run fits on a card; None if none of these does.

    Smaller passes cost the least, then moving the reward models, then checkpointing, then
    splitting the transformer, of which the links' time is not counted.
    """
    own = Variant(changes=(), settings=planner.settings, geometry=planner.geometry)
    bases = [own]
    if not planner.settings.scoring.offload:
        bases.append(own.changed("scoring", offload=True))
    if not planner.settings.policy.gradient_checkpointing:
        bases += [base.changed("policy", gradient_checkpointing=True) for base in bases]
    if planner.gpus > 1 and not planner.settings.policy.shard:
        bases += [base.changed("policy", shard=True) for base in bases]
    bases += [base.elsewhere() for base in bases if not base.settings.scoring.offload]
    smaller = _sizes(planner, smaller=True)
    tries = (v for base in bases for v in (base, *map(base.cut, smaller)))
    return next((variant for variant in tries if variant.forecast(planner).fits(card)), None)


def _sizes(planner: Planner, *, smaller: bool) -> list[int]:
    """Return other sizes of a micro-batch that cut the run's minibatches evenly."""
    cut = planner.geometry
    return [
        size
        for size in BATCHES
        if (size < cut.micro_batch if smaller else size != cut.micro_batch)
        and cut.per_update % size == 0
        and cut.per_rank * cut.micro_batch % (size * cut.sample_batch) == 0
    ]


def _can_draw(planner: Planner, resolution: int) -> bool:
    try:
        planner.shape.latent(resolution)
    except ConfigError:
        return False
    return True


def _options(section: str, values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(
        f"{section}.{name} {str(value).lower() if isinstance(value, bool) else value}"
        for name, value in values.items()
    )
