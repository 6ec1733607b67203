"""Stable Diffusion 3 and 3.5 (any size) with LoRA as a policy.

Denoising is a Markov decision process (DDPO, arXiv 2305.13301): a decision is one stochastic
step, its log-probability a Gaussian's. Outside the trained window the steps are deterministic
(Flow-GRPO's "fast" variant, MixGRPO, arXiv 2507.21802).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
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
from moa_diffusion.data.seeds import derive_seed, generator
from moa_diffusion.policies import lora, samplers
from moa_diffusion.policies.forward import JointAttention, backend
from moa_diffusion.policies.hub import check_reachable
from moa_diffusion.policies.prompt_encoder import PromptEncoder
from moa_diffusion.processes.sharding import shard_frozen
from moa_diffusion.types import ConfigError, Request, Rollout, take

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_pipeline(path: str, *, revision: str | None = None) -> None:
    """Read the pipeline's index and nothing else.

    Raises:
        ConfigError: If there is no pipeline, or one of another class.
    """
    from diffusers import StableDiffusion3Pipeline

    check_reachable(path, "model_index.json", revision=revision)
    try:
        index = StableDiffusion3Pipeline.load_config(path, revision=revision)
    except OSError as error:
        raise ConfigError(
            "policy.path: should be a folder with a model_index.json or a hub id that can be "
            f"reached. Found {path!r}: {error}"
        ) from error
    if index.get("_class_name") != "StableDiffusion3Pipeline":
        raise ConfigError(
            "policy.path: should be a Stable Diffusion 3 pipeline. "
            f"Found {index.get('_class_name')!r} in {path!r}."
        )


def check_fit(
    path: str,
    *,
    revision: str | None,
    resolution: int,
    target_modules: Sequence[str] | None,
    attention: str = "native",
) -> None:
    """Check settings against a pipeline's configuration files, before its weights are read.

    Args:
        path: Folder or hub id.
        revision: Revision of a hub id.
        resolution: Side of the square images, in pixels.
        target_modules: Suffixes of the linear layers that get an adapter.
        attention: The attention backend.

    Raises:
        ConfigError: If there is no Stable Diffusion 3 pipeline, or a setting does not fit it.
        ValueError: If a target names no layer, or there is no such backend.
    """
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    check_pipeline(path, revision=revision)
    options: dict[str, Any] = {"revision": revision}
    try:
        vae = AutoencoderKL.load_config(path, subfolder="vae", **options)
        shape = SD3Transformer2DModel.load_config(path, subfolder="transformer", **options)
    except OSError as error:
        raise ConfigError(
            f"policy.path: the configuration files in {path!r} are missing or damaged: {error}"
        ) from error
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(shape)
    lora.check_targets(transformer, target_modules or lora.ATTENTION)
    backend(attention)
    latent_shape(transformer.config, 2 ** (len(vae["block_out_channels"]) - 1), resolution)


def latent_shape(config: Any, factor: int, resolution: int) -> tuple[int, int, int]:
    """Return the shape ``(C, h, w)`` of the latents of a square image.

    Args:
        config: Config of the transformer.
        factor: Pixels per latent along a side.
        resolution: Side of the image, in pixels.

    Raises:
        ConfigError: If the transformer cannot draw it.
    """
    multiple = factor * config.patch_size
    largest = config.pos_embed_max_size * multiple
    if resolution % multiple or not 0 < resolution <= largest:
        raise ConfigError(
            f"sampling.resolution: should be a multiple of {multiple}, at most {largest}. "
            f"Found {resolution}."
        )
    return (config.in_channels, resolution // factor, resolution // factor)


def load_pipeline(
    path: str, *, revision: str | None = None, dtype: str = "float32", vae_dtype: str = "float32"
) -> Any:
    """Load a Stable Diffusion 3 pipeline from a folder or a hub id, cast once.

    Args:
        path: Folder or hub id.
        revision: Revision of a hub id.
        dtype: Data type of transformer and text encoders: 'float32', 'bfloat16' or 'float16'.
        vae_dtype: Data type of the VAE, likewise.

    Raises:
        ConfigError: Before any weight is read, if there is no pipeline or one of another class.
    """
    from diffusers import StableDiffusion3Pipeline
    from safetensors import SafetensorError

    check_pipeline(path, revision=revision)
    load: Any = StableDiffusion3Pipeline.from_pretrained
    kinds = {"default": DTYPES[dtype], "vae": DTYPES[vae_dtype]}
    try:
        pipeline = load(path, revision=revision, dtype=kinds)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"policy.path: the weights in {path!r} are missing or damaged: {error}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _attend(transformer: nn.Module, attention: str) -> None:
    """Have every attention layer attend as ``JointAttention`` does.

    It is called directly: diffusers inspects a processor's signature in each call, to drop
    arguments that it does not know. There are none here, and that costs 3 % of a small model's
    forward pass.

    Raises:
        ValueError: If a layer has another processor than Stable Diffusion 3's own, or diffusers no
            such backend.
    """
    from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

    attend = JointAttention(attention)
    for module in transformer.modules():
        if isinstance(module, Attention):
            if type(module.processor) is not JointAttnProcessor2_0:
                raise ValueError(
                    "Parameter `pipeline` should have attention layers with a "
                    f"JointAttnProcessor2_0. Found {type(module.processor).__name__}."
                )
            module.forward = partial(attend, module)


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

        self.lockstep = settings.shard
        self.transformer: Any = pipeline.transformer
        if not settings.shard:
            self.transformer.to(device)
        lora.attach(
            self.transformer,
            rank=settings.lora.rank,
            alpha=settings.lora.numerator,
            target_modules=settings.lora.target_modules or lora.ATTENTION,
            seed=derive_seed(seed, "lora"),
            merge=not settings.shard,  # a copy of every weight would undo the split
        )
        _attend(self.transformer, settings.attention)
        if settings.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.transformer.train()  # checkpointing asks for it; the model has no dropout
        if settings.shard:
            shard_frozen(self.transformer, self.transformer.transformer_blocks, device)
        self._trainable = lora.parameters(self.transformer)
        self._adapted = lora.layers(self.transformer)

        self.vae: Any = pipeline.vae.to(device).requires_grad_(False).eval()
        if device.type in ("cpu", "cuda"):  # whose convolutions and norms have kernels for it
            self.vae.to(memory_format=torch.channels_last)
        self.scheduler = pipeline.scheduler
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
        # Coefficients of all steps are on the device once: numbers sent there one by one wait.
        self._sigmas = self._schedule(sampling.steps)
        self._sigma = torch.tensor(self._sigmas, dtype=torch.float32, device=device)
        self._deterministic = self._euler(self._sigmas)
        self._stochastic = samplers.Steps.of(  # every step that may be trained
            [self._stochastic_step(s, s_next) for s, s_next in pairwise(self._sigmas[:-1])], device
        )
        self._eval_sigmas = self._schedule(evaluation.steps)
        self._eval_deterministic = self._euler(self._eval_sigmas)
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
                x = self._deterministic[i : i + 1].mean(x, v)
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
        s = self._sigma[numbers].repeat(n)
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
        with torch.no_grad(), lora.disabled(self._adapted):
            v_ref = self._velocity(x, s, embeds, self.sampling.guidance)
        return log_probs, coefficients.kl(v, v_ref, self.kl).view(n, -1)

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> Tensor:
        """Draw images ``[n, 3, H, W]`` deterministically, with the settings of evaluations."""
        embeds = self._embeds([request.prompt for request in requests], self.evaluation.guidance)
        x = self._start(requests, samplers.generators([request.seed for request in requests]))
        for i, s in enumerate(self._eval_sigmas[:-1]):
            v = self._velocity(x, x.new_full((len(x),), s), embeds, self.evaluation.guidance)
            x = self._eval_deterministic[i : i + 1].mean(x, v)
        return self._decode(x)

    def trainable(self) -> Mapping[str, nn.Parameter]:
        """Return A and B of every LoRA layer of the transformer."""
        return self._trainable

    def reference(self) -> AbstractContextManager[None]:
        """Switch the LoRA layers off within the block."""
        return lora.disabled(self._adapted)

    def tapped(self) -> Sequence[Any]:
        """Return the LoRA layers that can be tapped."""
        return lora.tapped(self._adapted)

    def row_tokens(self, rollout: Rollout) -> int | None:
        """Return None: layers of images and of texts see different numbers of tokens."""
        return None  # images and texts have different numbers

    def step_chunks(self, decisions: int) -> list[slice]:
        """Return slices of ``policy.step_batch`` denoising steps."""
        size = self.settings.step_batch
        return [slice(i, i + size) for i in range(0, decisions, size)]

    def save(self, folder: Path) -> None:
        """Write the adapter as diffusers loads it."""
        lora.save_sd3(self.transformer, folder)

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
            x = self._deterministic[i : i + 1].mean(x, self._predict(i, x, embeds))
        return take(x, [distinct.index(start) for start in starts])

    def _predict(self, i: int, x: Tensor, embeds: tuple[Tensor, Tensor]) -> Tensor:
        """Predict the velocity ``[n, C, h, w]`` of a rollout's step ``i``, of all samples."""
        s = x.new_full((len(x),), self._sigmas[i])
        return self._velocity(x, s, embeds, self.sampling.guidance)

    def _velocity(
        self, x: Tensor, s: Tensor, embeds: tuple[Tensor, Tensor], guidance: float
    ) -> Tensor:
        """Predict the velocity ``[n, C, h, w]`` in float32, after guidance, at sigmas ``s [n]``."""
        guided = guidance > 1
        if guided:
            x, s = torch.cat([x, x]), torch.cat([s, s])
        with self._autocast():
            v: Tensor = self.transformer(
                hidden_states=x.to(self.dtype),
                timestep=s * self.scheduler.config.num_train_timesteps,
                encoder_hidden_states=embeds[0],
                pooled_projections=embeds[1],
                return_dict=False,
            )[0]
        v = v.float()
        if guided:
            unconditional, conditional = v.chunk(2)
            v = unconditional + guidance * (conditional - unconditional)
        return v

    def _stochastic_step(self, s: float, s_next: float) -> samplers.Step:
        level, second = self.sampling.noise_level, self._sigmas[1]
        step = self.sampler(s, s_next, noise_level=level, s_second=second)
        if not isinstance(step, samplers.Step) or not step.std > 0:
            raise ValueError(
                "Parameter `sampler` should return a Step whose `std` is positive. "
                f"Found {step!r} for the sigmas {s:g} and {s_next:g}."
            )
        return step

    def _start(self, requests: Sequence[Request], sources: Sequence[torch.Generator]) -> Tensor:
        """Return the initial noise ``[n, C, h, w]``, of the sample's own seed or its group's."""
        starts = [
            source
            if request.start_seed is None
            else torch.Generator("cpu").manual_seed(request.start_seed)
            for request, source in zip(requests, sources, strict=True)
        ]
        return samplers.noise(starts, self.latent_shape, self.device)

    def _euler(self, sigmas: Sequence[float]) -> samplers.Steps:
        """Return all steps of a schedule as deployment takes them."""
        return samplers.Steps.of([samplers.ode(*pair) for pair in pairwise(sigmas)], self.device)

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
        pictures = [
            self.vae.decode(part, return_dict=False)[0].float()
            for part in scaled.to(self.vae.dtype).split(self.settings.vae_batch)
        ]
        return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1).cpu()

    def _schedule(self, steps: int) -> list[float]:
        """Return the sigmas of a schedule, ``steps + 1`` numbers from 1 down to 0."""
        scheduler, arguments = copy.deepcopy(self.scheduler), {}
        if scheduler.config.get("use_dynamic_shifting"):
            from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
                calculate_shift,
            )

            patch = self.transformer.config.patch_size
            tokens = (self.latent_shape[1] // patch) * (self.latent_shape[2] // patch)
            arguments["mu"] = calculate_shift(
                tokens,
                scheduler.config.get("base_image_seq_len", 256),
                scheduler.config.get("max_image_seq_len", 4096),
                scheduler.config.get("base_shift", 0.5),
                scheduler.config.get("max_shift", 1.16),
            )
        scheduler.set_timesteps(steps, device="cpu", **arguments)
        sigmas: list[float] = scheduler.sigmas.tolist()
        return sigmas

    def _autocast(self) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)
