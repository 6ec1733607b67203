"""From command line and YAML file to a checked configuration, strict about every key."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError

from moa_diffusion.config.check import check_rewards, check_together
from moa_diffusion.config.help import help_text
from moa_diffusion.config.messages import all_keys, alternatives, plain, record_in, without_ranges
from moa_diffusion.config.places import expand_homes, follow_run
from moa_diffusion.config.schema import Config
from moa_diffusion.config.yaml_files import parse_yaml, read_yaml
from moa_diffusion.files.paths import expanded
from moa_diffusion.files.text import check_encodable
from moa_diffusion.types import ConfigError

HELP = ("-h", "--help")


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Read the command line (``sys.argv`` by default), check every key and value.

    Raises:
        ConfigError: Naming the key, what was expected, and what was found.
        SystemExit: For ``--help``, ``--help all`` and ``--print_config``.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    check_encodable("command line", arguments)
    asked: set[str] = set()
    rest: list[str] = []
    for before, option in pairwise(["", *arguments]):
        whole = before in HELP and option == "all"
        (asked.add if whole or option in (*HELP, "--print_config") else rest.append)(option)
    values, source = _gather(rest)
    if asked.intersection(HELP):
        print(help_text(values, everything="all" in asked), end="")
        raise SystemExit(0)
    config = from_dict(values)
    expand_homes(config)
    check_together(config)
    follow_run(config, source if isinstance(source, Path) else None, explicit=source == "option")
    if asked:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a YAML file with dotted overrides (``["--seed", "1"]``)."""
    return parse(["--config", str(path), *overrides])


def from_dict(values: dict[str, Any]) -> Config:
    """Turn nested dictionaries into dataclasses; keys without a value keep their default.

    Raises:
        ConfigError: Naming every key that is unknown or has a value that it may not have.
    """
    for section, rewards in (
        ("rewards", values.get("rewards")),
        ("evaluation.rewards", _mapping(values.get("evaluation")).get("rewards")),
    ):
        check_rewards(_mapping(rewards), section)
    try:
        return _adapter().validate_python(values)
    except ValidationError as error:
        raise ConfigError(plain(error, values)) from None


def check(config: Config) -> None:
    """Check a configuration that was changed since it was made.

    Raises:
        ConfigError: As ``from_dict``, or for values that do not go together.
    """
    from_dict(dataclasses.asdict(config))
    check_together(config)


def to_yaml(config: Config) -> str:
    """Return the whole configuration, defaults included, as YAML that ``parse`` reads back."""
    text: str = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    return text


@functools.cache
def _adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config)


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _gather(
    arguments: Sequence[str],
) -> tuple[dict[str, Any], Path | Literal["option", "default"]]:
    """Lay options and files over each other, in their order.

    Returns:
        What is set, nested; and what says where the run goes: a file, an option or the default.

    Raises:
        ConfigError: For an option without its value, a file that cannot be read, or an option that
            a later file would undo.
    """
    values: dict[str, Any] = {}
    options: dict[str, str] = {}
    source: Path | Literal["option", "default"] = "default"
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if not argument.startswith("--"):
            raise ConfigError(f"Options should begin with `--`. Found {argument!r}.")
        name, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise ConfigError(
                    f"{name}: should have a value, as in `--{name} VALUE`. Found none."
                )
            text = queue.pop(0)
        if name == "config":
            try:
                file = expanded(text)
            except ValueError as error:
                raise ConfigError(f"config: {error}") from None
            given = read_yaml(file)
            source = file if "output_dir" in given else source
            merged = _merge(values, given)
            _take_away_nulls(merged, given, earlier=values)
            for option, was in options.items():
                if _at(merged, option) != _at(values, option):
                    raise ConfigError(
                        f"{option}: should come after --config {text}, which sets it too. Found "
                        f"`--{option} {was}` before it."
                    )
            values = merged
            continue
        source = "option" if name == "output_dir" else source
        options[name] = text
        nested = _value(name, text)
        for part in reversed(name.split(".")):
            nested = {part: nested}
        values = _merge(values, nested)
        _take_away_nulls(values, nested)
    return values, source


def _value(name: str, text: str) -> Any:
    """Return what the text of an option stands for: text where its key takes text, else YAML."""
    hint = all_keys().get(name)
    kinds = {without_ranges(kind) for kind in alternatives(hint)}
    files = record_in(hint) is not None
    text_is_meant = any(kind is str or get_origin(kind) is Literal for kind in kinds)
    as_it_is = Path(text).is_file() if files else text_is_meant
    if as_it_is and not (text == "null" and NoneType in kinds):
        return text
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text  # if it should have been YAML, its type is wrong
    return text if files and isinstance(value, (int, float)) else value


def _at(values: Any, name: str) -> Any:
    """Return what stands at a dotted key; None for nothing."""
    for part in name.split("."):
        values = _mapping(values).get(part)
    return values


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _take_away_nulls(
    values: dict[str, Any], over: Any, *, earlier: Any = None, key: str = ""
) -> None:
    """Take away what is set to null in an open mapping: ``--rewards.ocr null``.

    Args:
        values: What is set, changed in place.
        over: What was laid over it last.
        earlier: What was set before that by a file; a null in it that takes nothing away was
            forgotten, perhaps, and stays. None for options, whose null always takes away.
        key: Dotted key of the mapping.
    """
    for name, value in list(over.items()):
        inside = f"{key}.{name}".lstrip(".")
        before = earlier.get(name) if isinstance(earlier, dict) else earlier
        if value is None and _is_open(key) and (earlier is None or before is not None):
            del values[name]
        elif isinstance(value, dict):
            below = None if earlier is None else before if isinstance(before, dict) else {}
            _take_away_nulls(values[name], value, earlier=below, key=inside)


def _is_open(key: str) -> bool:
    """Return whether a mapping takes any key, as ``rewards`` and what is in it do."""
    opened = [name for name, hint in all_keys().items() if get_origin(hint) is dict]
    return any(f"{key}.".startswith(f"{name}.") for name in opened)
