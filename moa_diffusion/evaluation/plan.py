"""What scripts/evaluate.py is to do, read and checked before a model is loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_diffusion import assembly, config
from moa_diffusion.config import Config
from moa_diffusion.data.prompt_files import Prompt, read_prompts
from moa_diffusion.data.seeds import read_seeds
from moa_diffusion.evaluation.candidates import (
    Candidate,
    candidates,
    choose_rewards,
    named_folders,
    run_settings,
    shared_settings,
)
from moa_diffusion.evaluation.medium import MEDIA, Medium, medium_of
from moa_diffusion.files.paths import expanded
from moa_diffusion.files.text import check_encodable
from moa_diffusion.report.libraries import TABLES_AND_PLOTS, check_libraries
from moa_diffusion.types import ConfigError

SIDE = "--sampling.resolution"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """An evaluation that can be run."""

    settings: Config  # decides the base model, how it draws, and the rewards
    medium: Medium  # what the models draw
    runs: Mapping[str, Path]  # folders by series
    candidates: tuple[Candidate, ...]  # the base model first
    prompts: tuple[Prompt, ...]  # P
    seeds: tuple[int, ...]  # S, of the noise; equal for all models
    output: Path  # folder of tables and images
    cache: Path  # folder of samples and scores


def plan_evaluation(options: Mapping[str, Any], overrides: Sequence[str]) -> EvaluationPlan:
    """Read and check everything that can be checked without a model.

    Args:
        options: The options of ``scripts/evaluate.py`` by name.
        overrides: Dotted keys and values over every configuration.

    Raises:
        ConfigError: For anything that cannot be evaluated.
        ImportError: If what writes the results is not installed; says how to install it.
    """
    check_libraries(TABLES_AND_PLOTS)
    for name, value in options.items():
        check_encodable(f"--{name}", str(value) if isinstance(value, Path) else value)
    given = list(overrides)
    for kind in MEDIA.values():
        for option, key in kind.options.items():
            if options[option] is not None:
                given += [f"--{key}", options[option]]
    runs = named_folders("--run", options["run"])
    loras = named_folders("--lora", options["lora"], files=True)
    each = {
        name: _drawn_as_deployed(one, any(part.startswith(SIDE) for part in given))
        for name, one in _configurations(options, runs, given).items()
    }
    kind = medium_of(next(iter(each.values())))
    settings = choose_rewards(shared_settings(each, kind), _words("--rewards", options["rewards"]))
    _check_options(settings, kind, options)
    prompts = chosen_prompts(settings, options["prompts"])
    medium = kind(settings)
    medium.check([prompt.text for prompt in prompts])
    seeds = read_seeds(options["seeds"])
    if options["shown"] < 1:
        raise ConfigError(f"--shown: should be at least 1. Found {options['shown']}.")
    models = candidates(
        medium,
        runs,
        loras,
        chosen=options["checkpoints"],
        every=options["every"],
        ema=options["ema"],
        soup=options["soup"],
        points=options["points"],
    )
    own = next(iter(runs.values())) / "evaluate" if len(runs) == 1 else Path("runs/evaluate")
    output = options["output"] or own
    return EvaluationPlan(
        settings=settings,
        medium=medium,
        runs=runs,
        candidates=tuple(models),
        prompts=prompts,
        seeds=seeds,
        output=output,
        cache=options["cache"] or output,
    )


def _configurations(
    options: Mapping[str, Any], runs: Mapping[str, Path], overrides: Sequence[str]
) -> dict[str, Config]:
    """Return the configurations that the models were made with, by run, file or folder."""
    sources = [name for name in ("config", "pipeline") if options[name] is not None]
    if bool(runs) + len(sources) != 1:
        given = ", ".join([*(["--run"] if runs else []), *(f"--{name}" for name in sources)])
        raise ConfigError(
            "The base model and its settings should come from --run, or from one of --config and "
            f"--pipeline. Found {given or 'none of them'}."
        )
    if runs:
        return run_settings(runs, overrides)
    if options["config"] is not None:
        return {options["config"]: config.load(options["config"], overrides)}
    names = _words("--rewards", options["rewards"]) or []
    line = ["--policy.path", options["pipeline"], "--evaluation.every", "0"]
    line += ["--policy.name", _policy_name(options["pipeline"])]
    line += ["--rewards", json.dumps({name: {} for name in names}), *overrides]
    return {options["pipeline"]: config.parse(line)}


def _drawn_as_deployed(settings: Config, told: bool) -> Config:
    """Return the configuration with one resolution: that of its evaluations, unless one is told."""
    side = settings.sampling.resolution if told else settings.deployed_resolution
    return dataclasses.replace(
        settings,
        sampling=dataclasses.replace(settings.sampling, resolution=side),
        evaluation=dataclasses.replace(settings.evaluation, resolution=None),
    )


def _policy_name(path: str) -> str:
    """Return the policy that a local folder holds the model of; of a hub id nothing is known."""
    try:
        folder = expanded(path)
    except ValueError as error:
        raise ConfigError(f"--pipeline: {error}") from None
    writes = (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()
    return "causal_lm" if writes else "sd3"


def _check_options(settings: Config, medium: type[Medium], options: Mapping[str, Any]) -> None:
    """Check that no option belongs to the other medium: it would be without effect."""
    for other in MEDIA.values():
        for option in other.options:
            if options[option] is not None and option not in medium.options:
                valid = ", ".join(f"--{name}" for name in medium.options)
                raise ConfigError(
                    f"--{option}: is for {other.noun}. policy.name {settings.policy.name} draws "
                    f"{medium.noun}, which have {valid}."
                )


def _words(option: str, text: str | None) -> list[str] | None:
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(words) or len(set(words)) < len(words):
        raise ConfigError(f"{option}: should be different names, comma-separated. Found {text!r}.")
    return words


def chosen_prompts(settings: Config, file: str | None) -> tuple[Prompt, ...]:
    """Return the prompts of a file, or the run's held-out ones.

    Raises:
        ConfigError: If there are none.
    """
    if file is not None:
        return read_prompts(file, column=settings.prompts.column)
    prompts = assembly.heldout_prompts(settings)
    if not prompts:
        raise ConfigError("--prompts: should name a file. The run has no held-out prompts.")
    return prompts
