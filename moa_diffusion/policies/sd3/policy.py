"""Stable Diffusion 3 and 3.5 (any size) with LoRA as a policy.

What its decisions are is the business of ``Decisions``: see ``reverse.py``.
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
from moa_diffusion.policies import lora, samplers
from moa_diffusion.policies.base import Terms
from moa_diffusion.policies.sd3.decisions import Decisions, initial_noise
from moa_diffusion.policies.sd3.pipeline import latent_shape
from moa_diffusion.policies.sd3.prompt_encoder import PromptEncoder
from moa_diffusion.policies.sd3.renoised import RenoisedImages
from moa_diffusion.policies.sd3.reverse import ReverseSteps
from moa_diffusion.policies.sd3.schedule import Schedule, Walk
from moa_diffusion.policies.sd3.velocity import Velocity
from moa_diffusion.types import Generated, Request, Rollout, take


class SD3Policy:
    """A ``StableDiffusion3Pipeline`` whose transformer carries a LoRA adapter.

    Args:
        pipeline: A ``StableDiffusion3Pipeline``, taken over: its transformer gets the adapter and
            its text encoders leave after ``prepare``. The frozen weights and the forward pass
            keep its dtype; the adapter, latents and log-probs are float32 in any case.
        settings: The section ``policy``: the adapter, batches and caches; what loads the pipeline
            (path, revision and dtypes) is not looked at.
        sampling: The section ``sampling``: how rollouts are drawn.
        evaluation: The section ``evaluation``, of which the steps, the guidance and the resolution
            of ``generate`` are taken.
        loss: The section ``loss``, which says what decisions are and how they are scored.
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
        self.device, self.dtype = device, pipeline.transformer.dtype
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
        self._eval_shape = latent_shape(
            config,
            pipeline.vae_scale_factor,
            evaluation.resolution or sampling.resolution,
            key="evaluation.resolution",
        )
        self._schedule, self._eval_schedule = (
            Schedule(
                pipeline.scheduler,
                steps,
                tokens=(shape[1] // config.patch_size) * (shape[2] // config.patch_size),
                device=device,
            )
            for steps, shape in (
                (sampling.steps, self.latent_shape),
                (evaluation.steps, self._eval_shape),
            )
        )
        kind: Any = partial(ReverseSteps, sampler=self.sampler, seed=seed)
        if loss.kind == "forward":
            kind = RenoisedImages
        self._decisions: Decisions = kind(
            self._velocity,
            self._schedule,
            sampling=sampling,
            loss=loss,
            shape=self.latent_shape,
        )
        self.copies = self._decisions.copies
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
        """Draw images, and keep what trains them."""
        embeds = self._embeds([request.prompt for request in requests], self.sampling.guidance)
        drawn = self._decisions.draw(requests, embeds, step=step)
        x = drawn.latents
        return Rollout(
            requests=tuple(requests),
            log_probs=drawn.log_probs,
            mask=torch.ones_like(drawn.log_probs, dtype=torch.bool),
            trace=drawn.trace,
            images=self._decode(x),
            statistics=_norms(x, drawn.velocity_norm),
        )

    def trained_steps(self, step: int) -> Sequence[int]:
        """Return the numbers of the decisions trained in rollout ``step``: equal on all ranks."""
        return self._decisions.trained_steps(step)

    def log_probs(self, rollout: Rollout, steps: slice, *, with_kl: bool = False) -> Terms:
        """Return log-probs ``[n, t]`` of decisions, with gradient, and what goes with them."""
        embeds = self._embeds([r.prompt for r in rollout.requests], self.sampling.guidance)
        if (t := len(range(*steps.indices(rollout.log_probs.shape[1])))) > 1:
            embeds = embeds[0].repeat_interleave(t, 0), embeds[1].repeat_interleave(t, 0)
        return self._decisions.terms(rollout, steps, embeds, with_kl=with_kl)

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> Generated:
        """Draw images ``[n, 3, H, W]`` deterministically, with the settings of evaluations."""
        embeds = self._embeds([request.prompt for request in requests], self.evaluation.guidance)
        sources = samplers.generators([request.seed for request in requests])
        x = initial_noise(requests, sources, self._eval_shape, self.device)
        walk, norms = Walk(self._eval_schedule, self.evaluation.solver), []
        for i, s in enumerate(self._eval_schedule.sigmas[:-1]):
            v = self._velocity(x, x.new_full((len(x),), s), embeds, self.evaluation.guidance)
            norms.append(samplers.norm(v))
            x = walk(i, x, v)
        return Generated(outputs=self._decode(x), statistics=_norms(x, torch.stack(norms).mean(0)))

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


def _norms(latents: Tensor, velocity_norm: Tensor) -> dict[str, Tensor]:
    """Return what only the policy knows of samples, ``[n]`` each; waits for the device once."""
    norms = torch.stack([samplers.norm(latents), velocity_norm]).cpu()
    return dict(zip(("latent_norm", "velocity_norm"), norms, strict=True))
