"""Text files as their writer meant them, or an error with file and line: encodings and JSON lines.

What every reader of prompts and preferences shares.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moa_diffusion.types import ConfigError

SHOWN = 80  # characters of a line in a message
_MARKS = {  # bytes that a file of another encoding begins with; those of UTF-32 begin as UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# White space that Python's `strip` leaves: zero-width space, word joiner, byte order mark.
_BLANK = "\u200b\u2060\ufeff"


def bad_line(where: str, expectation: str, finding: str, hint: str = "") -> ConfigError:
    """Return an error about a line of a file.

    Args:
        where: File and line, ``prompts.txt:3``.
        expectation: What the line should be, a whole sentence.
        finding: As it is to be shown.
        hint: A further sentence.
    """
    return ConfigError(f"{where}: {expectation} Found {finding}.{f' {hint}' if hint else ''}")


def shortened(value: object, limit: int = SHOWN) -> str:
    """Return a value as Python writes it, or its start; what cannot be printed is escaped."""
    if isinstance(value, str):
        return repr(value if len(value) <= limit else f"{value[: limit - 3]}...")
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def stripped(text: str) -> str:
    """Return the text without white space around it, visible or not."""
    before = None
    while before != text:
        before, text = text, text.strip().strip(_BLANK)
    return text


def read_text(path: Path, kind: str) -> str:
    """Return the whole text of a UTF-8 file, without its byte order mark.

    Args:
        path: The file, which exists.
        kind: What it is, for messages: "A prompt file".

    Raises:
        ConfigError: If it is of another encoding, holds NUL characters, or has lines that end as
            on old Macintoshes.
    """
    data = path.read_bytes()
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            raise bad_line(str(path), f"{kind} should be UTF-8 text.", name, "Save it as UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise bad_line(
            f"{path}:{number}",
            f"{kind} should be UTF-8 text.",
            f"the byte 0x{data[error.start]:02x} ({error.reason})",
            "Another encoding, such as Windows-1252, has to be converted.",
        ) from error
    for character, what in (
        ("\x00", "a NUL character, as UTF-16 without a byte order mark would have"),
        ("\ufeff", "a byte order mark inside of the text, as files that were joined have"),
    ):
        if character in text:
            number = text.count("\n", 0, text.index(character)) + 1
            raise bad_line(f"{path}:{number}", f"{kind} should be UTF-8 text.", what)
    if "\r" in text and "\n" not in text:
        raise bad_line(
            f"{path}:1",
            "Lines should end with a line feed.",
            "carriage returns alone, as of old Macintoshes",
        )
    return text


def json_lines(path: Path, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line of a JSONL: file and line number, and the object; blank lines are left out.

    Args:
        path: The file, which exists.
        kind: What it is, for messages.

    Raises:
        ConfigError: For a line that is no JSON object, gives a key twice, has a number that JSON
            does not know, or text that cannot be encoded.
    """
    for number, line in enumerate(read_text(path, kind).split("\n"), start=1):
        if not stripped(line):
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(
                line, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_distinct
            )
        except (ValueError, RecursionError) as error:
            raise bad_line(
                where, f"A line should be JSON ({error}).", shortened(line), _one_a_line(line)
            ) from error
        if not isinstance(row, dict):
            raise bad_line(
                where, "A line should be a JSON object.", shortened(line), _one_a_line(line)
            )
        check_encodable(where, row)
        yield where, row


def _finite(text: str) -> float:  # Python reads NaN and 1e999, which no reward server would
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no JSON number")
    return number


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # Python keeps the last
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise ValueError(f"the key {key!r} stands there twice")
        entries[key] = value
    return entries


def _one_a_line(line: str) -> str:
    if line.strip()[:1] == "[" or line.strip() in ("{", "["):
        return "A .jsonl has one object on every line, not a JSON array or an object over several."
    return ""


def check_encodable(where: str, value: Any) -> None:
    """Check every text in a JSON or YAML value, its keys included.

    A lone surrogate (half of a character in UTF-16, such as ``"\\ud83d"``) passes every reader of
    JSON and YAML, and then no tokenizer, file or server takes it.

    Args:
        where: File and line, or what else the value stands in; keys are added to it.
        value: Nested mappings, lists, texts.

    Raises:
        ConfigError: For the first text that cannot be encoded.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise bad_line(
                where,
                "Text should be Unicode characters that UTF-8 can encode.",
                f"half of a surrogate pair, {value[error.start]!a}, in {shortened(ascii(value))}",
            ) from None
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            check_encodable(where, key)
            check_encodable(f"{where}: {key}", inner)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for inner in value:
            check_encodable(where, inner)
