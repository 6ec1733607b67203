"""Completions of causal language models as what an evaluation draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from moa_diffusion import assembly
from moa_diffusion.adapters.peft import copy_adapter, write_adapter
from moa_diffusion.config import Config
from moa_diffusion.config.schema import LoraConfig
from moa_diffusion.data.seeds import derive_seed
from moa_diffusion.evaluation.sample_cache import TextCache
from moa_diffusion.files.digests import files_digest, json_digest
from moa_diffusion.policies.adapters import Adapter, read_text_adapter, text_skeleton
from moa_diffusion.policies.base import Policy
from moa_diffusion.policies.language_model import check_fit, read_tokenizer
from moa_diffusion.policies.lora_files import PEFT
from moa_diffusion.types import ConfigError, Request

# A model and its tokenizer are loaded from such files; others are a reader's business.
_SUFFIXES = {".bin", ".jinja", ".json", ".model", ".safetensors", ".txt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSettings:
    """How completions are drawn, beside the model, the prompt and the seed."""

    max_new_tokens: int  # with the token that ends a completion
    temperature: float  # 0: the likeliest token
    chat: bool  # whether prompts go through the tokenizer's chat template
    dtype: str
    noise: str  # kind of device whose generator it comes from; "none" at temperature 0

    @classmethod
    def of(cls, settings: Config, path: str, device: torch.device) -> TextSettings:
        """Return the deployment settings: those of the section ``generation``.

        Args:
            settings: The base model's configuration: ``generation`` and ``policy``.
            path: Folder or hub id of the model.
            device: The device that draws. The same seed gives other texts on another kind of
                device.
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
    """Return the digest of everything that a language model and its tokenizer load.

    Args:
        path: Folder or hub id. Of a hub id the commit stands for the content.
        revision: The revision of a hub id.
        memory: See ``files_digest``.

    Raises:
        ConfigError: If the commit of a hub id is not known.
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


class Texts:
    """See ``Medium``."""

    noun = "completions"
    options: Mapping[str, str] = {"temperature": "generation.eval_temperature"}
    shared: Mapping[str, str | None] = {
        "policy.name": None,
        "policy.path": None,
        "policy.revision": None,
        "policy.dtype": "--policy.dtype",
        "generation.max_new_tokens": "--generation.max_new_tokens",
        "generation.eval_temperature": "--temperature",
        "generation.chat": "--generation.chat",
    }
    weights = PEFT

    def __init__(self, settings: Config) -> None:
        self.settings = settings
        self.path, self.revision = assembly.model_path(settings), settings.policy.revision

    def check(self, prompts: Sequence[str]) -> None:
        """Check that the settings fit the model and that no prompt is too long."""
        generation = self.settings.generation
        check_fit(
            self.path,
            revision=self.revision,
            max_new_tokens=generation.max_new_tokens,
            max_prompt_tokens=generation.max_prompt_tokens,
            chat=generation.chat,
            prompts=prompts,
        )

    def reader(self) -> Callable[[Path], Adapter]:
        """Return a reader that fits LoRA weights to the layers of a model without weights."""
        model = text_skeleton(self.path, revision=self.revision)
        return partial(read_text_adapter, model=model, base=self.path)

    def write_adapter(self, adapter: Adapter, folder: Path) -> None:
        """Write the two files that peft loads, with the hub id of the base model in one of them."""
        model = text_skeleton(self.path, revision=self.revision)
        write_adapter(adapter, folder, model, base=self._hub_id())

    def copy_adapter(self, source: Path, folder: Path) -> None:
        """Copy the two files that peft loads, and name the base model by its hub id."""
        copy_adapter(source, folder, base=self._hub_id())

    def deployment(self, device: torch.device) -> TextSettings:
        """Return the deployment settings, with the kind of device that the noise comes from."""
        return TextSettings.of(self.settings, self.path, device)

    def base_digest(self, memory: Path) -> str:
        """Return the digest of the language model's files."""
        return base_digest(self.path, revision=self.revision, memory=memory)

    def cache(self, folder: Path) -> TextCache:
        """Return the cache of JSON files in ``texts``."""
        return TextCache(folder / "texts")

    def policy(self, lora: LoraConfig, device: torch.device) -> Policy:
        """Build the language model with this LoRA, which starts untrained, without value heads."""
        model = dataclasses.replace(self.settings.policy, lora=lora, adapter=None)
        loss = dataclasses.replace(self.settings.loss, kind="grpo")  # no features for value heads
        settings = dataclasses.replace(self.settings, policy=model, loss=loss)
        return assembly.causal_lm(settings, device)

    def request(self, prompt: str, seed: int) -> Request:
        """Return a request whose noise is the same for all models, and another for every prompt.

        With one noise for all prompts their completions begin alike, and prompts are not the
        independent units that the intervals take them for: the variance of the mean length over
        18 prompts of the shipped model would be 11 times what they say.
        """
        return Request(prompt=prompt, seed=derive_seed(seed, "completion", prompt))

    def _hub_id(self) -> str | None:
        """Return the base model's name on the hub.

        It is None for a folder, whose place is of no use on another machine.
        """
        return None if Path(self.path).is_dir() else self.path
