"""Names of reward heads: open to every user through ``@register``, strict about everything else.

Heads that come with the package are listed by name and module and imported when first asked for,
so that ``import rewards`` stays light. Their modules import heavy libraries in constructors only.
Other installed packages declare heads of theirs as entry points of the group
``moa_diffusion.rewards``: ``their_head = "their_module:TheirHead"``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, TypeGuard, TypeVar, get_args

from rewards.base import RewardHead, Scored
from rewards.functions import CONCURRENCY, FunctionHead, is_async
from rewards.option_types import check_complete, check_names, check_types, options_of
from rewards.parameters import function_name, parameters_of
from rewards.suggestions import did_you_mean
from rewards.targets import (
    Target,
    declared,
    distribution,
    import_target,
    load_entry_point,
)

TargetT = TypeVar("TargetT", bound=Callable[..., Any])

_BUILT_IN = {
    "aesthetic": "rewards.heads.aesthetic",
    "classifier": "rewards.heads.classifier",
    "clip_iqa": "rewards.heads.clip_iqa",
    "clipscore": "rewards.heads.clip",
    "colourfulness": "rewards.heads.simple",
    "deqa": "rewards.heads.deqa.head",
    "format": "rewards.heads.prose",
    "hpsv2": "rewards.heads.hpsv2",
    "imagereward": "rewards.heads.imagereward",
    "jpeg_compressibility": "rewards.heads.simple",
    "keyword": "rewards.heads.prose",
    "length": "rewards.heads.prose",
    "ocr": "rewards.heads.ocr.head",
    "pickscore": "rewards.heads.clip",
    "prompt_colour": "rewards.heads.simple",
    "qrealign": "rewards.heads.qrealign",
    "remote": "rewards.serving.remote",
    "repetition": "rewards.heads.prose",
    "sharpness": "rewards.heads.simple",
    "vqascore": "rewards.heads.vqascore",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadInfo:
    """What ``available`` tells about one registered head."""

    name: str
    unit: str  # unit of the scores
    requires: tuple[str, ...]  # what a prompt must have for the head to apply
    doc: str  # first line of the docstring
    scores: Scored = "both"  # what it scores
    problem: str = ""  # why `create` would refuse it; empty if nothing is known against it


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    target: Target
    unit: str
    requires: tuple[str, ...]
    scores: Scored
    per_image: bool | None = None  # a function's; None: it was not registered, so options say

    def __post_init__(self) -> None:
        if self.scores not in get_args(Scored):
            raise ValueError(
                f"The class attribute `scores` of a head should be one of "
                f"{', '.join(get_args(Scored))}. Found `scores = {self.scores!r}` of "
                f"{_place(self.target)}."
            )


_entries: dict[str, _Entry] = {}


def register(
    name: str,
    *,
    unit: str | None = None,
    requires: Sequence[str] | None = None,
    per_image: bool = False,
) -> Callable[[TargetT], TargetT]:
    """Register a ``RewardHead`` subclass or a plain function under a name.

    Args:
        name: The name that ``create`` and configs use.
        unit: Unit of the scores; by default the class attribute, and empty for a function.
        requires: What a prompt must have for the head to apply; by default likewise.
        per_image: Whether a function scores one image, ``f(image, prompt, ...) -> float``, or one
            text, ``f(text, prompt, ...) -> float``, and not a batch, ``f(images, prompts, ...)`` or
            ``f(texts, prompts, ...) -> list[float]``. ``FunctionHead`` tells all about them.

    Returns:
        A decorator that returns its argument as it was (a class takes over ``name``, and ``unit``
        and ``requires`` where given here).

    Raises:
        ValueError: If the name is taken by something else, the function has a wrong signature, or
            a class is registered with ``per_image``. Registering the same class or function again,
            as a module reload does, replaces it.
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
            if per_image:
                raise ValueError(
                    f"`per_image` is for functions; a RewardHead scores batches. Found the class "
                    f"`{target.__qualname__}`."
                )
            target.name = name
            if unit is not None:
                target.unit = unit
            if requires is not None:
                target.requires = tuple(requires)
            entry = _describe_class(target)
        else:
            entry = _Entry(
                target=target,
                unit=unit or "",
                requires=tuple(requires or ()),
                scores=parameters_of(target).scores,  # a wrong signature is told here
                per_image=per_image,
            )
        _entries[name] = entry
        return target

    return decorate


def create(name: str, path: str | None = None, **options: Any) -> RewardHead:
    """Build a head from its registered name or from an import path.

    Args:
        name: The name of a head that is built in, registered, or declared by an installed
            package; with ``path``, merely the name that the head gets. A name that contains ":" is
            taken as an import path.
        path: ``my_module:my_reward`` or ``path/to/file.py:my_reward``, naming a function or a
            ``RewardHead`` subclass.
        options: Constructor arguments of the head; for a function, values for its further
            parameters, ``concurrency`` if it is async and scores one sample at a time, and
            ``per_image`` if nothing registered it.

    Returns:
        The head, with ``head.name`` set to ``name``.

    Raises:
        ValueError: If the name, the path or an option is wrong; the message lists what is valid.
        ImportError: If the head needs a package that is not installed.
    """
    name, entry = _named(name, path)
    if _is_head_class(entry.target):
        named = {key: option.default for key, option in options_of(entry.target).items()}
        check_names(name, named, options)
        check_complete(name, named, options)
        check_types(name, entry.target, options)
        head = entry.target(**options)
        head.name = name
        return head
    return _create_function(name, entry, options)


def target_of(name: str, path: str | None = None) -> tuple[Target, dict[str, inspect.Parameter]]:
    """Return the class or function behind a head, and its options with types and defaults.

    Of a function these are its further parameters: those without a default are keys of the
    prompts' metadata as a rule.

    Args:
        name: As for ``create``.
        path: As for ``create``.

    Raises:
        ValueError: If the name or the path is wrong.
        ImportError: As ``create``.
    """
    _, entry = _named(name, path)
    if _is_head_class(entry.target):
        return entry.target, options_of(entry.target)
    further = parameters_of(entry.target).further
    options = {key: one for key, one in options_of(entry.target).items() if key in further}
    if entry.per_image is None:
        own = inspect.signature(FunctionHead).parameters["per_image"]
        options["per_image"] = own.replace(annotation=bool)
    return entry.target, options


def defaults_of(name: str, path: str | None = None) -> dict[str, Any]:
    """Return the options of a head that have a default, with it, as a YAML file holds them.

    Parameters of a function are left out: metadata of the prompts may fill them. So is a default
    that no YAML file can hold.

    Args:
        name: As for ``create``.
        path: As for ``create``.

    Raises:
        ValueError: If the name or the path is wrong.
        ImportError: As ``create``.
    """
    target, options = target_of(name, path)
    own = options if _is_head_class(target) else options.keys() & {"per_image"}
    defaults = {key: options[key].default for key in own}
    return {key: _plain(value) for key, value in defaults.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(one) for one in (*value.keys(), *value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _named(name: str, path: str | None) -> tuple[str, _Entry]:
    """Return the name that a head gets, and what stands behind it."""
    if path is None and ":" in name:
        name, path = name.rsplit(":", 1)[1], name
    return name, _lookup(name) if path is None else _describe(import_target(path))


def _create_function(name: str, entry: _Entry, options: dict[str, Any]) -> FunctionHead:
    named = parameters_of(entry.target).further
    own: dict[str, Any] = {}
    if entry.per_image is None:
        own["per_image"], per_image = False, options.get("per_image", False)
    else:
        per_image = entry.per_image
    if per_image and is_async(entry.target):
        own["concurrency"] = CONCURRENCY
    check_names(name, {**named, **own}, options)
    check_types(name, entry.target, {key: options[key] for key in options if key in named})
    return FunctionHead(
        entry.target,
        name=name,
        unit=entry.unit,
        requires=entry.requires,
        options={key: value for key, value in options.items() if key in named},
        per_image=per_image,
        concurrency=options.get("concurrency", CONCURRENCY),
    )


def built_in() -> dict[str, Target]:
    """Import the functions and classes that come with the package; return them by name."""
    for module in sorted(set(_BUILT_IN.values())):
        importlib.import_module(module)
    return {name: _entries[name].target for name in _BUILT_IN}


def available() -> dict[str, HeadInfo]:
    """List every head: name -> unit, requirements and one line of documentation.

    Imports all of them. What another package declares and cannot be used is listed with its
    ``problem``, and does not hide the others.
    """
    built_in()
    entries: dict[str, _Entry] = {}
    problems: dict[str, str] = {}
    for name, points in declared().items():
        try:
            entries[name] = _declared_entry(name, points)
        except ValueError as error:
            problems[name] = str(error)
    entries |= _entries  # only now: what was declared may have registered more
    infos = {name: _info(name, entry) for name, entry in entries.items()}
    for name, problem in problems.items():
        known = infos.get(name) or HeadInfo(name=name, unit="", requires=(), doc="")
        infos[name] = dataclasses.replace(known, problem=problem)
    return dict(sorted(infos.items()))


def _info(name: str, entry: _Entry) -> HeadInfo:
    doc = (inspect.getdoc(entry.target) or "").strip().split("\n")[0]
    return HeadInfo(
        name=name, unit=entry.unit, requires=entry.requires, doc=doc, scores=entry.scores
    )


def _lookup(name: str) -> _Entry:
    points = declared()
    if name in points:
        return _declared_entry(name, points[name])
    if name in _BUILT_IN:
        importlib.import_module(_BUILT_IN[name])
    if name not in _entries:
        known = sorted({*_BUILT_IN, *_entries, *points})
        raise ValueError(
            f'Unknown reward head "{name}".{did_you_mean(name, known)} Known heads: '
            f"{', '.join(known)}. A head of your own is named by `path: my_module:my_reward`."
        )
    return _entries[name]


def _declared_entry(name: str, points: Sequence[EntryPoint]) -> _Entry:
    """Return what an installed package declares under a name that nothing else has.

    Raises:
        ValueError: If something else has the name, or loading fails; the message names the package.
    """
    owners = [distribution(point) for point in points]
    paths = [point.value for point in points]
    if name in _BUILT_IN:
        owners.insert(0, f"the built-in module {_BUILT_IN[name]}")
        paths.insert(0, _built_in_path(name))
    if len(owners) > 1:
        chosen = " or ".join(f"`path: {path}`" for path in paths)
        raise ValueError(
            f'The reward head "{name}" is declared twice: by {" and by ".join(owners)}. Uninstall '
            f"one, or name the head that you want by {chosen}."
        )
    target = load_entry_point(points[0])
    if name in _entries and _identity(_entries[name].target) != _identity(target):
        raise ValueError(
            f'The reward head "{name}" is registered twice: by {_place(_entries[name].target)} and '
            f"by {owners[0]}."
        )
    return _describe(target)


def _built_in_path(name: str) -> str:
    importlib.import_module(_BUILT_IN[name])
    return f"{_BUILT_IN[name]}:{function_name(_entries[name].target)}"


def _describe(target: Target) -> _Entry:
    """Return what is known of a function or class, by its registration if it has one."""
    for entry in _entries.values():
        if entry.target is target:
            return entry
    if _is_head_class(target):
        return _describe_class(target)
    return _Entry(target=target, unit="", requires=(), scores=parameters_of(target).scores)


def _describe_class(target: type[RewardHead]) -> _Entry:
    return _Entry(target=target, unit=target.unit, requires=target.requires, scores=target.scores)


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
