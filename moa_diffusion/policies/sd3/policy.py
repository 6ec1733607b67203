"""Stable Diffusion 3 and 3.5 (any size) with LoRA as a policy.

Denoising is a Markov decision process (DDPO, arXiv 2305.13301): a decision is one stochastic
step, its log-probability a Gaussian's. Outside the trained window the steps are deterministic
(Flow-GRPO's "fast" variant, MixGRPO, arXiv 2507.21802).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moa_diffusion.config.schema import (
    EvaluationConfig,
    LossConfig,
    PolicyConfig,
    SamplingConfig,
)
from moa_diffusion.data.seeds import generator
from moa_diffusion.policies import lora, samplers
from moa_diffusion.policies.sd3.pipeline import latent_shape
from moa_diffusion.policies.sd3.prompt_encoder import PromptEncoder
from moa_diffusion.policies.sd3.schedule import Schedule
from moa_diffusion.policies.sd3.velocity import Velocity
from moa_diffusion.types import Request, Rollout, take


class SD3Policy:
    """A ``StableDiffusion3Pipeline`` whose transformer carries a LoRA adapter.

    Args:
        pipeline: A ``StableDiffusion3Pipeline``, taken over: its transformer gets the adapter and
            its text encoders leave after ``prepare``. The frozen weights and the forward pass
            keep its dtype; the adapter, latents and log-probs are float32 in any case.
        settings: The section ``policy``: the adapter, batches and caches; what loads the pipeline
            (path, revision and dtypes) is not looked at.
        sampling: The section ``sampling``: how rollouts are drawn.
        evaluation: The section ``evaluation``, of which the steps and the guidance of ``generate``
            are taken.
        loss: The section ``loss``, of which the kind of KL is taken, and whether log-probs give way
            to ``samplers.Steps.even_score``: log ratios and gradients of all steps are then of one
            size.
        device: Where the transformer and the VAE live.
        seed: Decides the adapter's initial values and the windows.
        source: Names the weights in the disk cache of prompt embeddings.
        turn: This process and how many there are, for a disk cache that they share.
        sampler: A stochastic step of one's own, in the place of the one that ``sampling`` names.

    Raises:
        ConfigError: If the transformer cannot draw images of the resolution.
        ValueError: If a trained step has no positive standard deviation, or an attention layer of
            the transformer a processor of its own.
    """

    row_per_sample = False

    def __init__(
        self,
        pipeline: Any,
        *,
        settings: PolicyConfig,
        sampling: SamplingConfig,
        evaluation: EvaluationConfig,
        loss: LossConfig,
        device: torch.device,
        seed: int,
        source: str = "",
        turn: tuple[int, int] = (0, 1),
        sampler: samplers.StochasticSampler | None = None,
    ) -> None:
        self.settings, self.sampling, self.evaluation = settings, sampling, evaluation
        if sampler is None and sampling.sampler not in samplers.SAMPLERS:
            raise ValueError(
                "Parameter `sampler` should be given where `sampling.sampler` is none of "
                f"{', '.join(samplers.SAMPLERS)}. Found {sampling.sampler!r}."
            )
        self.sampler = samplers.SAMPLERS[sampling.sampler] if sampler is None else sampler
        self.kl, self.even_steps = loss.kl or "gaussian", loss.steps == "equal"
        self.device, self.dtype, self.seed = device, pipeline.transformer.dtype, seed
        self.row_copies = 2 if sampling.guidance > 1 else 1  # the unconditional rows come first

        self._velocity = Velocity(pipeline, settings=settings, device=device, seed=seed)
        self.transformer, self.lockstep = self._velocity.transformer, settings.shard
        self.vae: Any = pipeline.vae.to(device).requires_grad_(False).eval()
        if device.type in ("cpu", "cuda"):  # whose convolutions and norms have kernels for it
            self.vae.to(memory_format=torch.channels_last)
        self.encode = PromptEncoder(
            pipeline,
            device=device,
            max_sequence_length=settings.max_sequence_length,
            source=f"{source}:{self.dtype}",
            cache_dir=None if settings.embeds_dir is None else Path(settings.embeds_dir),
            memory_gb=settings.embeds_memory_gb,
            turn=turn,
        )
        config = self.transformer.config
        self.latent_shape = latent_shape(config, pipeline.vae_scale_factor, sampling.resolution)
        self.dimensions = math.prod(self.latent_shape)
        patch = config.patch_size
        tokens = (self.latent_shape[1] // patch) * (self.latent_shape[2] // patch)
        schedule = partial(Schedule, pipeline.scheduler, tokens=tokens, device=device)
        self._schedule, self._eval_schedule = schedule(sampling.steps), schedule(evaluation.steps)
        self._stochastic = self._schedule.stochastic(self.sampler, sampling.noise_level)
        self._embedded: tuple[tuple[str, ...], tuple[Tensor, Tensor]] | None = None  # the last

    # ------------------------------------------------------------------ the Policy protocol

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode the prompts once, if their embeddings are to be kept."""
        self.encode.prepare(prompts)

    def expect(self, prompts: Sequence[str]) -> None:
        """Encode the prompts whose embeddings were not kept."""
        self.encode.expect(prompts)

    @torch.no_grad()
    def sample(self, requests: Sequence[Request], *, step: int) -> Rollout:
        """Draw images with noise in the steps of the window, and keep what trains them."""
        window = self.trained_steps(step)
        embeds = self._embeds([request.prompt for request in requests], self.sampling.guidance)
        sources = samplers.generators([request.seed for request in requests])
        x = self._before(window[0], requests, sources, embeds)
        latents, noises, log_probs = [], [], []
        for i in range(window[0], self.sampling.steps):
            v = self._predict(i, x, embeds)
            if i not in window:
                x = self._schedule.deterministic[i : i + 1].mean(x, v)
                continue
            steps = self._stochastic[i : i + 1]
            mean = steps.mean(x, v)
            latents.append(x)
            noises.append(samplers.noise(sources, self.latent_shape, self.device))
            x = mean + steps.std * noises[-1]
            even = self.even_steps
            log_probs.append(steps.even_score(v, noises[-1]) if even else steps.log_prob(x, mean))
            if i == window[-1]:
                latents.append(x)
        recorded = torch.stack(log_probs, dim=1)  # [n, T]
        return Rollout(
            requests=tuple(requests),
            log_probs=recorded,
            mask=torch.ones_like(recorded, dtype=torch.bool),
            trace={
                "latents": torch.stack(latents, dim=1),  # [n, T + 1, C, h, w]
                "first_step": torch.full((len(requests),), window[0]),  # [n], on the CPU
                # [n, T, C, h, w]
                **({"noise": torch.stack(noises, dim=1)} if self.even_steps else {}),
            },
            images=self._decode(x),
            statistics={"latent_norm": x.flatten(1).square().mean(1).sqrt().cpu()},
        )

    def log_probs(
        self, rollout: Rollout, steps: slice, *, with_kl: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probs ``[n, t]`` of denoising steps, recomputed from the latents kept."""
        n, chosen = len(rollout), range(*steps.indices(rollout.log_probs.shape[1]))
        first, latents = int(rollout.trace["first_step"][0]), rollout.trace["latents"]
        here = slice(chosen.start, chosen.stop)
        x = latents[:, here].flatten(0, 1)  # [n t, C, h, w], sample by sample
        numbers = slice(first + chosen.start, first + chosen.stop)
        coefficients = self._stochastic[numbers].repeat(n)
        s = self._schedule.sigma[numbers].repeat(n)
        embeds = self._embeds([r.prompt for r in rollout.requests], self.sampling.guidance)
        if (t := len(chosen)) > 1:
            embeds = embeds[0].repeat_interleave(t, 0), embeds[1].repeat_interleave(t, 0)
        v = self._velocity(x, s, embeds, self.sampling.guidance)
        if self.even_steps:
            log_probs = coefficients.even_score(v, rollout.trace["noise"][:, here].flatten(0, 1))
        else:
            x_next = latents[:, chosen.start + 1 : chosen.stop + 1].flatten(0, 1)
            log_probs = coefficients.log_prob(x_next, coefficients.mean(x, v))
        log_probs = log_probs.view(n, -1)
        if not with_kl:
            return log_probs, None
        with torch.no_grad(), self.reference():
            v_ref = self._velocity(x, s, embeds, self.sampling.guidance)
        return log_probs, coefficients.kl(v, v_ref, self.kl).view(n, -1)

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> Tensor:
        """Draw images ``[n, 3, H, W]`` deterministically, with the settings of evaluations."""
        embeds = self._embeds([request.prompt for request in requests], self.evaluation.guidance)
        x = self._start(requests, samplers.generators([request.seed for request in requests]))
        for i, s in enumerate(self._eval_schedule.sigmas[:-1]):
            v = self._velocity(x, x.new_full((len(x),), s), embeds, self.evaluation.guidance)
            x = self._eval_schedule.deterministic[i : i + 1].mean(x, v)
        return self._decode(x)

    def trainable(self) -> Mapping[str, nn.Parameter]:
        """Return A and B of every LoRA layer of the transformer."""
        return self._velocity.trainable

    def reference(self) -> AbstractContextManager[None]:
        """Switch the LoRA layers off within the block."""
        return self._velocity.reference()

    def tapped(self) -> Sequence[Any]:
        """Return the LoRA layers that can be tapped."""
        return lora.tapped(self._velocity.adapted)

    def row_tokens(self, rollout: Rollout) -> int | None:
        """Return None: layers of images and of texts see different numbers of tokens."""
        return None  # images and texts have different numbers

    def step_chunks(self, decisions: int) -> list[slice]:
        """Return slices of ``policy.step_batch`` denoising steps."""
        size = self.settings.step_batch
        return [slice(i, i + size) for i in range(0, decisions, size)]

    def save(self, folder: Path) -> None:
        """Write the adapter as diffusers loads it."""
        self._velocity.save(folder)

    # ------------------------------------------------------------------ parts

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
            draws = generator(self.seed, "window", step)
            first = int(torch.randint(places, (), generator=draws))
        elif sampling.window_mode == "slide":
            first = (step // sampling.window_stay) % places
        return range(first, first + window)

    def _before(
        self,
        first: int,
        requests: Sequence[Request],
        sources: Sequence[torch.Generator],
        embeds: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return the latents ``[n, C, h, w]`` that the first trained step starts from.

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
            chosen = [n * part + row for part in range(self.row_copies) for row in rows]
            embeds = take(embeds[0], chosen), take(embeds[1], chosen)
        x = self._start([requests[row] for row in rows], [sources[row] for row in rows])
        for i in range(first):
            x = self._schedule.deterministic[i : i + 1].mean(x, self._predict(i, x, embeds))
        return take(x, [distinct.index(start) for start in starts])

    def _predict(self, i: int, x: Tensor, embeds: tuple[Tensor, Tensor]) -> Tensor:
        """Predict the velocity ``[n, C, h, w]`` of a rollout's step ``i``, of all samples."""
        s = x.new_full((len(x),), self._schedule.sigmas[i])
        return self._velocity(x, s, embeds, self.sampling.guidance)

    def _start(self, requests: Sequence[Request], sources: Sequence[torch.Generator]) -> Tensor:
        """Return the initial noise ``[n, C, h, w]``, of the sample's own seed or its group's."""
        starts = [
            source
            if request.start_seed is None
            else torch.Generator("cpu").manual_seed(request.start_seed)
            for request, source in zip(requests, sources, strict=True)
        ]
        return samplers.noise(starts, self.latent_shape, self.device)

    def _embeds(self, prompts: Sequence[str], guidance: float) -> tuple[Tensor, Tensor]:
        """Return the embeddings of the batch; with guidance the empty prompt's come first.

        Each distinct prompt is sent to the device once, and those of the last batch stay there:
        the steps of a micro-batch share them.
        """
        batch = (*[""] * len(prompts), *prompts) if guidance > 1 else tuple(prompts)
        if self._embedded is None or self._embedded[0] != batch:
            distinct = list(dict.fromkeys(batch))
            rows = [distinct.index(prompt) for prompt in batch]
            embeds, pooled = (take(part.to(self.dtype), rows) for part in self.encode(distinct))
            self._embedded = batch, (embeds, pooled)
        return self._embedded[1]

    def _decode(self, latents: Tensor) -> Tensor:
        """Return images ``[n, 3, H, W]`` float32 in [0, 1] on the CPU."""
        config = self.vae.config
        scaled = latents / config.scaling_factor + config.shift_factor
        images = [
            self.vae.decode(part, return_dict=False)[0].float()
            for part in scaled.to(self.vae.dtype).split(self.settings.vae_batch)
        ]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1).cpu()
