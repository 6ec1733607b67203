"""What pydantic finds wrong with a value, in plain words: key, expectation, finding, what is near.

Types and ranges are read from the fields, so that a message, the help and the documentation say
the same of a key.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Len, MinLen
from pydantic import ValidationError

from moa_diffusion.config.schema import Config, PromptFileConfig
from rewards.suggestions import did_you_mean

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}
_OUT_OF_RANGE = (
    *("greater_than", "greater_than_equal", "less_than", "less_than_equal"),
    *("too_short", "too_long"),
)


def plain(error: ValidationError, values: Mapping[str, Any]) -> str:
    """Return all that is wrong, a line each: the dotted key, what it should be, what was found.

    Args:
        error: What pydantic raised for a ``Config``.
        values: What it was given.
    """
    return "\n".join(dict.fromkeys(_line(one, values) for one in error.errors()))


def _line(error: Any, values: Mapping[str, Any]) -> str:
    kind, location = error["type"], error["loc"]
    key, hint, value = _place(location[:-1] if kind == "missing" else location, values)
    if kind == "unexpected_keyword_argument":
        return _unknown(key, hint, location[-1])
    bare = without_ranges(hint)
    record = is_section(bare) and issubclass(bare, PromptFileConfig)
    if kind == "missing" or (record and kind == "dataclass_type"):
        return f"{key}: should be a file or a mapping with `path`. Found {value!r}."
    if kind == "finite_number":
        return f"{key}: should be finite. Found {value}."
    expected = (range_of(hint) if kind in _OUT_OF_RANGE else "") or described(bare)
    meant = did_you_mean(str(value), choices(bare))
    return f"{key}: should be {expected}. Found {shown(value)}.{meant}"


def _place(location: tuple[int | str, ...], values: Any) -> tuple[str, Any, Any]:
    """Return the dotted key of what is wrong, its type, and its value.

    Of a list of numbers or texts it is the whole list; of a list of prompt files the entry.
    """
    key, hint = "", Config
    for part in location:
        bare = without_ranges(hint)
        if is_section(bare):
            if part not in fields(bare):
                break
            hint, key = fields(bare)[str(part)], f"{key}.{part}".lstrip(".")
        elif part in ("file", "files") and record_in(hint) is not None:
            continue  # which of the two forms a value of `prompts` has
        elif isinstance(part, int) and record_in(hint) is not None:
            hint, key = record_in(hint), f"{key}[{part}]"
        else:
            break
        values = values[part]
    return key, hint, values


def _unknown(prefix: str, section: Any, name: Any) -> str:
    section = without_ranges(section)
    key = f"{prefix}.{name}".lstrip(".")
    valid = list(fields(section))
    if not issubclass(section, PromptFileConfig):
        same = [known for known in all_keys() if known.split(".")[-1] == name]
        here = [f"{prefix}.{one}".lstrip(".") for one in valid]
        meant = did_you_mean(same[0] if same else key, [*here, *all_keys()])
    elif name == "weight":
        meant = " Every held-out prompt is drawn; weights are for prompts.train."
    else:
        meant = did_you_mean(str(name), valid)
    return f"{key}: unknown key.{meant} Valid keys here: {', '.join(sorted(valid))}."


def is_section(hint: Any) -> bool:
    """Return whether a type is a dataclass."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


@functools.cache
def fields(section: Any) -> dict[str, Any]:
    """Return the types of a section's keys, their ranges included."""
    return get_type_hints(section, include_extras=True)


@functools.cache
def all_keys(section: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Return the types of all keys by dotted name, sections included."""
    keys = {}
    for name, hint in fields(section).items():
        keys[f"{prefix}{name}"] = hint
        if is_section(hint):
            keys |= all_keys(hint, f"{prefix}{name}.")
    return keys


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the types of which a value may have any."""
    bare = without_ranges(hint)
    return get_args(bare) if get_origin(bare) in (Union, UnionType) else (bare,)


def without_ranges(hint: Any) -> Any:
    """Return the type that an annotation adds a range to."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def record_in(hint: Any) -> Any:
    """Return the dataclass in the type of a list of some; None without one."""
    for part in get_args(hint):
        inside = part if is_section(part) else record_in(part)
        if inside is not None:
            return inside
    return None


def range_of(hint: Any) -> str:
    """Return which values a type allows, to follow "should be"; empty if any of the type."""
    if get_origin(hint) is not Annotated:
        words = [range_of(kind) for kind in alternatives(hint) if kind is not hint]
        return f"{words[0]} or null" if len(words) == 2 and words[0] else ""
    kind, *limits = get_args(hint)
    for limit in limits:
        match limit:
            case MinLen(1) if record_in(hint) is None:
                return "a non-empty list"
            case Len(min_length=2, max_length=2):
                return f"two numbers {range_of(get_args(kind)[0])}"
            case Ge(ge=bound):
                return f"at least {bound}"
            case Gt(gt=0):
                return "positive"
            case Interval():
                low = f"({limit.gt}" if limit.ge is None else f"[{limit.ge}"
                return f"in {low}, " + (f"{limit.lt})" if limit.le is None else f"{limit.le}]")
    return ""


def described(hint: Any) -> str:
    """Return what a value of a type looks like, to follow "should be"."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return described(inside[0])
    if origin is Literal:
        return f"one of {', '.join(map(str, inside))}" if len(inside) > 1 else str(inside[0])
    if record_in(hint) is not None:
        return "a prompt file or a list of some"
    if origin in (Union, UnionType):
        return " or ".join(described(part) for part in inside)
    if origin is list:
        item = without_ranges(inside[0])
        example = "[1, 2]" if item in (int, float) else "[a, b]"
        return f"a list of {_PLURALS[item]}, such as {example}"
    if origin is dict or is_section(hint):
        return "a mapping of keys"
    return _WORDS[hint]


def choices(hint: Any) -> list[str]:
    """Return the values of a type that has few of them."""
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    return [value for part in get_args(hint) for value in choices(part)]


def shown(value: Any) -> str:
    """Return a value as YAML has it; text in quotes, so that one sees where it ends."""
    if isinstance(value, str):
        return repr(value)
    return json.dumps(value, default=repr, ensure_ascii=False)
