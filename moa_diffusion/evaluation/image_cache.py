"""Pictures by what they are made from: the same model, prompt, seed and sampler draw once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from moa_diffusion.config import Config
from moa_diffusion.evaluation.files import file_digest, json_digest, replaced, write_text
from moa_diffusion.types import ConfigError

_VERSION = 1  # of what a key is made of


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
        memory: file where digests of large files are kept, by size and time of change.

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
    before = _remembered(memory)
    known, digests = dict(before), {}
    for file in [folder / "model_index.json", *(file for file in files if file.is_file())]:
        facts = file.stat()
        stamp = f"{file.resolve()}:{facts.st_size}:{facts.st_mtime_ns}"
        if stamp not in known:
            known[stamp] = file_digest(file)
        digests[str(file.relative_to(folder))] = known[stamp]
    if known != before:
        write_text(memory, "".join(f"{digest} {stamp}\n" for stamp, digest in known.items()))
    return json_digest(digests)


def _remembered(memory: Path) -> dict[str, str]:
    if not memory.is_file():
        return {}
    pairs = (line.split(" ", 1) for line in memory.read_text(encoding="utf-8").splitlines())
    return {stamp: digest for digest, stamp in pairs}


def model_digest(base: str, adapter: str) -> str:
    """Of the base model with an adapter; of the base model alone where that is empty."""
    return json_digest([base, adapter]) if adapter else base


class ImageCache:
    """A folder of PNG files, each named by the digest of what it was drawn from.

    The pixels of another machine may differ in the last bit; the key does not know the machine.

    Args:
        folder: made when the first picture is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def key(*, model: str, prompt: str, seed: int, sampler: Sampler) -> str:
        """Digest of everything that a picture depends on."""
        return json_digest([_VERSION, model, prompt, seed, asdict(sampler)])

    def path(self, key: str) -> Path:
        """Where the picture is, or would be."""
        return self.folder / f"{key}.png"

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those that are not there, each once, in order."""
        return [key for key in dict.fromkeys(keys) if not self.path(key).is_file()]

    def write(self, key: str, image: Tensor) -> None:
        """Store ``[3, H, W]`` in [0, 1], rounded to 8 bits."""
        pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
        with replaced(self.path(key)) as partial:
            Image.fromarray(pixels.cpu().numpy()).save(partial, format="PNG")

    def read(self, keys: Sequence[str]) -> Tensor:
        """Pictures ``[n, 3, H, W]`` float32 in [0, 1].

        Raises:
            ConfigError: naming a file that is damaged or not there.
        """
        return torch.stack([self._read(self.path(key)) for key in keys])

    @staticmethod
    def _read(path: Path) -> Tensor:
        try:
            with Image.open(path) as image:
                pixels = numpy.array(image.convert("RGB"))
        except (OSError, SyntaxError) as error:  # what Pillow raises on damaged files
            raise ConfigError(
                f"Picture `{path}` cannot be read: {error}. Delete it, and it is drawn again."
            ) from error
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
