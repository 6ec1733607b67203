"""Images of Stable Diffusion 3 as what an evaluation draws."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from moa_diffusion import assembly
from moa_diffusion.adapters.diffusers import write_adapter
from moa_diffusion.config import Config
from moa_diffusion.config.schema import LoraConfig
from moa_diffusion.evaluation.sample_cache import ImageCache
from moa_diffusion.files.digests import files_digest, json_digest
from moa_diffusion.policies.adapters import Adapter, read_sd3_adapter, sd3_skeleton
from moa_diffusion.policies.base import Policy
from moa_diffusion.policies.lora_files import DIFFUSERS
from moa_diffusion.policies.sd3 import check_fit
from moa_diffusion.types import ConfigError, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSettings:
    """How images are drawn, beside the model, the prompt and the seed."""

    steps: int
    guidance: float
    resolution: int  # side in pixels
    scheduler: str  # class; its settings are files of the base model
    dtype: str  # the transformer's
    vae_dtype: str
    max_sequence_length: int  # T5 tokens
    negative_prompt: str = ""
    kind: str = "ode"  # deterministic, by Euler's steps if no solver is named

    @classmethod
    def of(cls, settings: Config, path: str) -> ImageSettings:
        """Return the deployment settings: those of the section ``evaluation``.

        Args:
            settings: The base model's configuration: ``evaluation``, ``sampling`` and ``policy``.
            path: Folder or hub id of the pipeline.
        """
        from diffusers import StableDiffusion3Pipeline

        index = StableDiffusion3Pipeline.load_config(path, revision=settings.policy.revision)
        return cls(
            steps=settings.evaluation.steps,
            guidance=settings.evaluation.guidance,
            resolution=settings.sampling.resolution,
            scheduler=index["scheduler"][1],
            dtype=settings.policy.dtype,
            vae_dtype=settings.policy.vae_dtype,
            max_sequence_length=settings.policy.max_sequence_length,
            kind="ode" if settings.evaluation.solver == "euler" else "ode, multistep",
        )


def base_digest(path: str, *, revision: str | None, memory: Path) -> str:
    """Return the digest of everything that a pipeline loads.

    Args:
        path: Folder or hub id. Of a hub id the commit stands for the content.
        revision: The revision of a hub id.
        memory: See ``files_digest``.

    Raises:
        ConfigError: If the commit of a hub id is not known.
    """
    from diffusers import StableDiffusion3Pipeline

    folder = Path(path)
    if not folder.is_dir():
        _, commit = StableDiffusion3Pipeline.load_config(
            path, revision=revision, return_commit_hash=True
        )
        if commit is None:
            raise ConfigError(f"policy.path: the commit of {path!r} is not known: name a folder.")
        return json_digest([path, commit])
    index = StableDiffusion3Pipeline.load_config(path)
    parts = sorted(name for name in index if not name.startswith("_") and (folder / name).is_dir())
    files = [file for part in parts for file in sorted((folder / part).rglob("*"))]
    files = [folder / "model_index.json", *(file for file in files if file.is_file())]
    return files_digest(folder, files, memory)


class Images:
    """See ``Medium``."""

    noun = "images"
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
        "evaluation.solver": "--evaluation.solver",
    }
    weights = DIFFUSERS

    def __init__(self, settings: Config) -> None:
        self.settings = settings
        self.path, self.revision = assembly.model_path(settings), settings.policy.revision

    def check(self, prompts: Sequence[str]) -> None:
        """Check that the settings fit the model; any prompt can be drawn."""
        check_fit(
            self.path,
            revision=self.revision,
            resolutions={"sampling.resolution": self.settings.sampling.resolution},
            target_modules=None,
        )

    def reader(self) -> Callable[[Path], Adapter]:
        """Return a reader that fits LoRA weights to the layers of a transformer without weights."""
        transformer = sd3_skeleton(self.path, revision=self.revision)
        return partial(read_sd3_adapter, transformer=transformer)

    def write_adapter(self, adapter: Adapter, folder: Path) -> None:
        """Write the one file that diffusers loads."""
        write_adapter(adapter, folder)

    def copy_adapter(self, source: Path, folder: Path) -> None:
        """Copy the one file that diffusers loads."""
        shutil.copy(source / DIFFUSERS, folder / DIFFUSERS)

    def deployment(self, device: torch.device) -> ImageSettings:
        """Return the deployment settings, which are the same on any device."""
        return ImageSettings.of(self.settings, self.path)

    def base_digest(self, memory: Path) -> str:
        """Return the digest of the pipeline's files."""
        return base_digest(self.path, revision=self.revision, memory=memory)

    def cache(self, folder: Path) -> ImageCache:
        """Return the cache of PNG files in ``images``."""
        return ImageCache(folder / "images")

    def policy(self, lora: LoraConfig, device: torch.device) -> Policy:
        """Build the policy of the configuration with this LoRA, which starts untrained."""
        model = dataclasses.replace(self.settings.policy, lora=lora, adapter=None)
        return assembly.policy(dataclasses.replace(self.settings, policy=model), device)

    def request(self, prompt: str, seed: int) -> Request:
        """Start from ``torch.Generator().manual_seed(seed)``, as in a plain pipeline call.

        So the images of one seed start alike whatever the prompt or the model.
        """
        return Request(prompt=prompt, seed=seed)
