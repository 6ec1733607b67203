"""Samples by what they are made from: the same model, prompt, seed and settings draw once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from moa_diffusion.files.digests import file_digest, json_digest
from moa_diffusion.files.writing import write_text
from moa_diffusion.types import Outputs

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

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


def files_digest(folder: Path, files: Iterable[Path], memory: Path) -> str:
    """Digest of the content of files by their place in a folder.

    Args:
        folder: that they lie in.
        files: of the folder.
        memory: file where digests are kept by path, size and time of change: reading all weights
            again takes longer than most evaluations that have nothing to draw.
    """
    before = _remembered(memory)
    known, digests = dict(before), {}
    for file in files:
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
