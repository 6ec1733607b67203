"""Every option of a run: those that are given, and the defaults of the method's and heads' code."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

import yaml
from yaml.representer import RepresenterError

from moa_diffusion.assembly.methods import method_of, weighting_options
from moa_diffusion.assembly.scorers import all_options
from moa_diffusion.config import Config
from moa_diffusion.objectives.mopo_offline import OfflineSettings

BOUNDS = 0.5  # of offline MOPO: the level of the responses themselves
_NO_OPTIONS = ("objectives", "weights")  # what `rewards` says


def with_defaults(settings: Config) -> Config:
    """Return the settings with all options of the chosen method, normalizer and heads.

    A run of them is the same run. Levels that a calibration file supplies are options too.

    Raises:
        ConfigError: For an unknown method or head, or a calibration file that cannot be used.
    """
    chosen = settings.objectives
    if settings.preferences.given:
        options = {"primary": None, "bounds": BOUNDS, **_defaults(OfflineSettings)}
        objectives = dataclasses.replace(chosen, weighting={**options, **chosen.weighting})
    else:
        method = method_of(settings)
        objectives = dataclasses.replace(
            chosen,
            normalizer={**_defaults(method.normalizer), **chosen.normalizer},
            weighting={
                **_defaults(method.weighting, without=method.options),
                **weighting_options(settings),
            },
        )
    rewards = {
        name: {"weight": 1.0, **all_options(f"rewards.{name}", name, options)}
        for name, options in settings.rewards.items()
    }
    watched = {
        name: all_options(f"evaluation.rewards.{name}", name, options)
        for name, options in settings.evaluation.rewards.items()
    }
    return dataclasses.replace(
        settings,
        objectives=objectives,
        rewards=rewards,
        evaluation=dataclasses.replace(settings.evaluation, rewards=watched),
    )


def changes(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Return by dotted key what differs between a run's ``config.yaml`` and settings for it.

    Where the run goes is no difference.

    Args:
        before: What the file holds; one of an earlier version has no defaults of code.
        now: The settings, with or without such defaults.

    Returns:
        The value before and the value now; None where there is none.

    Raises:
        ConfigError: As ``with_defaults``, for the settings.
    """
    was, given = flat(before), flat(now)
    used = flat(with_defaults(now)) if was.keys() - given.keys() else given
    keys = sorted((was.keys() | given.keys()) - {"resume", "output_dir"})
    return {key: (was.get(key), used.get(key)) for key in keys if was.get(key) != used.get(key)}


def flat(settings: Config) -> dict[str, str | int | float | bool]:
    """Return plain values by dotted key, for trackers."""
    rows: dict[str, str | int | float | bool] = {}

    def walk(values: Mapping[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            else:
                plain = isinstance(value, (str, int, float, bool))
                rows[f"{prefix}{name}"] = value if plain else str(value)

    walk(dataclasses.asdict(settings), "")
    return rows


def _defaults(kind: Callable[..., Any], without: Collection[str] = ()) -> dict[str, Any]:
    """Return the defaults of a constructor's options, as far as a YAML file holds them."""
    defaults = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        if name not in (*_NO_OPTIONS, *without) and parameter.default is not parameter.empty:
            with suppress(RepresenterError):  # of somebody's own class; not an option in a file
                defaults[name] = yaml.safe_load(yaml.safe_dump(parameter.default))
    return defaults
