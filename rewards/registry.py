"""Names of reward heads: open to every user through `@register`, strict about everything else.

Heads that come with the package are listed by name and module and imported when first asked for,
so that `import rewards` stays light. Their modules import heavy libraries in constructors only.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard, TypeVar

from rewards.base import FunctionHead, RewardHead, function_name, further_parameters

Target = type[RewardHead] | Callable[..., Any]
TargetT = TypeVar("TargetT", bound=Callable[..., Any])

_BUILT_IN = {
    "colourfulness": "rewards.simple",
    "jpeg_compressibility": "rewards.simple",
    "ocr": "rewards.ocr",
    "prompt_colour": "rewards.simple",
    "sharpness": "rewards.simple",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadInfo:
    """What `available` tells about one registered head."""

    name: str
    unit: str  # unit of the scores
    requires: tuple[str, ...]  # what a prompt must have for the head to apply
    doc: str  # first line of the docstring


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    target: Target
    unit: str
    requires: tuple[str, ...]


_entries: dict[str, _Entry] = {}


def register(
    name: str, *, unit: str | None = None, requires: Sequence[str] | None = None
) -> Callable[[TargetT], TargetT]:
    """Registers a `RewardHead` subclass or a plain function under a name.

    Args:
        name: The name that `create` and configs use.
        unit: Unit of the scores; by default the class attribute, and empty for a function.
        requires: What a prompt must have for the head to apply; by default likewise.

    Returns:
        A decorator that returns its argument as it was (a class takes over `name`, and `unit` and
        `requires` where given here).

    Raises:
        ValueError: If the name is taken by something else. Registering the same class or function
            again, as a module reload does, replaces it.
    """
    if not isinstance(name, str) or not name or ":" in name:
        raise ValueError(
            f'A head should be registered by name, `@register("name")`, without ":". '
            f"Found {name!r}."
        )

    def decorate(target: TargetT) -> TargetT:
        _check_free(name, target)
        if isinstance(target, type):
            if not issubclass(target, RewardHead):
                raise ValueError(
                    f"`@register` takes a RewardHead subclass or a function. "
                    f"Found the class `{target.__qualname__}`."
                )
            target.name = name
            if unit is not None:
                target.unit = unit
            if requires is not None:
                target.requires = tuple(requires)
            entry = _Entry(target=target, unit=target.unit, requires=target.requires)
        else:
            further_parameters(target)  # a wrong signature is told here, not at the first batch
            entry = _Entry(target=target, unit=unit or "", requires=tuple(requires or ()))
        _entries[name] = entry
        return target

    return decorate


def create(name: str, path: str | None = None, **options: Any) -> RewardHead:
    """Builds a head from its registered name or from an import path.

    Args:
        name: A registered name; with `path`, merely the name that the head gets. A name that
            contains ":" is taken as an import path.
        path: `my_module:my_reward` or `path/to/file.py:my_reward`, naming a function or a
            `RewardHead` subclass.
        options: Constructor arguments of the head; for a function, values for its parameters
            after `images` and `prompts`.

    Returns:
        The head, with `head.name` set to `name`.

    Raises:
        ValueError: If the name, the path or an option is wrong; the message lists what is valid.
        ImportError: If the head needs a package that is not installed.
    """
    if path is None and ":" in name:
        name, path = name.rsplit(":", 1)[1], name
    if path is None:
        entry = _lookup(name)
    else:
        target = _import_target(path)
        known = (entry for entry in _entries.values() if entry.target is target)
        entry = next(known, None) or _describe(target)

    if _is_head_class(entry.target):
        parameters = inspect.signature(entry.target).parameters.values()
        # `**options` of a constructor takes nothing: a misspelt option must not vanish in it.
        named = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
        _check_options(name, named, options)
        _check_complete(name, named, options)
        head = entry.target(**options)
        head.name = name
        return head
    named, _ = further_parameters(entry.target)
    _check_options(name, named, options)
    return FunctionHead(
        entry.target, name=name, unit=entry.unit, requires=entry.requires, options=options
    )


def available() -> dict[str, HeadInfo]:
    """Lists every registered head: name -> unit, requirements and one line of documentation."""
    for module in sorted(set(_BUILT_IN.values())):
        importlib.import_module(module)
    infos = {}
    for name, entry in sorted(_entries.items()):
        doc = (inspect.getdoc(entry.target) or "").strip().split("\n")[0]
        infos[name] = HeadInfo(name=name, unit=entry.unit, requires=entry.requires, doc=doc)
    return infos


def _lookup(name: str) -> _Entry:
    if name in _BUILT_IN:
        importlib.import_module(_BUILT_IN[name])
    if name not in _entries:
        known = sorted(set(_BUILT_IN) | set(_entries))
        raise ValueError(
            f'Unknown reward head "{name}".{_nearest(name, known)} Known heads: '
            f"{', '.join(known)}. A head of your own is named by `path: my_module:my_reward`."
        )
    return _entries[name]


def _describe(target: Target) -> _Entry:
    if _is_head_class(target):
        return _Entry(target=target, unit=target.unit, requires=target.requires)
    return _Entry(target=target, unit="", requires=())


def _is_head_class(target: Target) -> TypeGuard[type[RewardHead]]:
    return isinstance(target, type)  # other classes were turned away at the door


def _check_free(name: str, target: Target) -> None:
    if name in _entries:
        taken = _entries[name].target
        if _identity(taken) != _identity(target):
            raise ValueError(
                f'The reward head "{name}" is registered twice: by {_place(taken)} and by '
                f"{_place(target)}."
            )
    elif name in _BUILT_IN and target.__module__ != _BUILT_IN[name]:
        raise ValueError(
            f'The reward head "{name}" is registered twice: by the built-in module '
            f"{_BUILT_IN[name]} and by {_place(target)}."
        )


def _identity(target: Target) -> tuple[str, str]:
    # By file and not by module name: a script is `__main__` when run and has its own name when
    # imported, and both are the same head.
    return _source_file(target), getattr(target, "__qualname__", repr(target))


def _source_file(target: Target) -> str:
    try:
        return inspect.getsourcefile(target) or target.__module__
    except (OSError, TypeError):  # classes typed into a prompt, callables without source
        return str(getattr(target, "__module__", repr(target)))


def _place(target: Target) -> str:
    try:
        line = f":{inspect.getsourcelines(target)[1]}"
    except (OSError, TypeError):
        line = ""
    return f"`{function_name(target)}` ({_source_file(target)}{line})"


def _nearest(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f' Did you mean "{matches[0]}"?' if matches else ""


def _check_options(name: str, named: dict[str, Any], options: dict[str, Any]) -> None:
    for option in options:
        if option not in named:
            raise ValueError(
                f'Reward head "{name}" has no option "{option}".'
                f"{_nearest(option, list(named))} Valid options: {', '.join(named) or 'none'}."
            )


def _check_complete(name: str, named: dict[str, Any], options: dict[str, Any]) -> None:
    empty = inspect.Parameter.empty
    missing = [key for key in named if named[key] is empty and key not in options]
    if missing:
        raise ValueError(
            f'Reward head "{name}" needs the option{"s" if len(missing) > 1 else ""} '
            f"{', '.join(missing)}. Valid options: {', '.join(named)}."
        )


def _import_target(path: str) -> Target:
    place, _, attribute = path.rpartition(":")
    if not place or not attribute:
        raise ValueError(
            f"A reward path should read `my_module:my_reward` or `path/to/file.py:my_reward`. "
            f"Found {path!r}."
        )
    module = _import_file(place, path) if place.endswith(".py") else _import_module(place, path)
    found: Any = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            public = sorted(key for key in vars(module) if not key.startswith("_"))
            raise ValueError(
                f'Reward path "{path}": `{place}` has no attribute `{attribute}`.'
                f"{_nearest(attribute, public)}"
            ) from error
    if isinstance(found, RewardHead):
        raise ValueError(
            f'Reward path "{path}": `{attribute}` is a finished head. Name its class, '
            f"`{type(found).__name__}`, so that every objective gets its own."
        )
    if isinstance(found, type) and not issubclass(found, RewardHead):
        raise ValueError(f'Reward path "{path}": `{attribute}` is a class but no RewardHead.')
    if not callable(found):
        raise ValueError(
            f'Reward path "{path}": `{attribute}` is not callable. Found {type(found).__name__}.'
        )
    target: Target = found
    return target


def _import_module(place: str, path: str) -> ModuleType:
    if os.getcwd() not in sys.path:  # a script's own folder stands there instead
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(error.name + ".")):
            raise ValueError(
                f'Reward path "{path}": there is no module `{error.name}` on the import path. '
                f"A file is named by `path/to/file.py:my_reward`."
            ) from error
        raise ValueError(f'Reward path "{path}": importing `{place}` failed: {error}') from error
    except Exception as error:
        raise ValueError(
            f'Reward path "{path}": importing `{place}` failed: {type(error).__name__}: {error}'
        ) from error


def _import_file(place: str, path: str) -> ModuleType:
    file = Path(place).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f'Reward path "{path}": there is no file `{file}`.')
    # One module per file: asked for twice, a file runs once.
    name = f"_reward_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f'Reward path "{path}": `{file}` cannot be imported.')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(
            f'Reward path "{path}": importing `{file}` failed: {type(error).__name__}: {error}'
        ) from error
    return module
