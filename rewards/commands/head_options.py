"""The options of a head: type, default, and what the docstring says of them, ranges included."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rewards.option_types import words_of
from rewards.pretrained.base import ModelHead, ModelOptions
from rewards.registry import target_of

_OF_FUNCTIONS = {"per_image": "Whether it scores one sample and not a batch."}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOption:
    """One option of a head."""

    name: str
    kind: str  # its type in words
    default: str  # as JSON; a dash where there is none
    meaning: str  # with its range; empty where nothing is said


def about(name: str) -> tuple[str, list[HeadOption]]:
    """Return what a head is, in a sentence, and its options.

    Args:
        name: A registered name or an import path: see ``rewards.create``.

    Raises:
        ValueError: If there is no such head.
        ImportError: If it needs a package that is not installed.
    """
    target, options = target_of(name)
    said = dict(_OF_FUNCTIONS)
    if isinstance(target, type) and issubclass(target, ModelHead):
        said |= meanings(ModelOptions)
    said |= meanings(target)
    doc = (inspect.getdoc(target) or "").replace("``", "`")
    return " ".join(doc.partition("\n\n")[0].split()), [
        HeadOption(
            name=key,
            kind=words_of(Any if one.annotation is one.empty else one.annotation),
            default="-" if one.default is one.empty else json.dumps(one.default, default=repr),
            meaning=said.get(key, ""),
        )
        for key, one in options.items()
    ]


def meanings(target: Callable[..., Any]) -> dict[str, str]:
    """Return what the section ``Args`` of a Google docstring says of each parameter."""
    _, _, after = (inspect.getdoc(target) or "").partition("Args:\n")
    said: dict[str, list[str]] = {}
    for line in after.splitlines():
        if line and not line.startswith(" "):
            break  # the next section
        begins = re.match(r" {4}\*{0,2}(\w+)(?: \([^)]*\))?: (.*)", line)
        if begins:
            said[begins[1]] = [begins[2]]
        elif said:
            said[list(said)[-1]].append(line)
    return {
        name: " ".join(" ".join(lines).split()).replace("``", "`") for name, lines in said.items()
    }
