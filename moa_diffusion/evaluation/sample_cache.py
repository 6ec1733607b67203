"""Samples by what they are made from: the same model, prompt, seed and settings draw once."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from moa_diffusion.files.digests import json_digest
from moa_diffusion.files.png import save_png
from moa_diffusion.files.writing import write_text
from moa_diffusion.types import ConfigError, Outputs
from rewards.image_files import read_rgb

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_VERSION = 1  # grows when keys are made of something else
T = TypeVar("T")


class OutputCache(ABC, Generic[T]):
    """A folder of files, each named by the digest of what it was drawn from.

    What another machine draws may differ in the last bit; the key does not know the machine.

    Args:
        folder: The folder, made when the first file is written.
    """

    noun: ClassVar[str]  # what a file holds, for messages
    suffix: ClassVar[str]  # the files' suffix, with its dot

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def key(*, model: str, prompt: str, seed: int, deployment: DataclassInstance) -> str:
        """Return the digest of everything that an output depends on.

        Args:
            model: Digest of the base model and of the candidate's weights.
            prompt: The prompt's text.
            seed: The seed of the sample.
            deployment: The deployment settings, all of which count.
        """
        return json_digest([_VERSION, model, prompt, seed, asdict(deployment)])

    def path(self, key: str) -> Path:
        """Return where the output is, or would be."""
        return self.folder / f"{key}{self.suffix}"

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Return those that are not there, each once, in order."""
        return [key for key in dict.fromkeys(keys) if not self.path(key).is_file()]

    def write(self, key: str, output: T) -> None:
        """Store one output; its file is whole or not there."""
        self._encode(output, self.path(key))

    def read(self, keys: Sequence[str]) -> Outputs:
        """Return the outputs in this order.

        Raises:
            ConfigError: Naming a file that is damaged or not there.
        """
        return self._batch([self._read(key) for key in keys])

    @abstractmethod
    def columns(self, key: str, folder: Path) -> dict[str, Any]:
        """Return what a table of scores in ``folder`` says of one output."""

    def _read(self, key: str) -> T:
        path = self.path(key)
        try:
            return self._decode(path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.noun} `{path}` cannot be read: {error}. Delete it, and it is drawn again."
            ) from error

    @staticmethod
    @abstractmethod
    def _encode(output: T, path: Path) -> None:
        """Write one output into a file."""

    @staticmethod
    @abstractmethod
    def _decode(path: Path) -> T:
        """Return the output in a file; ``OSError`` or ``ValueError`` if it holds none."""

    @staticmethod
    @abstractmethod
    def _batch(outputs: Sequence[T]) -> Outputs:
        """Join single outputs to what a policy returns for several requests."""


class ImageCache(OutputCache[Tensor]):
    """A folder of PNG files; images are ``[3, H, W]`` float32 in [0, 1], rounded to 8 bits."""

    noun = "Image"
    suffix = ".png"

    def columns(self, key: str, folder: Path) -> dict[str, str]:
        """Return ``image``, the file's path from the folder, and ``image_digest``, the key."""
        path = Path(os.path.relpath(self.path(key), folder)).as_posix()
        return {"image": path, "image_digest": key}

    @staticmethod
    def _encode(output: Tensor, path: Path) -> None:
        save_png(output, path)

    @staticmethod
    def _decode(path: Path) -> Tensor:
        return torch.from_numpy(read_rgb(path)).permute(2, 0, 1).float() / 255

    @staticmethod
    def _batch(outputs: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(outputs))


class TextCache(OutputCache[str]):
    """A folder of JSON files, each with one string: a torn one is not taken for a shorter text."""

    noun = "Text"
    suffix = ".json"

    def columns(self, key: str, folder: Path) -> dict[str, str]:
        """Return ``text`` itself, and ``text_digest``, the key."""
        return {"text": self._read(key), "text_digest": key}

    @staticmethod
    def _encode(output: str, path: Path) -> None:
        write_text(path, f"{json.dumps(output)}\n")

    @staticmethod
    def _decode(path: Path) -> str:
        text = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(text, str):
            raise ValueError(f"it should hold a string, found {type(text).__name__}")
        return text

    @staticmethod
    def _batch(outputs: Sequence[str]) -> tuple[str, ...]:
        return tuple(outputs)
