"""Prompt files to the prompts of training and to the held-out prompts and requests."""

from __future__ import annotations

from pathlib import Path

from moa_diffusion import tiny
from moa_diffusion.config import Config
from moa_diffusion.config.schema import PromptFileConfig, WeightedPromptFileConfig
from moa_diffusion.data.prompt_files import Prompt, read_prompts
from moa_diffusion.data.sampling import Mixture, PromptSet, in_turn
from moa_diffusion.data.seeds import derive_seed
from moa_diffusion.types import Request


def train_prompts(settings: Config) -> Mixture:
    """Return what training draws from: the prompt sets of ``prompts.train`` and their weights.

    Raises:
        ConfigError: For a file that cannot be read.
    """
    files = settings.prompts.train
    if isinstance(files, str):
        files = [WeightedPromptFileConfig(path=files)]
    return Mixture(
        [PromptSet(prompts=_read(file, "train", settings), weight=file.weight) for file in files]
    )


def heldout_prompts(settings: Config) -> tuple[Prompt, ...]:
    """Return the held-out prompts, the files' in turn; empty if the configuration names none.

    Raises:
        ConfigError: For a file that cannot be read.
    """
    if settings.prompts.heldout is None:
        return ()
    files = settings.prompts.heldout
    if isinstance(files, str):
        files = [PromptFileConfig(path=files)]
    prompts = in_turn([_read(file, "heldout", settings) for file in files])
    return prompts[: settings.evaluation.prompts or None]


def heldout_requests(settings: Config) -> tuple[Request, ...]:
    """Return what the evaluation draws: the same for every run with the same evaluation seed.

    It is empty for a run without evaluations.

    Raises:
        ConfigError: For a file that cannot be read.
    """
    if not settings.evaluation.every:
        return ()
    prompts = heldout_prompts(settings)
    return tuple(
        Request(
            prompt=prompt.text,
            metadata=prompt.metadata,
            group=group,
            sibling=sibling,
            seed=derive_seed(settings.evaluation.seed, "heldout", group, sibling),
        )
        for sibling in range(settings.evaluation.images_per_prompt)
        for group, prompt in enumerate(prompts)
    )


def _read(file: PromptFileConfig, kind: str, settings: Config) -> tuple[Prompt, ...]:
    shipped = f"letters_{kind}.txt" if settings.policy.name == "causal_lm" else f"{kind}.txt"
    path = tiny.PROMPTS_PATH / shipped if file.path == "tiny" else Path(file.path)
    return read_prompts(path, column=file.column or settings.prompts.column)
