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
from moa_diffusion.adapters.soup import mix, mixtures
from moa_diffusion.config import Config
from moa_diffusion.evaluation.medium import Medium
from moa_diffusion.files.digests import json_digest
from moa_diffusion.files.paths import split_list, split_name
from moa_diffusion.files.text import check_encodable
from moa_diffusion.policies.adapters import Adapter
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
    weights: Mapping[str, float] | None = None  # the parts of a soup, by label
    adapter: Adapter | None = None  # None: the base model

    @property
    def digest(self) -> str:
        """The adapter's digest; empty for the base model."""
        return "" if self.adapter is None else self.adapter.digest


def named_folders(option: str, entries: Sequence[str], *, files: bool = False) -> dict[str, Path]:
    """Return each ``[NAME=]FOLDER`` by name, by default the folder's; see ``paths.split_name``.

    Args:
        option: The command-line option of the entries, for messages.
        entries: The option's values.
        files: Whether a file will do as well.

    Raises:
        ConfigError: If a folder does not exist, can be read in two ways, or two have one name.
    """
    check_encodable(option, entries)
    folders: dict[str, Path] = {}
    for entry in entries:
        try:
            given, folder = split_name(entry)
        except ValueError as error:
            raise ConfigError(f"{option}: {error}") from None
        alone = files and folder.is_file()
        name = (folder.stem if alone else folder.resolve().name) if given is None else given
        if not folder.is_dir() and not alone:
            raise ConfigError(f"{option}: should be a folder. Found none at `{folder}`.")
        if name in folders or not name or name == BASE:
            raise ConfigError(
                f"{option}: should have another name than {', '.join([BASE, *folders])}: "
                f"{option} NAME={folder}. Found {name!r}."
            )
        folders[name] = folder
    return folders


def run_settings(runs: Mapping[str, Path], overrides: Sequence[str]) -> dict[str, Config]:
    """Return the configurations that runs were made with, and the same options over each.

    Raises:
        ConfigError: For a folder that is no run.
    """
    for name, folder in runs.items():
        if not (folder / "config.yaml").is_file():
            raise ConfigError(
                f"--run: should be the folder of a run. Found no config.yaml in `{folder}`"
                f"{f' ({name})' if name != folder.name else ''}."
            )
    return {name: config.load(folder / "config.yaml", overrides) for name, folder in runs.items()}


def shared_settings(settings: Mapping[str, Config], medium: type[Medium]) -> Config:
    """Return one configuration for all: the first, with the rewards of all, held-out ones included.

    Args:
        settings: Configurations by name.
        medium: The kind of what the first of them draws.

    Raises:
        ConfigError: If the models would not be drawn alike or are not of one base model, or if
            they have different rewards of one name.
    """
    (first_name, first), *others = settings.items()
    shared, rewards = medium.shared, _all_rewards(first)
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
            mine = rewards.setdefault(reward, options)
            # Only with the defaults, which older runs did not write down, are they comparable.
            key = f"rewards.{reward}"
            if mine != options and assembly.all_options(key, reward, mine) != assembly.all_options(
                key, reward, options
            ):
                raise ConfigError(
                    f"rewards.{reward}: should have the same options in all runs. Found "
                    f"{rewards[reward]} in {first_name} and {options} in {name}."
                )
    alone = dataclasses.replace(first.evaluation, rewards={})
    return dataclasses.replace(first, rewards=rewards, evaluation=alone)


def choose_rewards(settings: Config, names: Sequence[str] | None) -> Config:
    """Keep only these rewards: with the run's options where it has them, else with defaults."""
    if names is None:
        chosen = settings.rewards
    else:
        chosen = {name: settings.rewards.get(name, {}) for name in names}
    if not chosen:
        raise ConfigError("--rewards: should name at least one. Found none, nor any in the run.")
    return dataclasses.replace(settings, rewards=chosen)


def saved_steps(run: Path, chosen: str | None, every: int | None) -> list[int]:
    """Return the rollouts of the checkpoints to evaluate, in order.

    Args:
        run: The run's folder.
        chosen: ``latest``, ``step-N`` or ``N``, comma-separated (``base`` is always evaluated);
            None for all.
        every: Only multiples of this are taken; None takes all.

    Raises:
        ConfigError: If there is no such checkpoint.
    """
    saved = [int(path.name.removeprefix("step-")) for path in checkpoint.list_checkpoints(run)]
    if chosen is not None and every is not None:
        raise ConfigError("--every: should stand without --checkpoints. Found both.")
    if every is not None:
        if every < 1:
            raise ConfigError(f"--every: should be at least 1. Found {every}.")
        steps = [step for step in saved if step % every == 0]
        if not steps:
            raise ConfigError(
                f"--every: no checkpoint of `{run}` is a multiple of {every}. {_there(saved)}"
            )
        return steps
    if chosen is None:
        return saved
    steps = []
    for word in (part.strip() for part in chosen.split(",")):
        if word == BASE:
            continue
        number = word.removeprefix("step-")
        if word == "latest" and saved:
            steps.append(saved[-1])
        elif number.isdigit() and int(number) in saved:
            steps.append(int(number))
        else:
            raise ConfigError(f"--checkpoints: {word!r} is not in `{run}`. {_there(saved)}")
    return sorted(set(steps))


def candidates(
    medium: Medium,
    runs: Mapping[str, Path],
    loras: Mapping[str, Path],
    *,
    chosen: str | None = None,
    every: int | None = None,
    ema: bool = True,
    soup: str | None = None,
    points: int = 5,
) -> list[Candidate]:
    """Return all models to evaluate, the base model first.

    Args:
        medium: What the models draw, with settings that its ``check`` has passed.
        runs: Folders of runs by name.
        loras: Folders of LoRA weights by name.
        chosen: See ``saved_steps``.
        every: See ``saved_steps``.
        ema: Whether a run's averaged weights are taken, not those of its last optimizer step.
        soup: Members of a soup, comma-separated, each the name of a run (its last checkpoint among
            those to evaluate), of a LoRA folder, or a label; None for none.
        points: The number of points of the soup along each edge between two members, ends
            included.

    Raises:
        ConfigError: For anything missing or damaged.
    """
    for name in loras:
        if name in runs:
            raise ConfigError(f"--lora: should have another name than a run. Found {name!r}.")
    read = medium.reader()
    models = [Candidate(label=BASE, series="")]
    for name, run in runs.items():
        for step in saved_steps(run, chosen, every):
            folder = checkpoint.step_folder(run, step)
            models.append(
                Candidate(
                    label=f"step-{step}" if len(runs) == 1 else f"{name}/step-{step}",
                    series=name,
                    step=step,
                    ema=ema,
                    adapter=read(folder / "ema" if ema else folder),
                )
            )
    models += [
        Candidate(label=name, series=name, adapter=read(folder)) for name, folder in loras.items()
    ]
    if soup is not None:
        models += _soup(models, soup, points)
    return models


def _soup(models: Sequence[Candidate], given: str, points: int) -> list[Candidate]:
    """Return the mixtures of these; the ends stand in the list already."""
    known = {part for one in models if one.adapter for part in (one.label, one.series)}
    names = split_list(given, known.__contains__)  # a run's name may have commas
    members = [_member(models, name) for name in names]
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


def _member(models: Sequence[Candidate], name: str) -> Candidate:
    trained = [one for one in models if one.adapter is not None]
    matching = [one for one in trained if name in (one.label, one.series)]
    if not matching:
        known = dict.fromkeys(text for one in trained for text in (one.series, one.label))
        raise ConfigError(f"--soup: unknown model {name!r}. Known: {', '.join(known) or 'none'}.")
    return matching[-1]


def _there(saved: Sequence[int]) -> str:
    return f"There are: {', '.join(f'step-{step}' for step in saved) or 'none'}."


def _all_rewards(settings: Config) -> dict[str, dict[str, Any]]:
    """Return the options of all heads but their weights, which scores do not depend on."""
    return {
        name: {key: value for key, value in options.items() if key != "weight"}
        for name, options in (settings.rewards | settings.evaluation.rewards).items()
    }


def _value(settings: Config, key: str) -> Any:
    section, name = key.split(".")
    return vars(vars(settings)[section])[name]


def model_digest(base: str, adapter: str) -> str:
    """Return the digest of the base model with its adapter, if there is one."""
    return json_digest([base, adapter]) if adapter else base
