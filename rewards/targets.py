"""From what is written down to the function or class it names: import paths and entry points."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.base import RewardHead
from rewards.blame import cause_of
from rewards.parameters import parameters_of
from rewards.source import FILE_MODULE
from rewards.suggestions import did_you_mean

Target = type[RewardHead] | Callable[..., Any]

GROUP = "moa_diffusion.rewards"  # entry points of this group declare heads


def declared() -> dict[str, list[EntryPoint]]:
    """Return the heads that packages declare in the entry point group ``GROUP``; load none.

    Packages that are installed later are seen by the next process.

    Returns:
        By name; more than one where several packages declare the same.
    """
    return _declared_on(tuple(sys.path))


@functools.cache  # every installed package is looked through, a tenth of a second
def _declared_on(path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    points: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        points.setdefault(point.name, []).append(point)
    return points


def distribution(point: EntryPoint) -> str:
    """Return the package that declares an entry point, for messages: name and version."""
    if point.dist is None:
        return f"an unknown package (`{point.value}`)"
    return f'the package "{point.dist.name}" {point.dist.version}'


def load_entry_point(point: EntryPoint) -> Target:
    """Import what an entry point names.

    Raises:
        ValueError: If importing fails, or it names no head; the message names the package.
    """
    label = f'Reward head "{point.name}" of {distribution(point)} (entry point `{point.value}`)'
    try:
        target = point.load()
    except (Exception, SystemExit) as error:  # a script, where a module was meant, may end itself
        raise ValueError(f"{label}: loading failed: {cause_of(error)}") from error
    return _checked(target, point.attr or point.value, label)


def import_target(path: str) -> Target:
    """Import the head that a path names.

    Args:
        path: ``my_module:my_reward`` or ``path/to/file.py:my_reward``.

    Raises:
        ValueError: If importing fails, or it names no head; the message says which part failed.
    """
    imported = import_object(path, "reward")
    return _checked(imported, path.rpartition(":")[2], f'Reward path "{path}"')


def import_object(path: str, kind: str) -> Any:
    """Import whatever a path names.

    Args:
        path: ``my_module:my_name`` or ``path/to/file.py:my_name``.
        kind: What it names, as messages call it: "reward".

    Raises:
        ValueError: If importing fails; the message says which part failed.
    """
    place, _, attribute = path.rpartition(":")
    if not place or not attribute:
        raise ValueError(
            f"A {kind} path should read `my_module:my_{kind}` or `path/to/file.py:my_{kind}`. "
            f"Found {path!r}."
        )
    label = f'{kind.capitalize()} path "{path}"'
    if place.endswith(".py"):
        module = _import_file(place, label)
    else:
        module = _import_module(place, label, f"path/to/file.py:my_{kind}")
    target: Any = module
    for part in attribute.split("."):
        try:
            target = getattr(target, part)
        except AttributeError as error:
            public = sorted(key for key in vars(module) if not key.startswith("_"))
            raise ValueError(
                f"{label}: `{place}` has no attribute `{attribute}`."
                f"{did_you_mean(attribute, public)}{_namesake(place, vars(module).get('__file__'))}"
            ) from error
    return target


def _checked(value: Any, attribute: str, label: str) -> Target:
    if isinstance(value, RewardHead):
        raise ValueError(
            f"{label}: `{attribute}` is a finished head. Name its class, "
            f"`{type(value).__name__}`, so that every objective gets its own."
        )
    if isinstance(value, type) and not issubclass(value, RewardHead):
        raise ValueError(f"{label}: `{attribute}` is a class but no RewardHead.")
    if not callable(value):
        raise ValueError(f"{label}: `{attribute}` is not callable. Found {type(value).__name__}.")
    if not isinstance(value, type):
        try:
            parameters_of(value)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
    target: Target = value
    return target


def _namesake(place: str, imported: str | None) -> str:
    """Return what to do about a file of the name of another module, which was imported instead."""
    file = Path(*place.split(".")).with_suffix(".py")
    if place.endswith(".py") or not file.is_file() or str(file.resolve()) == imported:
        return ""
    return f" It is `{imported}`. If `{file.resolve()}` is meant, name it as `{file}:...`."


def _import_module(place: str, label: str, example: str) -> ModuleType:
    if os.getcwd() not in sys.path:  # a script's own folder stands there instead
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(error.name + ".")):
            raise ValueError(
                f"{label}: there is no module `{error.name}` on the import path. "
                f"A file is named by `{example}`."
            ) from error
        raise ValueError(f"{label}: importing `{place}` failed: {error}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{label}: importing `{place}` failed: {cause_of(error)}") from error


def _import_file(place: str, label: str) -> ModuleType:
    file = Path(place).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"{label}: there is no file `{file}`.")
    # One module per file: asked for twice, a file runs once.
    name = f"{FILE_MODULE}{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{label}: `{file}` cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"{label}: importing `{file}` failed: {cause_of(error)}") from error
    return module
