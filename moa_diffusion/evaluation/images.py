"""Pictures of Stable Diffusion 3 as what an evaluation draws."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from moa_diffusion import assembly
from moa_diffusion.adapters.diffusers import (
    WEIGHTS,
    Adapter,
    read_adapter,
    skeleton,
    write_adapter,
)
from moa_diffusion.config import Config
from moa_diffusion.config.schema import LoraConfig
from moa_diffusion.evaluation.image_cache import ImageCache, Sampler, base_digest
from moa_diffusion.policies.base import Policy
from moa_diffusion.policies.sd3 import check_fit
from moa_diffusion.types import Request


class Images:
    """See ``Medium``."""

    noun = "pictures"
    options: Mapping[str, str] = {
        "steps": "evaluation.steps",
        "guidance": "evaluation.guidance",
        "resolution": "sampling.resolution",
    }
    shared: Mapping[str, str | None] = {
        "policy.name": None,
        "policy.path": None,
        "policy.revision": None,
        "policy.dtype": "--policy.dtype",
        "policy.vae_dtype": "--policy.vae_dtype",
        "policy.max_sequence_length": "--policy.max_sequence_length",
        "sampling.resolution": "--resolution",
        "evaluation.steps": "--steps",
        "evaluation.guidance": "--guidance",
    }
    weights = WEIGHTS

    def check(self, settings: Config, prompts: Sequence[str]) -> None:
        """Any prompt can be drawn."""
        check_fit(
            assembly.model_path(settings),
            revision=settings.policy.revision,
            resolution=settings.sampling.resolution,
            target_modules=None,
        )

    def reader(self, settings: Config) -> Callable[[Path], Adapter]:
        transformer = skeleton(assembly.model_path(settings), revision=settings.policy.revision)
        return partial(read_adapter, transformer=transformer)

    def write_adapter(self, settings: Config, adapter: Adapter, folder: Path) -> None:
        write_adapter(adapter, folder)

    def copy_adapter(self, settings: Config, source: Path, folder: Path) -> None:
        shutil.copy(source / WEIGHTS, folder / WEIGHTS)

    def sampler(self, settings: Config, device: torch.device) -> Sampler:
        return Sampler.of(settings, assembly.model_path(settings))

    def base_digest(self, settings: Config, memory: Path) -> str:
        path, revision = assembly.model_path(settings), settings.policy.revision
        return base_digest(path, revision=revision, memory=memory)

    def cache(self, folder: Path) -> ImageCache:
        return ImageCache(folder / "images")

    def policy(self, settings: Config, lora: LoraConfig, device: torch.device) -> Policy:
        model = dataclasses.replace(settings.policy, lora=lora, adapter=None)
        return assembly.policy(dataclasses.replace(settings, policy=model), device)

    def request(self, prompt: str, seed: int) -> Request:
        """Starts from ``torch.Generator().manual_seed(seed)``, as in a plain pipeline call.

        So the pictures of one seed start alike whatever the prompt or the model.
        """
        return Request(prompt=prompt, seed=seed)
