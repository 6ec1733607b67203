"""Pictures that were drawn, as PNG files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from moa_diffusion.config import Config
from moa_diffusion.evaluation.output_cache import OutputCache, files_digest
from moa_diffusion.files.digests import json_digest
from moa_diffusion.files.writing import replaced
from moa_diffusion.types import ConfigError
from rewards.pictures import read_rgb


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How pictures are drawn, beside the model, the prompt and the seed."""

    steps: int
    guidance: float
    resolution: int  # side in pixels
    scheduler: str  # class; its settings are files of the base model
    dtype: str  # of the transformer
    vae_dtype: str
    max_sequence_length: int  # T5 tokens
    negative_prompt: str = ""
    kind: str = "ode"  # deterministic

    @classmethod
    def of(cls, settings: Config, path: str) -> Sampler:
        """Deployment settings: those of the section ``evaluation``.

        Args:
            settings: the configuration.
            path: folder or hub id of the pipeline.
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
        )


def base_digest(path: str, *, revision: str | None, memory: Path) -> str:
    """Digest of everything that a pipeline loads.

    Args:
        path: folder or hub id. Of a hub id the commit stands for the content.
        revision: of a hub id.
        memory: see ``files_digest``.

    Raises:
        ConfigError: if the commit of a hub id is not known.
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


class ImageCache(OutputCache[Tensor]):
    """A folder of PNG files."""

    suffix = ".png"

    def write(self, key: str, output: Tensor) -> None:
        """Store ``[3, H, W]`` in [0, 1], rounded to 8 bits."""
        pixels = (output.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
        with replaced(self.path(key)) as partial:
            Image.fromarray(pixels.cpu().numpy()).save(partial, format="PNG")

    def read(self, keys: Sequence[str]) -> Tensor:
        """Pictures ``[n, 3, H, W]`` float32 in [0, 1].

        Raises:
            ConfigError: naming a file that is damaged or not there.
        """
        return torch.stack([self._read(self.path(key)) for key in keys])

    def columns(self, key: str, folder: Path) -> dict[str, str]:
        """``image``, the file's path from the folder, and ``image_digest``, the key."""
        path = Path(os.path.relpath(self.path(key), folder)).as_posix()
        return {"image": path, "image_digest": key}

    @staticmethod
    def _read(path: Path) -> Tensor:
        try:
            pixels = read_rgb(path)
        except ValueError as error:
            raise ConfigError(
                f"Picture `{path}` cannot be read: {error}. Delete it, and it is drawn again."
            ) from error
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
