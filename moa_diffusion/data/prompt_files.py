"""Prompt files as their writer meant them, or refused with file and line; never a guess."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from moa_diffusion.data.prompt_tables import KIND, meant, table_rows
from moa_diffusion.files.text import (
    bad_line,
    check_encodable,
    json_lines,
    read_text,
    shortened,
    stripped,
)
from moa_diffusion.types import ConfigError

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# First lines of a .txt that name a column; `prompts.column` is another.
_HEADERS = {"prompt", "prompts", "caption", "captions", "text", "texts"}
# A line that is JSON, or the first of several that together are.
_JSON = re.compile(r"""(?:\[\s*)*[\[{](?:\s*["'{].*["'}\],])?""")
_QUOTED = re.compile(r"""("(?:[^"]|"")*"|'[^']*'|`[^`]*`|\u201c[^\u201d]*\u201d),?""")
_NOT_TXT = "A .txt should have one prompt on every line."
# Marks of a comment; "#hashtag" is none, nor is "--" with a word directly behind it.
_COMMENT = re.compile(r"(?:#+|//+|;+|--+)(?:\s|$)|#!")
_ITEM = re.compile(r"\(?(\d+)\s?[.):-]\s+\S|[-*\u2022]\s+\S")  # an item of a list, with its number
# A weight ends a line; behind a comma or a colon only with a decimal point, for years and times.
_WEIGHT = re.compile(r"\S\s*(?:\|\s*[-+]?\d*\.?\d+|[,;:]\s*[-+]?\d*\.\d+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One line of a prompt set."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)  # handed to the reward heads


def read_prompts(path: str | Path, *, column: str = "prompt") -> tuple[Prompt, ...]:
    """Read a prompt set; everything beside the prompt becomes its metadata.

    Args:
        path: ``.txt`` (one prompt a line, blank lines ignored), ``.jsonl`` (objects), ``.csv`` or
            ``.tsv`` (with a header line); UTF-8.
        column: The key or column that holds the prompt.

    Raises:
        ConfigError: If the file is missing, of another kind, empty, or has a line that is wrong or
            can be read in two ways; the message gives file and line number.
    """
    path = Path(path)
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_table, ".tsv": _read_table}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(
            f"Prompt file `{path}` should end in one of {', '.join(readers)}. "
            f"Found {path.suffix!r}."
        )
    if not path.is_file():
        raise ConfigError(f"Prompt file `{path}` does not exist (looked from {Path.cwd()}).")
    prompts = tuple(reader(path, column))
    if not prompts:
        raise ConfigError(f"Prompt file `{path}` should hold at least one prompt. Found none.")
    return prompts


def _read_txt(path: Path, column: str) -> list[Prompt]:
    lines = read_text(path, KIND).split("\n")
    prompts = [(f"{path}:{n}", stripped(line)) for n, line in enumerate(lines, start=1)]
    prompts = [(where, line) for where, line in prompts if line]
    _check_no_table(prompts, column)
    for where, line in prompts:
        if "\r" in line:
            raise bad_line(where, "A prompt should hold no control characters.", shortened(line))
    return [Prompt(text=_prompt(where, line)) for where, line in prompts]


def _check_no_table(prompts: Sequence[tuple[str, str]], column: str) -> None:
    """Refuse a ``.txt`` that something wrote as a table or as JSON."""
    if not prompts:
        return
    where, first = prompts[0]
    header = [cell.strip(' "').casefold() for cell in re.split(r"[,;\t|]", first)]
    words = all(re.fullmatch(r"[\w.-]{0,40}", cell) for cell in header)
    named = column.casefold() in header and all(re.fullmatch(r"[\w .-]{0,40}", h) for h in header)
    if named or (words and header[0] in _HEADERS):
        raise bad_line(
            where,
            _NOT_TXT,
            f"what looks like the header of a table, {shortened(first)}",
            "Name a table .csv or .tsv, or take the line out.",
        )
    _check_no_list(prompts)
    for place, line in prompts:
        if _COMMENT.match(line):
            hint = "Take comments out; a .jsonl holds prompts that are meant so."
            raise bad_line(place, _NOT_TXT, f"what looks like a comment, {shortened(line)}", hint)
        if _JSON.fullmatch(line):
            kind, hint = ("an object", "Name a file of objects .jsonl.")
            if line.startswith("["):
                kind, hint = ("an array", "A .jsonl has an object on every line.")
            raise bad_line(
                place, _NOT_TXT, f"what looks like {kind} of JSON, {shortened(line)}", hint
            )
        if _QUOTED.fullmatch(line):
            raise bad_line(
                place,
                "A .txt should have one prompt on every line, without quotation marks around it.",
                shortened(line),
                "Take them out, or make the file a .csv with the header `prompt`; a .jsonl holds "
                "prompts that are meant with the marks.",
            )
        if "\t" in line:
            hint = "Name a table .tsv, with a header; a .jsonl holds prompts with tabs."
            raise bad_line(place, _NOT_TXT, f"a tab, as tables have, {shortened(line)}", hint)
        if '\\"' in line:
            hint = "Take the backslashes out; a .jsonl holds prompts that are meant with them."
            raise bad_line(place, _NOT_TXT, f"a mark after a backslash, {shortened(line)}", hint)


def _check_no_list(prompts: Sequence[tuple[str, str]]) -> None:
    """Refuse lines that all have a number, a bullet or a weight beside the prompt."""
    where, first = prompts[0]
    items = [match for _, line in prompts if (match := _ITEM.match(line))]
    if len(prompts) > 1 and len(items) == len(prompts):
        numbers = [match[1] for match in items]
        bullets = not any(numbers)
        if bullets or (all(numbers) and _rises([int(number) for number in numbers])):
            what = "bullets before all lines" if bullets else "numbers that count the lines"
            hint = "Take them out; a .jsonl holds prompts that are meant so."
            raise bad_line(where, _NOT_TXT, f"{what}, {shortened(first)}", hint)
    if all(_WEIGHT.search(line) for _, line in prompts):
        hint = (
            "A weight of a single prompt is not read. Take them out, or make the file a .csv or "
            ".jsonl, where what stands beside the prompt is metadata; `prompts.train` weighs files."
        )
        finding = f"a number at the end of every line, as a weight, {shortened(first)}"
        raise bad_line(where, _NOT_TXT, finding, hint)


def _rises(numbers: Sequence[int]) -> bool:
    return all(before < after for before, after in pairwise(numbers))


def _read_jsonl(path: Path, column: str) -> list[Prompt]:
    return [_row_to_prompt(where, row, column) for where, row in json_lines(path, KIND)]


def _read_table(path: Path, column: str) -> list[Prompt]:
    return [_row_to_prompt(where, row, column) for where, row in table_rows(path, column)]


def _prompt(where: str, text: str) -> str:
    """Return the prompt, checked: something to see, and characters that a text encoder has."""
    if control := _CONTROL.search(text):
        expectation = f"A prompt should hold no control characters such as {control[0]!r}."
        raise bad_line(where, expectation, shortened(text))
    return text


def _row_to_prompt(where: str, row: dict[str, Any], column: str) -> Prompt:
    value = row.get(column)
    if not isinstance(value, str) or not stripped(value):
        expectation = f"A line should have a non-empty text `{column}`."
        raise bad_line(where, expectation, shortened(row), meant(column, list(row)))
    check_encodable(where, row)
    metadata = {key: row[key] for key in row if key != column}
    return Prompt(text=_prompt(where, stripped(value)), metadata=metadata)
