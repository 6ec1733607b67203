"""What images and texts differ in where models are evaluated; all else is the same code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from moa_diffusion.config import Config
from moa_diffusion.config.schema import LoraConfig
from moa_diffusion.evaluation.images import Images, ImageSettings
from moa_diffusion.evaluation.sample_cache import OutputCache
from moa_diffusion.evaluation.texts import Texts, TextSettings
from moa_diffusion.policies.adapters import Adapter
from moa_diffusion.policies.base import Policy
from moa_diffusion.types import ConfigError, Request


class Medium(Protocol):
    """How one kind of output is drawn and stored, with one configuration's base model."""

    noun: str  # what is drawn, in the plural
    options: Mapping[str, str]  # options of scripts/evaluate.py, to the keys that they set
    # Keys that all models of an evaluation share, and the option that settles a difference.
    shared: Mapping[str, str | None]
    weights: str  # file of an adapter

    def __init__(self, settings: Config) -> None: ...

    def check(self, prompts: Sequence[str]) -> None:
        """Check that the base model can draw these prompts so, before its weights are read.

        Raises:
            ConfigError: If not.
        """
        ...

    def reader(self) -> Callable[[Path], Adapter]:
        """Return what reads a folder of LoRA weights, and raises ``ConfigError``."""
        ...

    def write_adapter(self, adapter: Adapter, folder: Path) -> None:
        """Write it into a folder that exists, for the loaders that read ``weights``."""
        ...

    def copy_adapter(self, source: Path, folder: Path) -> None:
        """Write what a checkpoint's folder holds into another, the weights as they are."""
        ...

    def deployment(self, device: torch.device) -> ImageSettings | TextSettings:
        """Return how outputs are drawn, beside the model, the prompt and the seed."""
        ...

    def base_digest(self, memory: Path) -> str:
        """Return the digest of the base model; see ``files_digest`` for the memory."""
        ...

    def cache(self, folder: Path) -> OutputCache[Any]:
        """Return where outputs are kept, in a folder of a name of their own."""
        ...

    def policy(self, lora: LoraConfig, device: torch.device) -> Policy:
        """Return the base model with a LoRA."""
        ...

    def request(self, prompt: str, seed: int) -> Request:
        """Return what is asked of the policy."""
        ...


MEDIA: dict[str, type[Medium]] = {"sd3": Images, "causal_lm": Texts}


def medium_of(settings: Config) -> type[Medium]:
    """Return the kind of what a configuration's policy draws.

    Raises:
        ConfigError: If it draws nothing that could be looked at.
    """
    name = settings.policy.name
    if name not in MEDIA:
        raise ConfigError(
            f"policy.name: should be {' or '.join(MEDIA)}, whose outputs one can look at. "
            f"Found {name!r}."
        )
    return MEDIA[name]
