"""What several values have to be together, checked before anything is built."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import eq
from pathlib import Path
from typing import Any

from moa_diffusion.config.presets import forward_rules
from moa_diffusion.config.schema import (
    SAMPLERS,
    Config,
    ForwardConfig,
    LossConfig,
    PromptFileConfig,
    SamplingConfig,
)
from moa_diffusion.types import ConfigError
from rewards.suggestions import did_you_mean


def check_together(config: Config) -> None:
    """Check what depends on more than one value; ``schema`` checks each value by itself.

    Raises:
        ConfigError: For the first value that does not go with another.
    """
    _check_policy(config)
    _check_numbers(config)
    if config.preferences.given:
        _check_preferences(config)
    if not config.rewards and not config.preferences.given:
        raise ConfigError(
            "rewards: should name at least one objective, such as `rewards: {ocr: {weight: 1}}`. "
            "Found none."
        )
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
    for name in preferences.pairs:
        _check_name("preferences.pairs", name)
    if config.objectives.method != "mopo":
        raise ConfigError(
            "objectives.method: should be mopo, which learns from preferences. "
            f"Found {config.objectives.method!r}."
        )
    for key, value, neutral in (
        ("loss.kind", config.loss.kind, "grpo"),
        ("loss.kl_weight", config.loss.kl_weight, 0.0),
        ("loss.kl_target", config.loss.kl_target, None),
    ):
        if value != neutral:
            raise ConfigError(
                f"{key}: should be {'null' if neutral is None else neutral} (the default) with "
                "preferences, where MOPO's `tau` holds the policy back and nothing is estimated. "
                f"Found {value!r}."
            )
    if config.policy.name != "causal_lm":
        raise ConfigError(
            "policy.name: should be causal_lm, which can be taught given responses. "
            f"Found {config.policy.name!r}."
        )


def _check_policy(config: Config) -> None:
    """Check what only some kinds of policy have."""
    _require(
        config,
        "policy.adapter",
        lambda value: value is None or config.policy.name != "toy",
        "null for policy.name toy, which has no LoRA",
    )
    _require(
        config,
        "policy.shard",
        lambda value: not value or config.policy.name == "sd3",
        f"false for policy.name {config.policy.name}: only transformers of images are split",
    )
    _require(
        config,
        "policy.attention",
        lambda value: value == "native" or config.policy.name == "sd3",
        f"native for policy.name {config.policy.name}: only transformers of images have a choice",
    )
    _require(
        config,
        "policy.compile",
        lambda value: value == "off" or config.policy.name == "sd3",
        f"off for policy.name {config.policy.name}: only transformers of images are compiled",
    )
    _require(
        config,
        "policy.compile",
        lambda value: value == "off" or not config.policy.shard or config.policy.dtype != "float32",
        "off with policy.shard and policy.dtype float32: those layers note in their backward pass, "
        "outside of a graph, what the objectives' gradients are made of (float16 and bfloat16 have "
        "layers that do not)",
    )


def _check_numbers(config: Config) -> None:
    """Check values whose range depends on another value."""
    steps = config.sampling.steps
    _require(
        config,
        "sampling.window",
        lambda value: value < steps,
        f"less than sampling.steps = {steps} (the last step is not trained)",
    )
    _check_loss(config)
    _check_guards(config)
    _require(
        config,
        "evaluation.resolution",
        lambda value: value is None or config.policy.name == "sd3",
        f"null for policy.name {config.policy.name}, which draws no images",
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


def _check_loss(config: Config) -> None:
    """Check the kind of loss against the kind of policy."""
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
        lambda value: value != "ppo" or writes,
        f"grpo for policy.name {config.policy.name}: value heads read language models",
    )
    _require(
        config,
        "loss.kind",
        lambda value: value != "forward" or config.policy.name == "sd3",
        f"grpo for policy.name {config.policy.name}: only images are noised again",
    )
    if config.loss.kind == "forward":
        _check_forward(config)
    else:
        _require(
            config,
            "loss.forward",
            partial(eq, ForwardConfig()),
            f"left out for loss.kind {config.loss.kind}",
        )
    _require(
        config,
        "loss.steps",
        lambda value: value == "plain" or config.policy.name == "sd3",
        f"plain for policy.name {config.policy.name}: there are no denoising steps",
    )
    if config.policy.name != "sd3":
        without = f"for policy.name {config.policy.name}: there are no velocities"
        _require(config, "loss.clip", partial(eq, "ratio"), f"ratio {without}")
        _require(config, "loss.norm_weight", partial(eq, 0), f"0 {without}")


def _check_guards(config: Config) -> None:
    """Check what holds the policy back against what it would act on."""
    _require(
        config,
        "loss.clip",
        lambda value: value != "normalized" or config.loss.steps != "equal",
        "ratio with loss.steps equal, whose ratios are normalized already",
    )
    _require(
        config,
        "loss.kl_target",
        lambda value: value is None or config.loss.kl_weight > 0,
        "null while loss.kl_weight, which it starts from, is 0",
    )
    _require(
        config,
        "loss.kl_target",
        lambda value: value is None or config.alarm.action in ("warn", "stop"),
        f"null with alarm.action {config.alarm.action}, whose factor it would take back",
    )
    _require(
        config,
        "loss.kl_target",
        lambda value: value is None or _even_kl(config),
        "null with loss.kl gaussian or dt_free and a window that moves, whose KL differs a "
        "hundredfold between its places: take loss.kl velocity, or sampling.window_mode first",
    )
    _require(
        config,
        "loss.steps",
        lambda value: value != "noise" or config.sampling.sampler != "cps",
        "plain or equal for sampling.sampler cps, whose log-prob is weighed by its noise already",
    )


def _even_kl(config: Config) -> bool:
    """Return whether the KL of one rollout can be compared with that of another."""
    sampling, loss = config.sampling, config.loss
    moves = sampling.window > 0 and sampling.window_mode != "first"
    return (
        config.policy.name != "sd3" or loss.kind == "forward" or loss.kl == "velocity" or not moves
    )


def _check_forward(config: Config) -> None:
    """Check what images that are noised again do not have, and what would have no effect."""
    rules, steps = forward_rules(config.loss.forward), config.sampling.steps
    # Between `first` and `last` there may be fewer: the pipeline's scheduler knows.
    if rules.times in ("grid", "strata") and rules.draws > steps:
        raise ConfigError(
            f"loss.forward.draws: should be at most sampling.steps = {steps} for times "
            f"{rules.times}, which takes the noise levels of sampling. Found {rules.draws}."
        )
    _require(
        config,
        "loss.kl_weight",
        lambda value: value > 0 or any(copy.weight > 0 for copy in rules.copies.values()),
        "positive for loss.kind forward where no copy has a weight (RAM's is 1): nothing else "
        "bounds how far velocities go",
    )
    _require(
        config,
        "sampling.guidance",
        lambda value: value <= 1,
        "at most 1 for loss.kind forward, whose training passes have no guidance",
    )
    _require(
        config,
        "loss.kl",
        lambda value: value in (None, "velocity"),
        "velocity or null for loss.kind forward",
    )
    _require(
        config,
        "sampling.shared_start",
        lambda value: not value,
        "false for loss.kind forward, where samples of a group that start alike end alike",
    )
    untrained = "for loss.kind forward, where no step of sampling is trained"
    for key, neutral, reason in (
        ("loss.clip", "ratio", "for loss.kind forward, which has no ratios"),
        ("loss.clip_range", LossConfig().clip_range, "for loss.kind forward, which has no ratios"),
        ("loss.ratio_tolerance", None, "for loss.kind forward, which has no ratios"),
        ("loss.steps", "plain", untrained),
        ("sampling.window", 0, untrained),
        ("sampling.window_mode", SamplingConfig().window_mode, untrained),
        ("sampling.window_stay", SamplingConfig().window_stay, untrained),
        ("sampling.noise_level", SamplingConfig().noise_level, untrained),
        ("sampling.sampler", SamplingConfig().sampler, untrained),
    ):
        expected = "null" if neutral is None else neutral
        _require(config, key, partial(eq, neutral), f"{expected} (the default) {reason}")


def _check_distinct(key: str, files: Sequence[PromptFileConfig], column: str) -> None:
    seen: dict[tuple[Path, str], int] = {}
    for number, file in enumerate(files):
        first = seen.setdefault((Path(file.path).resolve(), file.column or column), number)
        if first != number:
            raise ConfigError(
                f"{key}[{number}]: should be another file than {key}[{first}]. "
                f"Found `{file.path}` again."
            )


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
    if not holds(value):
        raise ConfigError(f"{key}: should be {expectation}. Found {value!r}.")
