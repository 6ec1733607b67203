"""Decisions along the reverse process: the denoising steps of a window, each with its noise.

Denoising is a Markov decision process (DDPO, arXiv 2305.13301): a decision is one stochastic
step, its log-probability a Gaussian's. Outside the trained window the steps are deterministic
(Flow-GRPO's "fast" variant, MixGRPO, arXiv 2507.21802).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moa_diffusion.config.schema import LossConfig, SamplingConfig
from moa_diffusion.data.seeds import generator
from moa_diffusion.policies import samplers
from moa_diffusion.policies.base import Terms
from moa_diffusion.policies.copies import AdapterCopy
from moa_diffusion.policies.sd3.decisions import Drawn, Embeds, initial_noise
from moa_diffusion.policies.sd3.schedule import Schedule, Walk
from moa_diffusion.policies.sd3.velocity import Velocity
from moa_diffusion.types import Request, Rollout, take


class ReverseSteps:
    """Stochastic denoising steps as decisions: see ``Decisions``.

    Args:
        velocity: The transformer with its adapter.
        schedule: The noise levels of sampling.
        sampling: The section ``sampling``: the window, its noise and the guidance.
        loss: The section ``loss``, of which the kind of KL is taken, what the clip looks at, and
            whether log-probs give way to ``samplers.Steps.even_score``, so that log ratios and
            gradients of all steps are of one size, or are weighed by the steps' noise.
        sampler: The kind of stochastic step.
        shape: Shape ``(C, h, w)`` of the latents.
        seed: Decides the windows.

    Raises:
        ValueError: If a trained step has no positive standard deviation.
    """

    def __init__(
        self,
        velocity: Velocity,
        schedule: Schedule,
        *,
        sampling: SamplingConfig,
        loss: LossConfig,
        sampler: samplers.StochasticSampler,
        shape: tuple[int, int, int],
        seed: int,
    ) -> None:
        self._velocity, self._schedule, self.sampling = velocity, schedule, sampling
        self.kl, self._scale, self._clip = loss.kl or "gaussian", loss.steps, loss.clip
        # What the trace keeps besides the latents.
        self._with_noise = self._scale == "equal" or self._clip != "ratio"
        self._shape, self._seed, self._device = shape, seed, schedule.sigma.device
        self.copies: Mapping[str, AdapterCopy] = {}
        self.stochastic = schedule.stochastic(sampler, sampling.noise_level)

    def trained_steps(self, step: int) -> range:
        """Return the denoising steps trained in rollout ``step``: equal on all ranks.

        The last step is never trained: its noise is so small that the likelihood overflows.
        """
        sampling = self.sampling
        eligible, window = sampling.steps - 1, sampling.window
        if window == 0:
            return range(eligible)
        places, first = eligible - window + 1, 0
        if sampling.window_mode == "random":
            draws = generator(self._seed, "window", step)
            first = int(torch.randint(places, (), generator=draws))
        elif sampling.window_mode == "slide":
            first = (step // sampling.window_stay) % places
        return range(first, first + window)

    def draw(self, requests: Sequence[Request], embeds: Embeds, *, step: int) -> Drawn:
        """Draw with noise in the steps of the window, and keep what trains them."""
        window = self.trained_steps(step)
        sources = samplers.generators([request.seed for request in requests])
        x, norms = self._before(window[0], requests, sources, embeds)
        walk = Walk(self._schedule, self.sampling.solver)  # behind the window
        latents, noises, log_probs = [], [], []
        for i in range(window[0], self.sampling.steps):
            v = self._predict(i, x, embeds)
            norms.append(samplers.norm(v))
            if i not in window:
                x = walk(i, x, v)
                continue
            steps = self.stochastic[i : i + 1]
            mean = steps.mean(x, v)
            latents.append(x)
            noises.append(samplers.noise(sources, self._shape, self._device))
            x = mean + steps.std * noises[-1]
            log_probs.append(self._score(steps, x, mean, v, noises[-1]))
            if i == window[-1]:
                latents.append(x)
        return Drawn(
            latents=x,
            log_probs=torch.stack(log_probs, dim=1),  # [n, T]
            trace={
                "latents": torch.stack(latents, dim=1),  # [n, T + 1, C, h, w]
                "first_step": torch.full((len(requests),), window[0]),  # [n], on the CPU
                # [n, T, C, h, w]
                **({"noise": torch.stack(noises, dim=1)} if self._with_noise else {}),
            },
            velocity_norm=torch.stack(norms).mean(0),
        )

    def terms(self, rollout: Rollout, steps: slice, embeds: Embeds, *, with_kl: bool) -> Terms:
        """Return log-probs ``[n, t]`` of denoising steps, recomputed from the latents kept."""
        n, chosen = len(rollout), range(*steps.indices(rollout.log_probs.shape[1]))
        first, latents = int(rollout.trace["first_step"][0]), rollout.trace["latents"]
        here = slice(chosen.start, chosen.stop)
        x = latents[:, here].flatten(0, 1)  # [n t, C, h, w], sample by sample
        numbers = slice(first + chosen.start, first + chosen.stop)
        coefficients = self.stochastic[numbers].repeat(n)
        s = self._schedule.sigma[numbers].repeat(n)
        v = self._velocity(x, s, embeds, self.sampling.guidance)
        mean = coefficients.mean(x, v)
        x_next = latents[:, chosen.start + 1 : chosen.stop + 1].flatten(0, 1)
        noise = rollout.trace["noise"][:, here].flatten(0, 1) if self._with_noise else None
        terms = {"log_probs": self._score(coefficients, x_next, mean, v, noise)}
        if self._clip != "ratio":
            assert noise is not None
            terms["moved"] = coefficients.moved(mean.detach(), x_next, noise, self._clip)
        if with_kl:
            with torch.no_grad(), self._velocity.reference():
                v_ref = self._velocity(x, s, embeds, self.sampling.guidance)
            terms["kl"] = coefficients.kl(v, v_ref, self.kl)
            terms["norm"] = samplers.norm(v) / samplers.norm(v_ref)
        return Terms(**{name: term.view(n, -1) for name, term in terms.items()})

    def _score(
        self, steps: samplers.Steps, x_next: Tensor, mean: Tensor, v: Tensor, noise: Tensor | None
    ) -> Tensor:
        """Return what advantages are multiplied with ``[N]``: log-probs, or what stands for them.

        Args:
            steps: Coefficients of the N steps.
            x_next: Latents that were drawn.
            mean: Their mean, as the policy has it.
            v: The policy's velocity.
            noise: Noise that they were drawn with; needed where steps are of one size.
        """
        if self._scale == "equal":
            assert noise is not None
            return steps.even_score(v, noise)
        log_prob = steps.log_prob(x_next, mean)
        if self._scale == "noise":
            return log_prob * (steps.std / self.stochastic.std.mean()).flatten()
        return log_prob

    def _before(
        self,
        first: int,
        requests: Sequence[Request],
        sources: Sequence[torch.Generator],
        embeds: Embeds,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the latents ``[n, C, h, w]`` that the first trained step starts from.

        Beside them stand the norms ``[n]`` of the velocities on the way there.

        The steps before it add no noise, so samples of one prompt that start from the same noise
        are the same until then: they are drawn once and copied. Trained steps are made for all n,
        as in training: kernels round by the number of rows.

        Args:
            first: Number of the first trained step.
            requests: The n samples to draw.
            sources: One generator per sample.
            embeds: The batch's embeddings, with guidance those of the empty prompt first.
        """
        starts = [
            row if request.start_seed is None else (request.prompt, request.start_seed)
            for row, request in enumerate(requests)
        ]
        distinct = list(dict.fromkeys(starts))
        rows, n = [starts.index(start) for start in distinct], len(requests)
        if first and len(rows) < n:
            chosen = [n * part + row for part in range(len(embeds[0]) // n) for row in rows]
            embeds = take(embeds[0], chosen), take(embeds[1], chosen)
        x = initial_noise(
            [requests[row] for row in rows],
            [sources[row] for row in rows],
            self._shape,
            self._device,
        )
        walk, norms = Walk(self._schedule, self.sampling.solver), []
        for i in range(first):
            v = self._predict(i, x, embeds)
            norms.append(samplers.norm(v))
            x = walk(i, x, v)
        places = [distinct.index(start) for start in starts]
        return take(x, places), [take(norm, places) for norm in norms]

    def _predict(self, i: int, x: Tensor, embeds: Embeds) -> Tensor:
        """Predict the velocity ``[n, C, h, w]`` of a rollout's step ``i``, of all samples."""
        s = x.new_full((len(x),), self._schedule.sigmas[i])
        return self._velocity(x, s, embeds, self.sampling.guidance)
