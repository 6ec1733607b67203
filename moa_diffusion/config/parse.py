"""From command line and YAML file to a checked configuration, strict about every key."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import yaml

from moa_diffusion.config.check import check, check_prompts, check_rewards
from moa_diffusion.config.messages import plain
from moa_diffusion.config.places import expand_homes, follow_run
from moa_diffusion.config.schema import Config
from moa_diffusion.files.meant import nearest
from moa_diffusion.files.paths import expanded
from moa_diffusion.files.text import check_encodable
from moa_diffusion.types import ConfigError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Read the command line (``sys.argv`` by default), check every key and value.

    Raises:
        ConfigError: Naming the key, what was expected, and what was found.
        SystemExit: For ``--help`` and ``--print_config``.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    check_encodable("command line", arguments)
    arguments, open_mappings, prompt_files = _merge_open_values(arguments)
    for section in ("rewards", "evaluation.rewards"):
        check_rewards(open_mappings.get(section, {}), section)
    try:
        namespace = _parser().parse_args(arguments)
    except Exception as error:  # argparse and jsonargparse raise several kinds
        raise ConfigError(plain(str(error), _known_hint)) from error
    values = namespace.as_dict()
    for key, value in (open_mappings | prompt_files).items():
        *sections, last = key.split(".")  # jsonargparse reads text in them as YAML again
        functools.reduce(dict.__getitem__, sections, values)[last] = value
    config = from_dict(values)
    _check_nulls(config)
    expand_homes(config)
    check(config)
    source, explicit = _source_of_output_dir(arguments)
    follow_run(config, source, explicit=explicit)
    if namespace.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


# Every call of `get_type_hints` compiles all annotations.
_hints: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)


@functools.cache  # making it takes as long as its work
def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    # jsonargparse's own option would print open mappings with words read as YAML again.
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, print_config=None)
    parser.add_argument("--config", action="config", help="YAML file; later options override it.")
    parser.add_argument(
        "--print_config", action="store_true", help="Print the whole configuration and exit."
    )
    parser.add_class_arguments(Config, None)
    return parser


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a YAML file with dotted overrides (``["--seed", "1"]``)."""
    return parse(["--config", str(path), *overrides])


def from_dict(values: dict[str, Any]) -> Config:
    """Nested dictionaries to dataclasses; keys without a value keep their default.

    Raises:
        ConfigError: For a list of prompt files with a wrong entry.
    """
    check_prompts(values.get("prompts", {}))
    built: Config = _build(Config, values)
    return built


def to_yaml(config: Config) -> str:
    """Return the whole configuration, defaults included, as YAML that ``parse`` reads back."""
    text: str = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    return text


def _build(kind: Any, values: dict[str, Any]) -> Any:
    hints = _hints(kind)
    return kind(**{n: _convert(hints[n], value) for n, value in values.items() if n in hints})


def _convert(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value)
    record = _record(hint) if isinstance(value, list) else None
    if record is None:
        return value
    return [_build(record, item) if isinstance(item, dict) else item for item in value]


def _record(hint: Any) -> Any:
    """Return the dataclass in a hint such as ``str | list[str | Record]``; None without one."""
    inside = (part if dataclasses.is_dataclass(part) else _record(part) for part in get_args(hint))
    return next((record for record in inside if record is not None), None)


def _merge_open_values(
    arguments: Sequence[str],
) -> tuple[list[str], dict[str, dict[str, Any]], dict[str, Any]]:
    """Check every key, and gather what is set below open mappings (``rewards``) into one option.

    jsonargparse lets ``--rewards.ocr.weight 2`` replace all other options of ``ocr``; here it
    changes the one. On the command line null takes a key away. And it lets a list of prompt files
    inherit the weights of the list that it replaces; here only the last list counts.

    Returns:
        The arguments with one option per open mapping and list of prompt files, and these mappings
        and lists by dotted key.
    """
    rest: list[str] = []
    open_mappings: dict[str, dict[str, Any]] = {}
    prompt_files: dict[str, Any] = {}
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        name, separator, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name.split("=")[0] in ("help", "print_config"):
            rest.append(argument)
            continue
        if not separator and queue and not queue[0].startswith("--"):
            value, separator = queue.pop(0), " "
        if name == "config":
            value = _file(value)
            rest.append(f"--config={value}")
            _check_mapping(values := _read_yaml(value))
            prompt_files |= _prompt_files(values.get("prompts", {}))
            for key, mapping in _open_values(values):
                open_mappings[key] = _merge(open_mappings.get(key, {}), mapping)
            continue
        rest += [argument] if separator != " " else [argument, value]
        _check_key(name)
        if name in ("prompts.train", "prompts.heldout") and separator:
            prompt_files |= _prompt_files({name.removeprefix("prompts."): _listed(value)})
        opened = next((key for key in _OPEN if f"{name}.".startswith(f"{key}.")), None)
        if opened is not None:
            del rest[-1 if separator != " " else -2 :]
            nested = yaml.load(value, Loader=_Yaml) if separator else None
            for part in reversed(name.removeprefix(opened).split(".")[1:]):
                nested = {part: nested}
            if not isinstance(nested, dict):
                raise ConfigError(f"{name}: should be a mapping. Found {nested!r}.")
            open_mappings[opened] = _without_nulls(
                _merge(open_mappings.get(opened, {}), nested), nested
            )
    prompt_files = {key: files for key, files in prompt_files.items() if isinstance(files, list)}
    gathered = open_mappings | prompt_files
    rest += [f"--{key}={json.dumps(value)}" for key, value in gathered.items()]
    return rest, open_mappings, prompt_files


def _source_of_output_dir(arguments: Sequence[str]) -> tuple[Path | None, bool]:
    """Return the last file that sets ``output_dir``, and whether an option sets it after that."""
    source, explicit = None, False
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, rest = option.partition("=")
        if name == "--output_dir":
            explicit = True
        elif name == "--config" and "output_dir" in _read_yaml(rest if equals else value):
            source, explicit = Path(rest if equals else value), False
    return source, explicit


def _prompt_files(prompts: dict[str, Any]) -> dict[str, Any]:
    """Return what ``prompts.train`` and ``prompts.heldout`` set, as lists with all defaults."""
    check_prompts(prompts)
    chosen = {f"prompts.{name}": prompts[name] for name in ("train", "heldout") if name in prompts}
    for key, files in chosen.items():
        if isinstance(files, list):
            entries = [{"path": file} if isinstance(file, str) else file for file in files]
            chosen[key] = [dataclasses.asdict(_record(_hint(key))(**entry)) for entry in entries]
    return chosen


def _listed(text: str) -> Any:
    """Return a list or mapping in an option's text; the text where it is a file's name."""
    if Path(text).is_file():
        return text
    try:
        value = yaml.load(text, Loader=_Yaml)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (list, dict)) else text


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _without_nulls(merged: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Take away what an option set to null: ``--rewards.ocr null``."""
    kept = dict(merged)
    for key, value in over.items():
        if value is None:
            del kept[key]
        elif isinstance(value, dict):
            kept[key] = _without_nulls(kept[key], value)
    return kept


def _open_values(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Open mappings that a YAML file sets, by dotted key."""
    mappings = []
    for key in _OPEN:
        value: Any = values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            if not isinstance(value, dict):
                raise ConfigError(f"{key}: should be a mapping. Found {value!r}.")
            mappings.append((key, value))
    return mappings


def _file(name: str) -> str:
    try:
        return str(expanded(name))
    except ValueError as error:
        raise ConfigError(f"config: {error}") from None


def _read_yaml(name: str) -> dict[str, Any]:
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"config: should be a YAML file. Found no file `{name}`.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Yaml)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: `{name}` should be YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config: `{name}` should hold a mapping. Found {values!r}.")
    check_encodable(f"config: `{name}`", values)
    return values


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's numbers and truth values: 1e-5 is a number, a bare off is a word.

    A key given twice is refused; YAML libraries silently keep the last.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key `{key.value}` stands here twice",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver(
    _BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Yaml.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def _check_mapping(values: dict[str, Any], kind: Any = None, prefix: str = "") -> None:
    """Check the keys of a YAML file, and that sections are mappings."""
    hints = _hints(Config if kind is None else kind)
    for name, value in values.items():
        key = f"{prefix}{name}"
        _check_key(key)
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise ConfigError(f"{key}: should be a mapping of keys. Found {value!r}.")
            _check_mapping(value, hints[name], f"{key}.")


def _check_nulls(config: Any, prefix: str = "") -> None:
    hints = _hints(type(config))
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            _check_nulls(value, f"{prefix}{name}.")
        elif value is None and type(None) not in get_args(hints[name]):
            raise ConfigError(f"{prefix}{name}: should have a value. Found null.")


def _check_key(key: str) -> None:
    """Walk the dataclasses along a dotted key; open mappings accept anything below them."""
    kind: Any = Config
    seen = ""
    for part in key.split("."):
        if not dataclasses.is_dataclass(kind):
            if get_origin(kind) is dict:
                return
            raise ConfigError(f"{key}: `{seen.rstrip('.')}` holds a value, not a mapping.")
        hints = _hints(kind)
        if part not in hints:
            last = key.rsplit(".", 1)[-1]
            same = [known for known in _all_keys() if known.split(".")[-1] == last]
            known = [*(seen + name for name in hints), *_all_keys()]
            near = same[0] if same else nearest(seen + part, known)
            hint = "" if near is None else f" Did you mean `{near}`?"
            raise ConfigError(
                f"{key}: unknown key.{hint} Valid keys here: {', '.join(sorted(hints))}."
            )
        kind, seen = hints[part], f"{seen}{part}."


def _all_keys(kind: Any = None, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in _hints(Config if kind is None else kind).items():
        keys.append(f"{prefix}{name}")
        if dataclasses.is_dataclass(hint):
            keys += _all_keys(hint, f"{prefix}{name}.")
    return keys


def _open_keys() -> list[str]:
    return [key for key in _all_keys() if get_origin(_hint(key)) is dict]


def _hint(key: str) -> Any:
    kind: Any = Config
    for part in key.split("."):
        kind = _hints(kind)[part]
    return kind


def _known_hint(key: str) -> Any:
    """Return the type of a key; None if there is no such key."""
    return _hint(key) if key in _all_keys() else None


_OPEN = _open_keys()  # mappings that take any key
