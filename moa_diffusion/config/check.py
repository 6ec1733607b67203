"""Ranges of every value, checked before anything is built."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moa_diffusion.config.schema import (
    SAMPLERS,
    Config,
    PromptFileConfig,
    WeightedPromptFileConfig,
)
from moa_diffusion.types import ConfigError
from rewards.suggestions import did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Which values a key may have."""

    words: str  # completes "should be ..."
    holds: Callable[[Any], bool]


_AT_LEAST: dict[str, float] = {
    "policy.max_sequence_length": 1,
    "policy.step_batch": 1,
    "policy.vae_batch": 1,
    "policy.lora.rank": 1,
    "sampling.resolution": 1,
    "sampling.steps": 2,
    "sampling.guidance": 0,
    "sampling.window": 0,
    "sampling.window_stay": 1,
    "generation.max_new_tokens": 1,
    "generation.eval_temperature": 0,
    "critic.hidden": 1,
    "critic.epochs": 1,
    "gradients.every": 1,
    "loss.kl_weight": 0,
    "loss.max_skipped": 1,
    "optimizer.weight_decay": 0,
    "optimizer.warmup": 0,
    "ema.every": 1,
    "preferences.smoothing": 0,
    "preferences.batch": 1,
    "preferences.level_prompts": 0,
    "trainer.steps": 1,
    "trainer.minutes": 0,
    "trainer.groups": 1,
    "trainer.group_size": 2,
    "trainer.updates": 1,
    "trainer.sample_batch": 1,
    "trainer.micro_batch": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 0,
    "checkpoint.front": 0,
    "evaluation.every": 0,
    "evaluation.images_per_prompt": 1,
    "evaluation.prompts": 0,
    "evaluation.steps": 1,
    "evaluation.guidance": 0,
    "evaluation.pictures": 0,
    "evaluation.rollout_images": 0,
    "alarm.patience": 1,
    "alarm.z": 0,
    "alarm.kl_factor": 1,
    "alarm.limit": 0,
    "alarm.drift": 0,
    "alarm.gap": 0,
}
_POSITIVE = (
    "policy.embeds_memory_gb",
    "sampling.noise_level",
    "generation.temperature",
    "critic.lr",
    "loss.clip_range",
    "loss.advantage_clip",
    "optimizer.lr",
    "optimizer.eps",
    "optimizer.max_grad_norm",
)
_POSITIVE_OR_NULL = (
    "loss.ratio_tolerance",
    "policy.lora.alpha",
    "generation.max_prompt_tokens",
)
# By dotted key, whatever the other values are; docs/configuration.md shows them.
RANGES: dict[str, Range] = {
    **{
        key: Range(words=f"at least {bound}", holds=partial(operator.le, bound))
        for key, bound in _AT_LEAST.items()
    },
    **dict.fromkeys(_POSITIVE, Range(words="positive", holds=lambda value: value > 0)),
    **dict.fromkeys(
        _POSITIVE_OR_NULL,
        Range(words="positive or null", holds=lambda value: value is None or value > 0),
    ),
    "gradients.share": Range(words="in (0, 1]", holds=lambda value: 0 < value <= 1),
    "critic.gamma": Range(words="in (0, 1]", holds=lambda value: 0 < value <= 1),
    "critic.lam": Range(words="in [0, 1]", holds=lambda value: 0 <= value <= 1),
    "ema.decay": Range(words="in [0, 1)", holds=lambda value: 0 <= value < 1),
    "optimizer.betas": Range(
        words="two numbers in [0, 1)",
        holds=lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
    ),
    "policy.lora.target_modules": Range(words="a non-empty list", holds=lambda value: value != []),
}
_PROMPT_FILES = {"train": WeightedPromptFileConfig, "heldout": PromptFileConfig}


def check(config: Config) -> None:
    """Check every value's range.

    Raises:
        ConfigError: For the first value out of range.
    """
    for key, allowed in RANGES.items():
        _require(config, key, allowed.holds, allowed.words)
    check_prompts(dataclasses.asdict(config.prompts))
    _check_together(config)
    if config.preferences.given:
        _check_preferences(config)
    if not config.rewards and not config.preferences.given:
        raise ConfigError(
            "rewards: should name at least one objective, such as `rewards: {ocr: {weight: 1}}`. "
            "Found none."
        )
    check_rewards(config.rewards)
    check_rewards(config.evaluation.rewards, "evaluation.rewards")
    for name in config.evaluation.rewards:
        if name in config.rewards:
            raise ConfigError(
                f"evaluation.rewards.{name}: should have another name than the rewards that are "
                f"trained on. Found {name!r} in both; `head: {name}` under a name of its own, such "
                f"as held_{name}, is the same head with other options."
            )


def _check_preferences(config: Config) -> None:
    preferences = config.preferences
    if preferences.data is not None and preferences.pairs:
        raise ConfigError("preferences: should have `data` or `pairs`. Found both.")
    if preferences.data is not None and not preferences.objectives:
        raise ConfigError(
            "preferences.objectives: should name the objectives in preferences.data. Found none."
        )
    if preferences.pairs and preferences.objectives:
        raise ConfigError(
            "preferences.objectives: should be left out beside preferences.pairs, which names "
            f"them. Found {preferences.objectives}."
        )
    for name in preferences.objectives:
        _check_name("preferences.objectives", name)
    for name, file in preferences.pairs.items():
        _check_name("preferences.pairs", name)
        if not isinstance(file, str):
            raise ConfigError(f"preferences.pairs.{name}: should be a file. Found {file!r}.")
    if config.objectives.method != "mopo":
        raise ConfigError(
            "objectives.method: should be mopo, which learns from preferences. "
            f"Found {config.objectives.method!r}."
        )
    for key, value, neutral in (
        ("loss.kind", config.loss.kind, "grpo"),
        ("loss.kl_weight", config.loss.kl_weight, 0.0),
    ):
        if value != neutral:
            raise ConfigError(
                f"{key}: should be {neutral} (the default) with preferences, where MOPO's `tau` "
                f"holds the policy back and nothing is estimated. Found {value!r}."
            )
    if config.policy.name != "causal_lm":
        raise ConfigError(
            "policy.name: should be causal_lm, which can be taught given responses. "
            f"Found {config.policy.name!r}."
        )


def _check_together(config: Config) -> None:
    """Check values whose range depends on another value."""
    steps = config.sampling.steps
    _require(
        config,
        "sampling.window",
        lambda value: value < steps,
        f"less than sampling.steps = {steps} (the last step is not trained)",
    )
    _require(
        config,
        "policy.adapter",
        lambda value: value is None or config.policy.name != "toy",
        "null for policy.name toy, which has no LoRA",
    )
    writes = config.policy.name == "causal_lm"
    _require(
        config,
        "loss.kl",
        lambda value: value is None or (value == "k3") == writes,
        "k3 or null for a language model" if writes else "another than k3, which is for text",
    )
    _require(
        config,
        "loss.kind",
        lambda value: value == "grpo" or writes,
        f"grpo for policy.name {config.policy.name}: value heads read language models",
    )
    _require(
        config,
        "loss.steps",
        lambda value: value == "plain" or config.policy.name == "sd3",
        f"plain for policy.name {config.policy.name}: there are no denoising steps",
    )
    for name, files in (("train", config.prompts.train), ("heldout", config.prompts.heldout)):
        if isinstance(files, list):
            _check_distinct(f"prompts.{name}", files, config.prompts.column)
    sampler = config.sampling.sampler
    if sampler not in SAMPLERS and ":" not in sampler:
        raise ConfigError(
            f"sampling.sampler: should be one of {', '.join(SAMPLERS)}, or an import path such as "
            f"my_module:my_step. Found {sampler!r}.{did_you_mean(sampler, SAMPLERS)}"
        )
    if config.sampling.sampler == "cps":
        _require(config, "sampling.noise_level", lambda value: value <= 1, "at most 1 for cps")
    if config.evaluation.every:
        _require(
            config,
            "prompts.heldout",
            lambda value: value is not None,
            "a prompt file while evaluation.every is not 0",
        )


def _check_distinct(key: str, files: list[Any], column: str) -> None:
    seen: dict[tuple[Path, str], int] = {}
    for number, file in enumerate(files):
        record = PromptFileConfig(path=file) if isinstance(file, str) else file
        first = seen.setdefault((Path(record.path).resolve(), record.column or column), number)
        if first != number:
            raise ConfigError(
                f"{key}[{number}]: should be another file than {key}[{first}]. "
                f"Found `{record.path}` again."
            )


def check_prompts(prompts: dict[str, Any]) -> None:
    """Check the lists of prompt files, as a YAML file has them.

    Raises:
        ConfigError: Naming the first entry that is wrong.
    """
    for name, record in _PROMPT_FILES.items():
        key, value = f"prompts.{name}", prompts.get(name)
        if value is None or isinstance(value, str):
            continue
        if not isinstance(value, list) or not value:
            raise ConfigError(f"{key}: should be a prompt file or a list of some. Found {value!r}.")
        for number, entry in enumerate(value):
            if not isinstance(entry, str):
                _check_prompt_file(f"{key}[{number}]", entry, record)


def _check_prompt_file(key: str, entry: Any, record: type[PromptFileConfig]) -> None:
    if not isinstance(entry, dict) or "path" not in entry:
        raise ConfigError(f"{key}: should be a file or a mapping with `path`. Found {entry!r}.")
    valid = [field.name for field in dataclasses.fields(record)]
    for name in entry:
        if name not in valid:
            hint = did_you_mean(str(name), valid)
            if name == "weight":
                hint = " Every held-out prompt is drawn; weights are for prompts.train."
            raise ConfigError(f"{key}.{name}: unknown key.{hint} Valid keys: {', '.join(valid)}.")
    for name in ("path", "column"):
        value = entry.get(name)
        if not isinstance(value, str) and (name == "path" or value is not None):
            raise ConfigError(f"{key}.{name}: should be text. Found {value!r}.")
    weight = entry.get("weight", 1.0)
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not 0 < weight < math.inf:
        raise ConfigError(f"{key}.weight: should be a positive number. Found {weight!r}.")


def check_rewards(rewards: dict[str, Any], section: str = "rewards") -> None:
    """Check every objective's name, and its options as far as they are common to all heads.

    Raises:
        ConfigError: Naming the first that is wrong.
    """
    for name, options in rewards.items():
        _check_name(section, name)
        key = f"{section}.{name}"
        if not isinstance(options, dict):
            raise ConfigError(f"{key}: should be a mapping of options. Found {options!r}.")
        weight = options.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ConfigError(f"{key}.weight: should be a number. Found {weight!r}.")
        if not math.isfinite(weight):
            raise ConfigError(f"{key}.weight: should be finite. Found {weight}.")
        for text in ("head", "path"):
            if not isinstance(options.get(text, ""), str):
                raise ConfigError(f"{key}.{text}: should be text. Found {options[text]!r}.")


def _check_name(section: str, name: Any) -> None:
    """Check a name of a reward: it ends names of metrics, and heads columns."""
    if not isinstance(name, str):
        shown = json.dumps(name, default=str)
        raise ConfigError(
            f'{section}.{shown}: should be a name that is text, such as "{shown}" in quotes. Found '
            f"{shown}."
        )
    if not any(letter.isalnum() for letter in name) or name != "".join(name.splitlines()):
        raise ConfigError(
            f"{section}.{name!r}: should be a name of one line, with a letter or a digit. Found "
            f"{name!r}."
        )
    if name.startswith("="):
        raise ConfigError(
            f"{section}.{name}: should be a name that does not begin with `=`, which makes a "
            f"formula of the column of its scores. Found {name!r}."
        )
    if "~" in name:
        raise ConfigError(
            f"{section}.{name}: should be a name without `~`, which joins the names of two rewards "
            f"in a metric such as `correlation/a~b`. Found {name!r}."
        )


def _require(config: Config, key: str, holds: Callable[[Any], bool], expectation: str) -> None:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}: should be finite. Found {value}.")
    if not holds(value):
        raise ConfigError(f"{key}: should be {expectation}. Found {value!r}.")
