"""Decisions along the forward process: images that are noised again, each with fresh noise.

Images are drawn without noise in between, and only they are kept. A decision is one of the noisy
versions of an image; what stands in the place of its log-probability says how well the velocity
there matches the way back to the image: see ``moa_diffusion.policies.matching``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from moa_diffusion.config.presets import forward_rules
from moa_diffusion.config.schema import LossConfig, SamplingConfig
from moa_diffusion.data.seeds import generator
from moa_diffusion.policies import matching, samplers
from moa_diffusion.policies.base import Terms
from moa_diffusion.policies.copies import AdapterCopy
from moa_diffusion.policies.sd3.decisions import Drawn, Embeds, initial_noise
from moa_diffusion.policies.sd3.schedule import Schedule, Walk
from moa_diffusion.policies.sd3.velocity import Velocity
from moa_diffusion.types import ConfigError, Request, Rollout

SHIFT = 3.0  # of the logit-normal noise levels, as Stable Diffusion 3 was pretrained with


class RenoisedImages:
    """Images that are noised again as decisions: see ``Decisions``.

    Args:
        velocity: The transformer with its adapter.
        schedule: The noise levels of sampling.
        sampling: The section ``sampling``, of which the solver is taken.
        loss: The section ``loss``: the rules in ``forward``.
        shape: Shape ``(C, h, w)`` of the latents.

    Raises:
        ConfigError: If there is guidance, or the rules do not go together, or with the schedule.

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
            raise ConfigError(
                "sampling.guidance: should be at most 1 for loss.kind forward, whose images and "
                f"training passes have none. Found {sampling.guidance:g}."
            )
        self._velocity, self._schedule, self._shape = velocity, schedule, shape
        self._solver = sampling.solver
        self._device, self._rules = schedule.sigma.device, forward_rules(loss.forward)
        rules = self._rules
        self._levels = [s for s in schedule.sigmas[:-1] if rules.first <= s <= rules.last]
        if rules.times in ("grid", "strata") and rules.draws > len(self._levels):
            raise ConfigError(
                f"loss.forward.draws: should be at most {len(self._levels)}, the noise levels of "
                f"sampling from {rules.first:g} to {rules.last:g}, for times {rules.times}. Found "
                f"{rules.draws}."
            )
        self.copies: Mapping[str, AdapterCopy] = {
            name: AdapterCopy(velocity.trainable, chosen) for name, chosen in rules.copies.items()
        }
        # Those whose velocities training needs; others only draw.
        self._anchors = [name for name, chosen in rules.copies.items() if chosen.weight]

    def trained_steps(self, step: int) -> Sequence[int]:
        """Return none: there are no log-probabilities that sampling and training share."""
        return ()

    def draw(self, requests: Sequence[Request], embeds: Embeds, *, step: int) -> Drawn:
        """Draw deterministically; a request's draws depend on its seed alone."""
        sources = samplers.generators([request.seed for request in requests])
        x = initial_noise(requests, sources, self._shape, self._device)
        old = self._rules.draws_with == "old"
        walk, norms = Walk(self._schedule, self._solver), []
        with self.copies["old"].applied() if old else nullcontext():
            for i, s in enumerate(self._schedule.sigmas[:-1]):
                v = self._velocity(x, x.new_full((len(x),), s), embeds, 1.0)
                norms.append(samplers.norm(v))
                x = walk(i, x, v)
        levels = torch.stack([self._times(request.seed) for request in requests])  # [n, T]
        return Drawn(
            latents=x,
            log_probs=x.new_zeros(levels.shape),
            trace={"latents": x, "levels": levels.to(self._device)},
            velocity_norm=torch.stack(norms).mean(0),
        )

    def terms(self, rollout: Rollout, steps: slice, embeds: Embeds, *, with_kl: bool) -> Terms:
        """Return how well velocities match ``[n, t]``, and the pulls that go with it."""
        rules, chosen = self._rules, range(*steps.indices(self._rules.draws))
        n, t = len(rollout), len(chosen)
        levels = rollout.trace["levels"][:, chosen.start : chosen.stop].flatten()  # [n t]
        sources = [generator(one.seed, "renoise", d) for one in rollout.requests for d in chosen]
        noise = samplers.noise(sources, self._shape, self._device)  # [n t, C, h, w]
        image = rollout.trace["latents"].repeat_interleave(t, 0)  # [n t, C, h, w]
        part = levels[:, None, None, None]
        x, u = (1 - part) * image + part * noise, noise - image

        def velocity() -> Tensor:
            return self._velocity(x, levels, embeds, 1.0)

        anchors: dict[str, Tensor] = {}
        with torch.no_grad():  # first: parameters may not change below a graph
            for name in self._anchors:
                with self.copies[name].applied():
                    anchors[name] = velocity()
            if with_kl:
                with self._velocity.reference():
                    anchors["reference"] = velocity()
        v = velocity()
        match = self._match(v, u, levels, anchors)
        score = rules.scale * match.score * (levels if rules.by_time else 1.0)
        pulls = []
        for name in self._anchors:
            own = match.pull if name == "old" else None
            pull = matching.distance(v, anchors[name]) if own is None else own
            pulls.append(self.copies[name].settings.weight * pull)
        terms = {"log_probs": score}
        if pulls:
            terms["pull"] = torch.stack(pulls).sum(0)
        if with_kl:
            terms["kl"] = matching.distance(v, anchors["reference"])
            terms["norm"] = samplers.norm(v) / samplers.norm(anchors["reference"])
        return Terms(**{name: term.view(n, t) for name, term in terms.items()})

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
        place = torch.arange(count) + torch.rand(count, generator=source, dtype=torch.float64)
        if rules.times == "strata":  # one of each of `count` parts of the noise levels
            last = len(self._levels) - 1
            rows = (place * len(self._levels) / count).long().clamp(max=last)  # where it rounds up
            return torch.tensor(self._levels)[rows]
        place = place / count  # stratified in [0, 1]
        if rules.times == "logit_normal":
            sigma = torch.special.ndtri(place).sigmoid()
            place = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        return (rules.first + (rules.last - rules.first) * place).float()
