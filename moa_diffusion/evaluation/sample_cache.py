"""Samples by what they are made from: the same model, prompt, seed and settings draw once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from moa_diffusion.files.digests import json_digest
from moa_diffusion.files.writing import write_text
from moa_diffusion.types import Outputs

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

import json
import os

import torch
from PIL import Image
from torch import Tensor

from moa_diffusion.files.writing import replaced
from moa_diffusion.types import ConfigError
from rewards.pictures import read_rgb

_VERSION = 1  # of what a key is made of
T = TypeVar("T")


class OutputCache(ABC, Generic[T]):
    """A folder of files, each named by the digest of what it was drawn from.

    What another machine draws may differ in the last bit; the key does not know the machine.

    Args:
        folder: made when the first file is written.
    """

    suffix: ClassVar[str]  # of the files

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def key(*, model: str, prompt: str, seed: int, sampler: DataclassInstance) -> str:
        """Digest of everything that an output depends on."""
        return json_digest([_VERSION, model, prompt, seed, asdict(sampler)])

    def path(self, key: str) -> Path:
        """Where the output is, or would be."""
        return self.folder / f"{key}{self.suffix}"

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those that are not there, each once, in order."""
        return [key for key in dict.fromkeys(keys) if not self.path(key).is_file()]

    @abstractmethod
    def write(self, key: str, output: T) -> None:
        """Store one output; its file is whole or not there."""

    @abstractmethod
    def read(self, keys: Sequence[str]) -> Outputs:
        """Outputs in this order.

        Raises:
            ConfigError: naming a file that is damaged or not there.
        """

    @abstractmethod
    def columns(self, key: str, folder: Path) -> dict[str, Any]:
        """What a table of scores in ``folder`` says of one output."""


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


class TextCache(OutputCache[str]):
    """A folder of JSON files, each with one string."""

    suffix = ".json"

    def write(self, key: str, output: str) -> None:
        """Store a text as it is, to the last blank."""
        write_text(self.path(key), f"{json.dumps(output)}\n")

    def read(self, keys: Sequence[str]) -> tuple[str, ...]:
        """Texts in this order.

        Raises:
            ConfigError: naming a file that is damaged or not there.
        """
        return tuple(self._read(self.path(key)) for key in keys)

    def columns(self, key: str, folder: Path) -> dict[str, str]:
        """``text`` itself, and ``text_digest``, the key."""
        return {"text": self._read(self.path(key)), "text_digest": key}

    @staticmethod
    def _read(path: Path) -> str:
        try:
            text = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(text, str):
                raise ValueError(f"it should hold a string, found {type(text).__name__}")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"Text `{path}` cannot be read: {error}. Delete it, and it is drawn again."
            ) from error
        return text
