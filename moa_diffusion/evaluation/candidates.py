"""What is evaluated: checkpoints of runs, folders of LoRA weights, soups of them, the base model.

Everything is read and checked here, before a model is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_diffusion import assembly, config
from moa_diffusion.adapters.diffusers import Adapter
from moa_diffusion.adapters.soup import mix, mixtures
from moa_diffusion.config import Config
from moa_diffusion.evaluation.medium import medium_of
from moa_diffusion.files.digests import json_digest
from moa_diffusion.files.paths import split_list, split_name
from moa_diffusion.files.text import check_encodable
from moa_diffusion.storage import checkpoint
from moa_diffusion.types import ConfigError

BASE = "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One model to evaluate."""

    label: str  # heads its column
    series: str  # the run, LoRA folder or soup it belongs to; empty for the base model
    step: int | None = None  # rollouts, of a run's checkpoint
    ema: bool | None = None  # whether a run's weights are averaged over optimizer steps
    weights: Mapping[str, float] | None = None  # of a soup, by label
    adapter: Adapter | None = None  # None: the base model

    @property
    def digest(self) -> str:
        """Of the adapter; empty for the base model."""
        return "" if self.adapter is None else self.adapter.digest


def named_folders(option: str, entries: Sequence[str], *, files: bool = False) -> dict[str, Path]:
    """``[NAME=]FOLDER`` by name, by default the folder's own; see ``paths.split_name``.

    Args:
        option: what the entries are of, for messages.
        entries: as given.
        files: whether a file will do as well.

    Raises:
        ConfigError: if a folder does not exist, can be read in two ways, or two have one name.
    """
    check_encodable(option, entries)
    found: dict[str, Path] = {}
    for entry in entries:
        try:
            given, folder = split_name(entry)
        except ValueError as error:
            raise ConfigError(f"{option}: {error}") from None
        alone = files and folder.is_file()
        name = (folder.stem if alone else folder.resolve().name) if given is None else given
        if not folder.is_dir() and not alone:
            raise ConfigError(f"{option}: should be a folder. Found none at `{folder}`.")
        if name in found or not name or name == BASE:
            raise ConfigError(
                f"{option}: should have another name than {', '.join([BASE, *found])}: "
                f"{option} NAME={folder}. Found {name!r}."
            )
        found[name] = folder
    return found


def run_settings(runs: Mapping[str, Path], overrides: Sequence[str]) -> dict[str, Config]:
    """The configurations that runs were made with, and the same options over each.

    Raises:
        ConfigError: for a folder that is no run.
    """
    for name, folder in runs.items():
        if not (folder / "config.yaml").is_file():
            raise ConfigError(
                f"--run: should be the folder of a run. Found no config.yaml in `{folder}`"
                f"{f' ({name})' if name != folder.name else ''}."
            )
    return {name: config.load(folder / "config.yaml", overrides) for name, folder in runs.items()}


def shared_settings(settings: Mapping[str, Config]) -> Config:
    """One configuration for all: the first, with the rewards of all, held-out ones included.

    Raises:
        ConfigError: if the models would not be drawn alike or are not of one base model, or if
            they have different rewards of one name.
    """
    (first_name, first), *others = settings.items()
    shared, rewards = medium_of(first).shared, _all_rewards(first)
    for name, other in others:
        for key, option in shared.items():
            mine, theirs = _value(first, key), _value(other, key)
            if key == "policy.path":
                mine, theirs = assembly.model_path(first), assembly.model_path(other)
            if mine != theirs:
                raise ConfigError(
                    f"{key}: should be the same for all models. Found {mine!r} in {first_name} and "
                    f"{theirs!r} in {name}. "
                    + (
                        f"Give one for both: {option}."
                        if option
                        else "Models of different base models need an evaluation each."
                    )
                )
        for reward, options in _all_rewards(other).items():
            if rewards.setdefault(reward, options) != options:
                raise ConfigError(
                    f"rewards.{reward}: should have the same options in all runs. Found "
                    f"{rewards[reward]} in {first_name} and {options} in {name}."
                )
    alone = dataclasses.replace(first.evaluation, rewards={})
    return dataclasses.replace(first, rewards=rewards, evaluation=alone)


def choose_rewards(settings: Config, names: Sequence[str] | None) -> Config:
    """Only these rewards: with the run's options where it has them, else with their defaults."""
    if names is None:
        chosen = settings.rewards
    else:
        chosen = {name: settings.rewards.get(name, {}) for name in names}
    if not chosen:
        raise ConfigError("--rewards: should name at least one. Found none, nor any in the run.")
    return dataclasses.replace(settings, rewards=chosen)


def saved_steps(run: Path, chosen: str | None, every: int | None) -> list[int]:
    """Rollouts of the checkpoints to evaluate, in order.

    Args:
        run: folder of the run.
        chosen: ``latest``, ``step-N`` or ``N``, comma-separated (``base`` is always evaluated);
            None for all.
        every: only multiples of this; None for all.

    Raises:
        ConfigError: if there is no such checkpoint.
    """
    saved = [int(path.name.removeprefix("step-")) for path in checkpoint.list_checkpoints(run)]
    if chosen is not None and every is not None:
        raise ConfigError("--every: should stand without --checkpoints. Found both.")
    if every is not None:
        if every < 1:
            raise ConfigError(f"--every: should be at least 1. Found {every}.")
        found = [step for step in saved if step % every == 0]
        if not found:
            raise ConfigError(
                f"--every: no checkpoint of `{run}` is a multiple of {every}. {_there(saved)}"
            )
        return found
    if chosen is None:
        return saved
    found = []
    for word in (part.strip() for part in chosen.split(",")):
        if word == BASE:
            continue
        number = word.removeprefix("step-")
        if word == "latest" and saved:
            found.append(saved[-1])
        elif number.isdigit() and int(number) in saved:
            found.append(int(number))
        else:
            raise ConfigError(f"--checkpoints: {word!r} is not in `{run}`. {_there(saved)}")
    return sorted(set(found))


def candidates(
    settings: Config,
    runs: Mapping[str, Path],
    loras: Mapping[str, Path],
    *,
    chosen: str | None = None,
    every: int | None = None,
    ema: bool = True,
    soup: str | None = None,
    points: int = 5,
) -> list[Candidate]:
    """All models to evaluate, the base model first.

    Args:
        settings: shared by all; ``Medium.check`` has found them to fit the base model.
        runs: folders by name.
        loras: likewise.
        chosen: see ``saved_steps``.
        every: likewise.
        ema: whether a run's averaged weights are taken, not those of its last optimizer step.
        soup: members of a soup, comma-separated, each the name of a run (its last checkpoint among
            those to evaluate), of a LoRA folder, or a label; None for none.
        points: of the soup along each edge between two members, ends included.

    Raises:
        ConfigError: for anything missing or damaged.
    """
    for name in loras:
        if name in runs:
            raise ConfigError(f"--lora: should have another name than a run. Found {name!r}.")
    read = medium_of(settings).reader(settings)
    found = [Candidate(label=BASE, series="")]
    for name, run in runs.items():
        for step in saved_steps(run, chosen, every):
            folder = checkpoint.step_folder(run, step)
            found.append(
                Candidate(
                    label=f"step-{step}" if len(runs) == 1 else f"{name}/step-{step}",
                    series=name,
                    step=step,
                    ema=ema,
                    adapter=read(folder / "ema" if ema else folder),
                )
            )
    found += [
        Candidate(label=name, series=name, adapter=read(folder)) for name, folder in loras.items()
    ]
    if soup is not None:
        found += _soup(found, soup, points)
    return found


def _soup(found: Sequence[Candidate], given: str, points: int) -> list[Candidate]:
    """The mixtures of these; the ends stand in the list already."""
    known = {part for one in found if one.adapter for part in (one.label, one.series)}
    names = split_list(given, known.__contains__)  # a run's name may have commas
    members = [_member(found, name) for name in names]
    if len({member.label for member in members}) < len(members):
        raise ConfigError(f"--soup: should name different models. Found {given!r}.")
    adapters = [member.adapter for member in members if member.adapter is not None]
    mixed = []
    for weights in mixtures(len(members), points):
        if max(weights) == 1:
            continue
        text = ":".join(f"{100 * weight:.3g}" for weight in weights)
        mixed.append(
            Candidate(
                label=f"{'+'.join(names)} {text}",
                series=f"soup {'+'.join(names)}",
                weights={
                    member.label: weight for member, weight in zip(members, weights, strict=True)
                },
                adapter=mix(adapters, weights),
            )
        )
    return mixed


def _member(found: Sequence[Candidate], name: str) -> Candidate:
    trained = [one for one in found if one.adapter is not None]
    matching = [one for one in trained if name in (one.label, one.series)]
    if not matching:
        known = dict.fromkeys(text for one in trained for text in (one.series, one.label))
        raise ConfigError(f"--soup: unknown model {name!r}. Known: {', '.join(known) or 'none'}.")
    return matching[-1]


def _there(saved: Sequence[int]) -> str:
    return f"There are: {', '.join(f'step-{step}' for step in saved) or 'none'}."


def _all_rewards(settings: Config) -> dict[str, dict[str, Any]]:
    """Options of all heads but their weights, which scores do not depend on."""
    return {
        name: {key: value for key, value in options.items() if key != "weight"}
        for name, options in (settings.rewards | settings.evaluation.rewards).items()
    }


def _value(settings: Config, key: str) -> Any:
    section, name = key.split(".")
    return vars(vars(settings)[section])[name]


def model_digest(base: str, adapter: str) -> str:
    """Of the base model with an adapter; of the base model alone where that is empty."""
    return json_digest([base, adapter]) if adapter else base
