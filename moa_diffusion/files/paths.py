"""What a user writes where a place is meant: home folders, and names before and commas between.

A file or folder that exists always wins over a reading that would split its name.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path


def expanded(text: str | Path) -> Path:
    """Return the place with ``~`` and ``~user`` replaced by the home folder, as a shell does.

    A folder that is itself called ``~`` is ``./~``.

    Raises:
        ValueError: If there is no such user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(
            f"should be a place on this machine. Found `{text}`: there is no such user, or no home "
            "folder (`./` before it means a name that begins with ~)."
        ) from None


def names_a_place(text: str) -> bool:
    """Return whether a text can only be a place on this machine, not a hub id ``owner/name``."""
    return text.startswith(("/", ".", "~")) or "\\" in text or text.count("/") > 1


def split_name(entry: str) -> tuple[str | None, Path]:
    """Split ``[NAME=]FOLDER`` into name and folder; the name is None where there is none.

    A folder may have ``=`` in its name (``runs/lr=1e-4,seed=0``): what exists as it stands is the
    folder, and what stands before the first ``=`` is a name only without a path separator.

    Raises:
        ValueError: If both readings exist.
    """
    whole = expanded(entry)
    name, equals, rest = entry.partition("=")
    if not equals or "/" in name or "\\" in name:
        return None, whole
    folder = expanded(rest)
    if not whole.exists():
        return name, folder
    if rest and folder.exists():
        raise ValueError(
            f"should be one folder. Found both `{entry}` and `{rest}`: `./{entry}` means the "
            f"first, `{name}=./{rest}` the second."
        )
    return None, whole


def split_list(text: str, known: Callable[[str], bool]) -> list[str]:
    """Return the names or files, comma-separated, of which some may have commas themselves.

    Args:
        text: The text as the user gave it.
        known: Whether a part is one that exists; parts of which none is known are single words.

    Returns:
        The parts, without white space around them; the longest that is known, from the left.
    """
    words, parts = text.split(","), []
    while words:
        length = next(
            (n for n in range(len(words), 0, -1) if known(",".join(words[:n]).strip())), 1
        )
        parts.append(",".join(words[:length]).strip())
        words = words[length:]
    return parts


def usual_mode(folder: Path) -> int:
    """Return the permissions that a new file gets in a folder, by the umask.

    safetensors writes its files for their owner alone, so that nobody else could read a model.
    """
    probe = folder / f".mode-{os.getpid()}"
    probe.touch()
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
