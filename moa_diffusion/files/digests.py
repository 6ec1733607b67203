"""SHA-256 of files and of JSON values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moa_diffusion.files.writing import write_text


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, in hex, whatever the order of keys in mappings."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def files_digest(folder: Path, files: Iterable[Path], memory: Path) -> str:
    """Return the digest of the content of files by their place in a folder.

    Args:
        folder: The folder that they lie in.
        files: Files of the folder.
        memory: File where digests are kept by path, size and time of change: reading all weights
            again takes longer than most evaluations that have nothing to draw.
    """
    before = _remembered(memory)
    known, digests = dict(before), {}
    for file in files:
        facts = file.stat()
        stamp = f"{file.resolve()}:{facts.st_size}:{facts.st_mtime_ns}"
        if stamp not in known:
            known[stamp] = file_digest(file)
        digests[str(file.relative_to(folder))] = known[stamp]
    if known != before:
        write_text(memory, "".join(f"{digest} {stamp}\n" for stamp, digest in known.items()))
    return json_digest(digests)


def _remembered(memory: Path) -> dict[str, str]:
    if not memory.is_file():
        return {}
    pairs = (line.split(" ", 1) for line in memory.read_text(encoding="utf-8").splitlines())
    return {stamp: digest for digest, stamp in pairs}
