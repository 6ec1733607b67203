"""Decisions along the forward process: images that are noised again, each with fresh noise.

Images are drawn without noise in between, and only they are kept. A decision is one of the noisy
versions of an image; what stands in the place of its log-probability says how well the velocity
there matches the way back to the image: see ``moa_diffusion.policies.matching``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moa_diffusion.config.schema import CopyConfig, ForwardConfig, LossConfig, SamplingConfig
from moa_diffusion.data.seeds import generator
from moa_diffusion.policies import matching, samplers
from moa_diffusion.policies.base import Terms
from moa_diffusion.policies.copies import AdapterCopy
from moa_diffusion.policies.sd3.decisions import Drawn, Embeds, initial_noise
from moa_diffusion.policies.sd3.schedule import Schedule
from moa_diffusion.policies.sd3.velocity import Velocity
from moa_diffusion.types import Request, Rollout

SHIFT = 3.0  # of the logit-normal noise levels, as Stable Diffusion 3 was pretrained with


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """A ``ForwardConfig`` with nothing left open."""

    match: Literal["mse", "huber", "branches"] = "mse"
    times: Literal["grid", "strata", "uniform", "logit_normal"] = "uniform"
    draws: int = 4
    first: float = 0.0
    last: float = 1.0
    scale: float = 1.0
    by_time: bool = False
    beta: float = 1.0
    draws_with: Literal["current", "old"] = "current"
    old: CopyConfig | None = None
    average: CopyConfig | None = None


# The weights of the pulls to the reference, which all three have, are `loss.kl_weight`.
PRESETS = {
    # DiffusionNFT (arXiv 2509.16117), its code's settings for several rewards but for beta, which
    # is 0.1 there and for legible text, and 1 elsewhere.
    "nft": Rules(
        match="branches",
        times="grid",
        draws=9,
        draws_with="old",
        old=CopyConfig(weight=5.0, decay_rate=0.001, decay_limit=0.5),
    ),
    # AWM (arXiv 2509.25050), its code's settings. Advantages are clipped at 5 and divided by it.
    "awm": Rules(
        match="huber",
        times="strata",
        draws=6,
        first=0.1,
        scale=0.2,
        by_time=True,
        average=CopyConfig(weight=1.0, decay_rate=0.001, decay_limit=0.3),
    ),
    # RAM (arXiv 2605.10759), after its equation; its code was not seen.
    "ram": Rules(),
}


def rules_of(settings: ForwardConfig) -> Rules:
    """Return the preset's rules, with what the settings say instead.

    Raises:
        ValueError: If they do not go together.
    """
    rules = PRESETS[settings.preset] if settings.preset else Rules()
    given = {name: getattr(settings, name) for name in Rules.__dataclass_fields__}
    rules = replace(rules, **{name: value for name, value in given.items() if value is not None})
    needs = rules.match == "branches" or rules.draws_with == "old"
    if needs and rules.old is None:
        raise ValueError(
            "loss.forward.old: should be given (`old: {}` is the adapter as it was when the "
            f"rollout began) for match {rules.match} and draws_with {rules.draws_with}. Found null."
        )
    if not rules.first < rules.last:
        raise ValueError(
            f"loss.forward.first: should be less than last, {rules.last}. Found {rules.first}."
        )
    return rules


class RenoisedImages:
    """Images that are noised again as decisions: see ``Decisions``.

    Args:
        velocity: The transformer with its adapter.
        schedule: The noise levels of sampling.
        sampling: The section ``sampling``: the number of steps.
        loss: The section ``loss``: the rules in ``forward``.
        shape: Shape ``(C, h, w)`` of the latents.

    Raises:
        ValueError: If there is guidance, or the rules do not go together.

    Attributes:
        copies: The copies of the adapter, ``old`` and ``average`` as far as there are any.
    """

    def __init__(
        self,
        velocity: Velocity,
        schedule: Schedule,
        *,
        sampling: SamplingConfig,
        loss: LossConfig,
        shape: tuple[int, int, int],
    ) -> None:
        if sampling.guidance > 1:
            raise ValueError(
                "sampling.guidance: should be at most 1 for loss.kind forward, whose images and "
                f"training passes have none. Found {sampling.guidance:g}."
            )
        self._velocity, self._schedule, self._shape = velocity, schedule, shape
        self._device, self._rules = schedule.sigma.device, rules_of(loss.forward)
        rules = self._rules
        self._levels = [s for s in schedule.sigmas[:-1] if rules.first <= s <= rules.last]
        if rules.times in ("grid", "strata") and rules.draws > len(self._levels):
            raise ValueError(
                f"loss.forward.draws: should be at most {len(self._levels)}, the noise levels of "
                f"sampling from {rules.first:g} to {rules.last:g}, for times {rules.times}. Found "
                f"{rules.draws}."
            )
        settings = {"old": rules.old, "average": rules.average}
        self.copies: Mapping[str, AdapterCopy] = {
            name: AdapterCopy(velocity.trainable, chosen)
            for name, chosen in settings.items()
            if chosen is not None
        }

    def trained_steps(self, step: int) -> Sequence[int]:
        """Return none: there are no log-probabilities that sampling and training share."""
        return ()

    def draw(self, requests: Sequence[Request], embeds: Embeds, *, step: int) -> Drawn:
        """Draw deterministically; a request's draws depend on its seed alone."""
        sources = samplers.generators([request.seed for request in requests])
        x = initial_noise(requests, sources, self._shape, self._device)
        old = self._rules.draws_with == "old"
        with self.copies["old"].applied() if old else nullcontext():
            for i, s in enumerate(self._schedule.sigmas[:-1]):
                v = self._velocity(x, x.new_full((len(x),), s), embeds, 1.0)
                x = self._schedule.deterministic[i : i + 1].mean(x, v)
        return Drawn(
            latents=x,
            log_probs=x.new_zeros(len(requests), self._rules.draws),
            trace={
                "latents": x,
                "levels": torch.stack([self._times(request.seed) for request in requests]),
            },
        )

    def terms(self, rollout: Rollout, steps: slice, embeds: Embeds, *, with_kl: bool) -> Terms:
        """Return how well velocities match ``[n, t]``, and the pulls that go with it."""
        rules, chosen = self._rules, range(*steps.indices(self._rules.draws))
        n, t = len(rollout), len(chosen)
        levels = rollout.trace["levels"][:, chosen.start : chosen.stop].flatten()  # [n t]
        noise = torch.stack(
            [self._noise(request.seed, d) for request in rollout.requests for d in chosen]
        )
        levels, noise = levels.to(self._device), noise.to(self._device)
        image = rollout.trace["latents"].repeat_interleave(t, 0)  # [n t, C, h, w]
        part = levels[:, None, None, None]
        x, u = (1 - part) * image + part * noise, noise - image

        def velocity() -> Tensor:
            return self._velocity(x, levels, embeds, 1.0)

        anchors: dict[str, Tensor] = {}
        with torch.no_grad():  # first: parameters may not change below a graph
            for name, copy in self.copies.items():
                with copy.applied():
                    anchors[name] = velocity()
            if with_kl:
                with self._velocity.reference():
                    anchors["reference"] = velocity()
        v = velocity()
        match = self._match(v, u, levels, anchors)
        score = rules.scale * match.score * (levels if rules.by_time else 1.0)
        pulls = [
            copy.settings.weight
            * (
                match.pull
                if name == "old" and match.pull is not None
                else matching.distance(v, anchors[name])
            )
            for name, copy in self.copies.items()
            if copy.settings.weight
        ]
        kl = matching.distance(v, anchors["reference"]) if with_kl else None
        return Terms(
            score.view(n, t),
            None if kl is None else kl.view(n, t),
            torch.stack(pulls).sum(0).view(n, t) if pulls else None,
        )

    def _match(
        self, v: Tensor, u: Tensor, levels: Tensor, anchors: Mapping[str, Tensor]
    ) -> matching.Match:
        if self._rules.match == "mse":
            return matching.mse(v, u)
        if self._rules.match == "huber":
            return matching.huber(v, u)
        return matching.branches(v, u, anchors["old"], levels, self._rules.beta)

    def _times(self, seed: int) -> Tensor:
        """Return the noise levels ``[T]`` float32 of a sample's draws, on the CPU."""
        rules, source = self._rules, generator(seed, "noise levels")
        count = rules.draws
        if rules.times == "grid":
            order = torch.randperm(len(self._levels), generator=source)[:count]
            return torch.tensor(self._levels)[order]
        place = torch.rand(count, generator=source)
        if rules.times == "strata":  # one of each of `count` parts of the noise levels
            rows = ((torch.arange(count) + place) * len(self._levels) / count).long()
            return torch.tensor(self._levels)[rows]
        place = (torch.arange(count) + place) / count  # stratified in (0, 1)
        if rules.times == "logit_normal":
            sigma = torch.special.ndtri(place.double()).sigmoid()
            place = (SHIFT * sigma / (1 + (SHIFT - 1) * sigma)).float()
        return rules.first + (rules.last - rules.first) * place

    def _noise(self, seed: int, draw: int) -> Tensor:
        """Return the noise ``[C, h, w]`` of one of a sample's draws, on the CPU."""
        return torch.randn(self._shape, generator=generator(seed, "renoise", draw))
