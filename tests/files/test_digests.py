"""Digests: of content and place, and remembered by what would change with the content."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from moa_diffusion.files import digests
from moa_diffusion.files.digests import file_digest, files_digest, json_digest


def test_a_digest_is_that_of_the_bytes_or_the_value(tmp_path: Path):
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    assert file_digest(file) == hashlib.sha256(b"abc").hexdigest()
    assert json_digest({"a": 1, "b": [2]}) == json_digest({"b": [2], "a": 1})
    assert json_digest([1, 2]) != json_digest([2, 1])
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_digest(float("nan"))


def test_files_are_read_again_only_if_they_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, memory = tmp_path / "model", tmp_path / "digests.txt"
    folder.mkdir()
    files = [folder / "a", folder / "b c"]
    for file in files:
        file.write_text(file.name)
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return file_digest(path)

    monkeypatch.setattr(digests, "file_digest", counted)
    first = files_digest(folder, files, memory)
    assert files_digest(folder, files, memory) == first
    assert read == files
    files[0].write_text("x")
    os.utime(files[0], ns=(0, 0))  # it keeps its size, and perhaps the tick of the clock
    assert files_digest(folder, files, memory) != first
    assert read == [*files, files[0]]


def test_a_name_counts_and_the_place_of_the_folder_does_not(tmp_path: Path):
    def digest(folder: str, name: str) -> str:
        file = tmp_path / folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("same")
        return files_digest(file.parent, [file], tmp_path / "memory.txt")

    assert digest("one", "a") == digest("two", "a") != digest("two", "b")
