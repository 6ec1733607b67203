"""What jsonargparse says of a value, in plain words: key, expectation, finding, suggestion."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from rewards.suggestions import did_you_mean

_KEY = re.compile(r'Parser key "([^"]+)"')
_VALUE = re.compile(r"Got value: (.*)$", re.DOTALL)
_UNION_VALUE = re.compile(r"Given value: (.*)$", re.DOTALL)  # of several types, none of which fits
_SECTION = re.compile(r"Unable to load config '(.*?)'", re.DOTALL)
_EMPTY = re.compile(r"argument --([\w.]+): expected one argument")
_STRAY = re.compile(r"unrecognized arguments: (.*)$", re.IGNORECASE | re.DOTALL)
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def plain(text: str, hint_of: Callable[[str], Any]) -> str:
    """Return a message of jsonargparse in this project's words.

    A message that is not known is returned as it is.

    Args:
        text: The message.
        hint_of: Type of a dotted key; None if there is no such key.
    """
    if empty := _EMPTY.search(text):
        return f"{empty[1]}: should have a value, as in `--{empty[1]} VALUE`. Found none."
    if stray := _STRAY.search(text):
        return f"Options should begin with `--`. Found {stray[1]!r}."
    key = _KEY.search(text)
    value = _UNION_VALUE.search(text) or _VALUE.search(text) or _SECTION.search(text)
    hint = None if key is None else hint_of(key[1])
    if key is None or value is None or hint is None:
        return " ".join(text.split())
    value_text = " ".join(value[1].split())
    return (
        f"{key[1]}: should be {described(hint)}. Found {_quoted(value_text)}."
        f"{did_you_mean(value_text, choices(hint))}"
    )


def described(hint: Any) -> str:
    """Return what a value of a type looks like."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, inside))}" if len(inside) > 1 else str(inside[0])
    if origin in (Union, UnionType):
        return " or ".join(described(part) for part in inside)
    if origin is list:
        example = "[1, 2]" if inside[0] in (int, float) else "[a, b]"
        return f"a list of {_PLURALS.get(inside[0], 'entries')}, such as {example}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping of keys"
    return _WORDS.get(hint, str(hint))


def choices(hint: Any) -> list[str]:
    """Return the values of a type that has few of them."""
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    return [value for part in get_args(hint) for value in choices(part)]


def _quoted(value: str) -> str:
    """Put words in quotes, so that it is seen where they end; leave numbers and brackets."""
    words = {"None": "null", "True": "true", "False": "false"}
    if value in words:
        return words[value]
    bare = re.fullmatch(r"[\[{].*|[-+.\w]*\d[-+.\w]*", value, re.DOTALL)
    return value if bare else repr(value)
