"""docs/troubleshooting.md is true: every message that it quotes is one of the project's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
CODE = re.compile(r"(?<!`)(`+)(?!`) ?(.+?) ?(?<!`)\1(?!`)")  # as Markdown has it
FORMAT = re.compile(r"%(?:\.\d+)?[a-z]")  # what a logged message puts a value in for
GAP = "\0"


def symptoms() -> list[str]:
    """The first column of all rows."""
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    cells = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    return [cell for cell in cells if cell != "symptom"]


def messages() -> list[str]:
    """What they quote; a name alone (of an option, a metric, a variable) is no message."""
    quoted = [found[1] for cell in symptoms() for found in CODE.findall(cell)]
    return [text for text in quoted if " " in text]


def spoken(tree: ast.AST) -> Iterator[str]:
    """The strings of a module, with a gap for whatever is put in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else GAP for p in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield FORMAT.sub(GAP, node.value)


@cache
def strings() -> list[str]:
    """Those of the whole project."""
    return [
        text
        for folder in ("moa_diffusion", "rewards", "scripts")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for text in spoken(ast.parse(path.read_text(encoding="utf-8")))
    ]


def is_said(message: str) -> bool:
    """Whether one string has all parts of a message, between its `...`, in this order."""
    parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
    return any(re.search(".*".join(parts), text, re.DOTALL) for text in strings())


@pytest.mark.parametrize("message", messages())
def test_a_quoted_message_is_one_of_the_projects(message: str) -> None:
    assert is_said(message)


def test_the_rule_finds_what_is_not_said() -> None:
    assert len(messages()) >= 40
    assert is_said("should be the same on all processes ... Found ... on process 0")
    assert not is_said("should be the same on all processes ... Found 0 on process 0")
    assert not is_said("Found ... on process 0 ... should be the same on all processes")
    assert CODE.findall("a `b` and ``c `d` e``") == [("`", "b"), ("``", "c `d` e")]
