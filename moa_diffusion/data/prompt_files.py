"""Prompt files as their writer meant them, or refused with file and line; never a guess.

Of tables two dialects are read. A quoted one has a cell in quotation marks where it holds the
delimiter, a quotation mark (then written twice) or a line break, as spreadsheets, pandas and
Python's csv write it (RFC 4180); every ``.csv`` is one. A plain one knows no quoting, and a
quotation mark is a character like others; a ``.tsv`` may be one (IANA's text/tab-separated-values).
Which one a ``.tsv`` is, its cells say: see ``_unquoted``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from moa_diffusion.files.meant import did_you_mean
from moa_diffusion.files.text import (
    SHOWN,
    bad_line,
    check_encodable,
    json_lines,
    read_text,
    shortened,
    stripped,
)
from moa_diffusion.types import ConfigError

KIND = "A prompt file"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_NUMBER = re.compile(r"[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?")
# First lines of a .txt that name a column; `prompts.column` is another.
_HEADERS = {"prompt", "prompts", "caption", "captions", "text", "texts"}
_JSON = re.compile(r"""(?:\[\s*)*[\[{](?:\s*["'{].*["'}\],])?""")  # of all lines, or their first
_QUOTED = re.compile(r"""("(?:[^"]|"")*"|'[^']*'|`[^`]*`|\u201c[^\u201d]*\u201d),?""")
_NOT_TXT = "A .txt should have one prompt on every line."
# Marks of a comment; "#hashtag" is none, nor is "--" with a word directly behind it.
_COMMENT = re.compile(r"(?:#+|//+|;+|--+)(?:\s|$)|#!")
_ITEM = re.compile(r"\(?(\d+)\s?[.):-]\s+\S|[-*\u2022]\s+\S")  # of a list, with its number
# A weight ends a line; behind a comma or a colon only with a decimal point, for years and times.
_WEIGHT = re.compile(r"\S\s*(?:\|\s*[-+]?\d*\.?\d+|[,;:]\s*[-+]?\d*\.\d+)$")
# Pairs that some writer may have put around every cell, beside the quotation marks of tables.
_OTHER_MARKS = ("''", "``", "\u2018\u2019", "\u201c\u201d", "\u201e\u201c", "\u00ab\u00bb")


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
        found = f"a number at the end of every line, as a weight, {shortened(first)}"
        raise bad_line(where, _NOT_TXT, found, hint)


def _rises(numbers: Sequence[int]) -> bool:
    return all(before < after for before, after in pairwise(numbers))


def _read_jsonl(path: Path, column: str) -> list[Prompt]:
    return [_row_to_prompt(where, row, column) for where, row in json_lines(path, KIND)]


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
        raise bad_line(where, expectation, shortened(row), _meant(column, list(row)))
    check_encodable(where, row)
    metadata = {key: row[key] for key in row if key != column}
    return Prompt(text=_prompt(where, stripped(value)), metadata=metadata)


def _meant(column: str, names: Sequence[str]) -> str:
    """Return which column was meant, and how it is named in a configuration."""
    if column in names:
        return ""
    question = did_you_mean(column, names)
    return f"{question} `prompts.column` names another one than `{column}`.".strip()


# ---------------------------------------------------------------------- tables


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    raw: str
    quoted: bool  # by the rules of the quoted dialect

    @property
    def value(self) -> str:
        return self.raw[1:-1].replace('""', '"') if self.quoted else self.raw


_Row = tuple[int, list[_Cell]]  # number of its first line, and its cells


def _read_table(path: Path, column: str) -> list[Prompt]:
    delimiter = _DELIMITERS[path.suffix.lower()]
    text = read_text(path, KIND)
    _check_delimiter(path, text, delimiter, column)
    rows = list(_rows(path, text, delimiter, strict=delimiter == ","))
    if delimiter == "\t" and _unquoted(path, rows):
        rows = [(n, [_Cell(raw=cell.raw, quoted=False) for cell in cells]) for n, cells in rows]
    if not rows:
        return []
    _check_no_escapes(path, rows)
    _check_marks(path, rows)
    header = _header(path, rows[0], delimiter)
    if column not in header and len(rows) > 1:
        _refuse_header(f"{path}:{rows[0][0]}", header, delimiter, column)
    prompts = []
    for number, cells in rows[1:]:
        where = f"{path}:{number}"
        values = [cell.value for cell in cells]
        if len(values) != len(header):
            hint = f"A cell with {_NAMES[delimiter]} stands in quotation marks."
            if any(cell.raw.endswith("\\") for cell in cells):
                hint += " Backslashes are characters like others."
            raise bad_line(
                where,
                f"A line should have {len(header)} cells, as the header has.",
                f"{len(values)}: {shortened(values)}",
                hint if len(values) > len(header) else "",
            )
        prompts.append(_row_to_prompt(where, dict(zip(header, values, strict=True)), column))
    return prompts


def _check_delimiter(path: Path, text: str, delimiter: str, column: str) -> None:
    """Refuse a header that has another delimiter, before cells are read by the wrong one."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not stripped(line):
            continue
        others = [sign for sign in _NAMES if sign != delimiter and sign in line]
        split = any(column in _names(line, sign) for sign in others)
        other = split or (others and delimiter not in line and not line.lower().startswith("sep="))
        if other and column not in _names(line, delimiter):
            _refuse_header(f"{path}:{number}", [stripped(line)], delimiter, column)
        return


def _names(line: str, delimiter: str) -> list[str]:
    """Return the names in a header, whichever quotation marks are around them."""
    return [stripped(name).strip("\"'") for name in line.split(delimiter)]


def _check_marks(path: Path, rows: Sequence[_Row]) -> None:
    """Refuse a column whose cells are all in marks that no table is read with, such as ``'``."""
    if any(cell.quoted for _, cells in rows for cell in cells):  # then others belong to the text
        return
    for place in range(max(len(cells) for _, cells in rows)):
        found = [
            (number, cells[place].raw)
            for number, cells in rows[1:]
            if place < len(cells) and cells[place].raw
        ]
        for opening, closing in _OTHER_MARKS:
            if found and all(
                len(cell) > 1 and cell.startswith(opening) and cell.endswith(closing)
                for _, cell in found
            ):
                number, cell = found[0]
                raise bad_line(
                    f"{path}:{number}",
                    'Cells should stand in the quotation mark " where they need one.',
                    f"all of a column between {opening} and {closing}, {shortened(cell)}",
                    "Write the file with pandas' or Python's own `quotechar`; a .jsonl holds "
                    "prompts that are meant with the marks.",
                )


def _rows(path: Path, text: str, delimiter: str, *, strict: bool) -> Iterator[_Row]:
    """Yield the rows of cells as the quoted dialect has them; empty lines are left out.

    Args:
        path: The file's name, for messages.
        text: The text of the table.
        delimiter: The character between cells.
        strict: Whether a quotation mark that begins a cell has to end it as well.
    """
    cell = re.compile(
        rf'(?P<quoted>"[^"]*(?:""[^"]*)*")(?={delimiter}|\r?\n|\r?\Z)|[^{delimiter}\n]*'
    )
    place, number, cells = 0, 1, list[_Cell]()
    first = number
    while place <= len(text):
        match = cell.match(text, place)
        assert match is not None  # the second form matches everywhere
        last = text[match.end() : match.end() + 1] in ("", "\n")  # then a \r belongs to the line
        raw = match[0].removesuffix("\r") if last else match[0]
        one = _Cell(raw=raw, quoted=match["quoted"] is not None)
        if strict and not one.quoted and one.raw.lstrip(" ").startswith('"'):
            raise bad_line(
                f"{path}:{number}",
                "A cell in quotation marks should begin and end with one, right beside the "
                "commas, and have those within it written twice.",
                shortened(one.raw),
            )
        cells.append(one)
        number += raw.count("\n")
        place = match.end()
        if text.startswith(delimiter, place):
            place += len(delimiter)
            continue
        if cells != [_Cell(raw="", quoted=False)]:
            yield first, cells
        place = text.find("\n", place) + 1 or len(text) + 1
        number, cells = number + 1, []
        first = number


def _check_no_escapes(path: Path, rows: Sequence[_Row]) -> None:
    """Refuse what a writer left that has backslashes before marks and breaks, and no quoting.

    Before a delimiter a backslash makes one cell too many, which the number of cells tells.
    """
    for number, cells in rows:
        for cell in cells:
            # A file of one column has a row more for each break.
            breaks = len(cells) == 1 and cell.raw.endswith("\\")
            if breaks or (not cell.quoted and '\\"' in cell.raw):
                what = "a break" if breaks else "a quotation mark"
                raise bad_line(
                    f"{path}:{number}",
                    "A table should have no escapes by backslashes.",
                    f"a backslash before {what}, {shortened(cell.raw)}",
                    "Write the file with pandas' or Python's own settings (neither `QUOTE_NONE` "
                    "nor `doublequote=False`), or as .jsonl.",
                )


def _unquoted(path: Path, rows: Sequence[_Row]) -> bool:
    """Return whether a ``.tsv`` is of the plain dialect; either will do where no cell tells.

    A writer that quotes leaves no quotation mark in a cell that is not quoted, so one such cell
    says that the file is plain. A cell in quotation marks that holds a tab, a line break or a
    doubled mark says that it is quoted; so does every text being in them, the header too. Of a
    cell in quotation marks that needs none, alone, nobody can tell whose they are.
    """
    every = [(f"{path}:{number}", cell) for number, cells in rows for cell in cells]
    bare = [(where, cell.raw) for where, cell in every if not cell.quoted and '"' in cell.raw]
    quoted = [(where, cell.raw) for where, cell in every if cell.quoted]
    needed = [(where, raw) for where, raw in quoted if re.search(r'""|[\t\n]', raw[1:-1])]
    for where, raw in bare:
        if raw.startswith('"') and ('\\"' in raw or raw.count('"') == 1):
            what = "marks after backslashes" if '\\"' in raw else "a mark that is never closed"
            raise bad_line(
                where,
                "Quotation marks within a cell in quotation marks should be written twice.",
                f"{what}, {shortened(raw)}",
                "Write the file with pandas or a spreadsheet, or as .jsonl.",
            )
    if bare and needed:
        raise bad_line(
            needed[0][0],
            "The cells of a .tsv should all be quoted alike.",
            f"a cell with doubled quotation marks or breaks in it, {shortened(needed[0][1])}, "
            f"and one with bare quotation marks, {shortened(bare[0][1])} ({bare[0][0]})",
        )
    if bare or not quoted or needed:
        return not needed
    others = [cell.raw for _, cell in every if not cell.quoted and cell.raw]
    if all(_NUMBER.fullmatch(raw) for raw in others):
        return False
    raise bad_line(
        quoted[0][0],
        "It should be clear whether quotation marks around a cell belong to it.",
        f"{shortened(quoted[0][1])} in a .tsv whose other cells do not tell",
        "A .jsonl or a .csv says it: in a .csv they do not.",
    )


def _header(path: Path, row: _Row, delimiter: str) -> list[str]:
    """Return the names of the columns."""
    where, names = f"{path}:{row[0]}", [stripped(cell.value) for cell in row[1]]
    if re.fullmatch(r"sep=.?", delimiter.join(names), re.IGNORECASE | re.DOTALL):
        raise bad_line(
            where,
            "A table should begin with the names of its columns.",
            f"Excel's line {delimiter.join(names)!r}",
            f"Take it out, and have {_NAMES[delimiter]} between the cells.",
        )
    for number, name in enumerate(names, start=1):
        if not name:
            raise bad_line(
                where,
                "Every column should have a name.",
                f"none above column {number} of {len(names)}: {shortened(names)}",
                "pandas leaves out its index with `to_csv(..., index=False)`."
                if number == 1
                else "",
            )
        if name in names[: number - 1]:
            expectation = "The columns should have different names."
            raise bad_line(where, expectation, f"{name!r} twice: {shortened(names)}")
    return names


def _refuse_header(where: str, header: Sequence[str], delimiter: str, column: str) -> None:
    line = delimiter.join(header)
    others = {sign: name for sign, name in _NAMES.items() if sign != delimiter and sign in line}
    split = [sign for sign in others if column in _names(line, sign)]
    if split or (others and len(header) == 1):
        sign = split[0] if split else next(iter(others))
        hint = (
            f"Its cells seem to have {_NAMES[sign]} between them: a .csv has commas, a .tsv tabs."
        )
    else:
        hint = _meant(column, header)
    finding = f"the columns {', '.join(map(repr, header))}"
    finding = finding if len(finding) <= 2 * SHOWN else f"{finding[: 2 * SHOWN]}..."
    raise bad_line(where, f"The header should have a column `{column}`.", finding, hint)
