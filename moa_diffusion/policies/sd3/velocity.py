"""The transformer with its LoRA: velocities of the policy, and of the reference."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa_diffusion.config.schema import PolicyConfig
from moa_diffusion.data.seeds import derive_seed
from moa_diffusion.policies import lora
from moa_diffusion.policies.forward import LoraForward
from moa_diffusion.policies.sd3.attention import attend
from moa_diffusion.policies.sd3.compiled import compile_blocks
from moa_diffusion.processes.sharding import shard_frozen


class Velocity:
    """A pipeline's transformer, given an adapter, as a function of latents and noise levels.

    Args:
        pipeline: A ``StableDiffusion3Pipeline``, whose transformer is changed in place.
        settings: The section ``policy``: the adapter, the attention, checkpointing,
            sharding and compiling.
        device: Where the transformer lives.
        seed: Decides the adapter's initial values.

    Raises:
        ValueError: If an attention layer has a processor of its own, or a target names no layer.

    Attributes:
        transformer: The ``SD3Transformer2DModel``.
        trainable: A and B of every LoRA layer, by name.
        adapted: The LoRA layers.
    """

    def __init__(
        self, pipeline: Any, *, settings: PolicyConfig, device: torch.device, seed: int
    ) -> None:
        self.transformer: Any = pipeline.transformer
        self._dtype, self._device = self.transformer.dtype, device
        self._timesteps: int = pipeline.scheduler.config.num_train_timesteps
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
        attend(self.transformer, settings.attention)
        if settings.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.transformer.train()  # checkpointing asks for it; the model has no dropout
        if settings.shard:
            shard_frozen(self.transformer, self.transformer.transformer_blocks, device)
        self.trainable = lora.parameters(self.transformer)
        self.adapted = lora.layers(self.transformer)
        self._kept: list[LoraForward] = []  # what compiled blocks cannot look after
        if settings.compile == "blocks":
            compile_blocks(self.transformer.transformer_blocks)
            self._kept = [own for layer in self.adapted if (own := lora.own_forward(layer))]

    def __call__(
        self, x: Tensor, s: Tensor, embeds: tuple[Tensor, Tensor], guidance: float
    ) -> Tensor:
        """Predict velocities ``[n, C, h, w]`` in float32, after guidance.

        Args:
            x: Latents ``[n, C, h, w]``, float32.
            s: Their sigmas ``[n]``.
            embeds: Embeddings of the prompts, and pooled ones; with guidance, those of the empty
                prompt come first.
            guidance: The scale of classifier-free guidance; 1 is none.
        """
        guided = guidance > 1
        if guided:
            x, s = torch.cat([x, x]), torch.cat([s, s])
        for own in self._kept:
            own.refresh()
        with self._autocast():
            v: Tensor = self.transformer(
                hidden_states=x.to(self._dtype),
                timestep=s * self._timesteps,
                encoder_hidden_states=embeds[0],
                pooled_projections=embeds[1],
                return_dict=False,
            )[0]
        v = v.float()
        if guided:
            unconditional, conditional = v.chunk(2)
            v = unconditional + guidance * (conditional - unconditional)
        return v

    def reference(self) -> AbstractContextManager[None]:
        """Switch the LoRA layers off within the block."""
        return lora.disabled(self.adapted)

    def save(self, folder: Path) -> None:
        """Write the adapter as diffusers loads it."""
        lora.save_sd3(self.transformer, folder)

    def _autocast(self) -> AbstractContextManager[object]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)
