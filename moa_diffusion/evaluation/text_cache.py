"""Completions that were drawn, as files of JSON: a torn one is not taken for a shorter text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moa_diffusion.config import Config
from moa_diffusion.evaluation.output_cache import OutputCache, files_digest
from moa_diffusion.files.digests import json_digest
from moa_diffusion.files.writing import write_text
from moa_diffusion.policies.language_model import read_tokenizer
from moa_diffusion.types import ConfigError

# Of the files that a model and its tokenizer are loaded from; others are a reader's business.
_SUFFIXES = {".bin", ".jinja", ".json", ".model", ".safetensors", ".txt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How completions are drawn, beside the model, the prompt and the seed."""

    max_new_tokens: int  # with the token that ends a completion
    temperature: float  # 0: the likeliest token
    chat: bool  # whether prompts go through the tokenizer's chat template
    dtype: str
    noise: str  # kind of device whose generator it comes from; "none" at temperature 0

    @classmethod
    def of(cls, settings: Config, path: str, device: torch.device) -> Generation:
        """Deployment settings: those of the section ``generation``.

        Args:
            settings: the configuration.
            path: folder or hub id of the model.
            device: that draws. The same seed gives other texts on another kind of device.
        """
        generation = settings.generation
        chat = generation.chat
        if chat is None:
            tokenizer = read_tokenizer(path, revision=settings.policy.revision)
            chat = tokenizer.chat_template is not None
        return cls(
            max_new_tokens=generation.max_new_tokens,
            temperature=generation.eval_temperature,
            chat=chat,
            dtype=settings.policy.dtype,
            noise=device.type if generation.eval_temperature > 0 else "none",
        )


def base_digest(path: str, *, revision: str | None, memory: Path) -> str:
    """Digest of everything that a language model and its tokenizer load.

    Args:
        path: folder or hub id. Of a hub id the commit stands for the content.
        revision: of a hub id.
        memory: see ``files_digest``.

    Raises:
        ConfigError: if the commit of a hub id is not known.
    """
    from transformers.utils import cached_file, extract_commit_hash

    folder = Path(path)
    if not folder.is_dir():
        commit = extract_commit_hash(cached_file(path, "config.json", revision=revision), None)
        if commit is None:
            raise ConfigError(f"policy.path: the commit of {path!r} is not known: name a folder.")
        return json_digest([path, commit])
    files = [file for file in sorted(folder.iterdir()) if file.suffix in _SUFFIXES]
    return files_digest(folder, files, memory)


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
