"""Published settings of the losses along the forward process, and what a run makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from moa_diffusion.config.schema import CopyConfig, ForwardConfig
from moa_diffusion.types import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyRules:
    """A ``CopyConfig`` with nothing left open; its defaults are those without a preset."""

    weight: float = 0.0
    decay_rate: float = 0.0
    decay_limit: float = 0.5
    decay_after: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardRules:
    """A ``ForwardConfig`` with nothing left open; its defaults are those without a preset."""

    match: Literal["mse", "huber", "branches"] = "mse"
    times: Literal["grid", "strata", "uniform", "logit_normal"] = "uniform"
    draws: int = 4
    first: float = 0.0
    last: float = 1.0
    scale: float = 1.0
    by_time: bool = False
    beta: float = 1.0
    draws_with: Literal["current", "old"] = "current"
    old: CopyRules = CopyRules()
    average: CopyRules = CopyRules()

    @property
    def copies(self) -> dict[str, CopyRules]:
        """The copies of the adapter that drawing or training needs."""
        looked_at = self.match == "branches" or self.draws_with == "old"
        old = {"old": self.old} if looked_at or self.old.weight else {}
        return old | ({"average": self.average} if self.average.weight else {})


# The weights of the pulls to the reference, which all three have, are `loss.kl_weight`.
PRESETS = {
    # DiffusionNFT (arXiv 2509.16117), its code's settings for several rewards but for beta, which
    # is 0.1 there and for legible text, and 1 elsewhere.
    "nft": ForwardRules(
        match="branches",
        times="grid",
        draws=9,
        draws_with="old",
        old=CopyRules(weight=5.0, decay_rate=0.001, decay_limit=0.5),
    ),
    # AWM (arXiv 2509.25050), its code's settings. Advantages are clipped at 5 and divided by it.
    "awm": ForwardRules(
        match="huber",
        times="strata",
        draws=6,
        first=0.1,
        scale=0.2,
        by_time=True,
        average=CopyRules(weight=1.0, decay_rate=0.001, decay_limit=0.3),
    ),
    # RAM (arXiv 2605.10759), after its equation; its code was not seen.
    "ram": ForwardRules(),
}


def forward_rules(settings: ForwardConfig) -> ForwardRules:
    """Return the preset's rules, with what the section ``loss.forward`` says instead.

    Raises:
        ConfigError: If they do not go together.
    """
    preset = PRESETS[settings.preset] if settings.preset else ForwardRules()
    rules = replace(
        preset,
        **_given(settings, ("preset", "old", "average")),
        old=replace(preset.old, **_given(settings.old)),
        average=replace(preset.average, **_given(settings.average)),
    )
    if rules.match == "branches" and not rules.old.weight:
        raise ConfigError(
            "loss.forward.old.weight: should be positive for match branches, where nothing else "
            "bounds how far velocities go from those of old. Found 0."
        )
    if not rules.first < rules.last:
        raise ConfigError(
            f"loss.forward.first: should be less than last, {rules.last:g}. Found {rules.first:g}."
        )
    return rules


def _given(section: ForwardConfig | CopyConfig, besides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what is not null in a section."""
    return {
        name: value
        for name, value in vars(section).items()
        if value is not None and name not in besides
    }
