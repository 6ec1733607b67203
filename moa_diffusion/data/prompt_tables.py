"""Tables of prompts, ``.csv`` and ``.tsv``, as their writer quoted them, or refused.

Of tables two dialects are read. A quoted one has a cell in quotation marks where it holds the
delimiter, a quotation mark (then written twice) or a line break, as spreadsheets, pandas and
Python's csv write it (RFC 4180); every ``.csv`` is one. A plain one knows no quoting, and a
quotation mark is a character like others; a ``.tsv`` may be one (IANA's text/tab-separated-values).
Which one a ``.tsv`` is, its cells say: see ``_unquoted``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moa_diffusion.files.text import SHOWN, bad_line, read_text, shortened, stripped
from rewards.suggestions import did_you_mean

KIND = "A prompt file"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_NUMBER = re.compile(r"[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?")
# Pairs that some writer may have put around every cell, beside the quotation marks of tables.
_OTHER_MARKS = tuple(zip("'`\u2018\u201c\u201e\u00ab", "'`\u2019\u201d\u201c\u00bb", strict=True))


def meant(column: str, names: Sequence[str]) -> str:
    """Return which column was meant, and how it is named in a configuration."""
    if column in names:
        return ""
    question = did_you_mean(column, names)
    return f"{question} `prompts.column` names another one than `{column}`.".strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    raw: str
    quoted: bool  # by the rules of the quoted dialect

    @property
    def value(self) -> str:
        return self.raw[1:-1].replace('""', '"') if self.quoted else self.raw


_Row = tuple[int, list[_Cell]]  # number of its first line, and its cells


def table_rows(path: Path, column: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield file and line, and the cells by column, of each row below the header.

    Args:
        path: A ``.csv`` or ``.tsv`` file, which exists.
        column: The column that holds the prompt.

    Raises:
        ConfigError: If the table is wrong or can be read in two ways; gives file and line number.
    """
    delimiter = _DELIMITERS[path.suffix.lower()]
    text = read_text(path, KIND)
    _check_delimiter(path, text, delimiter, column)
    rows = list(_rows(path, text, delimiter, strict=delimiter == ","))
    if delimiter == "\t" and _unquoted(path, rows):
        rows = [(n, [_Cell(raw=cell.raw, quoted=False) for cell in cells]) for n, cells in rows]
    if not rows:
        return
    _check_no_escapes(path, rows)
    _check_marks(path, rows)
    header = _header(path, rows[0], delimiter)
    if column not in header and len(rows) > 1:
        _refuse_header(f"{path}:{rows[0][0]}", header, delimiter, column)
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
        yield where, dict(zip(header, values, strict=True))


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
        column = [
            (number, cells[place].raw)
            for number, cells in rows[1:]
            if place < len(cells) and cells[place].raw
        ]
        for opening, closing in _OTHER_MARKS:
            if column and all(
                len(cell) > 1 and cell.startswith(opening) and cell.endswith(closing)
                for _, cell in column
            ):
                number, cell = column[0]
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
        hint = meant(column, header)
    finding = f"the columns {', '.join(map(repr, header))}"
    finding = finding if len(finding) <= 2 * SHOWN else f"{finding[: 2 * SHOWN]}..."
    raise bad_line(where, f"The header should have a column `{column}`.", finding, hint)
