"""Writing: whole files or none, and errors that name the path, the cause and the space."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moa_diffusion.files import writing as storage
from moa_diffusion.files.writing import StorageError
from moa_diffusion.storage import checkpoint


def fails(number: int):
    def raise_it(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return raise_it


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (errno.ENOSPC, "the disk is full (3 bytes are needed, "),
        (errno.EDQUOT, "the disk quota is used up (3 bytes are needed, "),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "writing there is not permitted"),
        (errno.EIO, "input/output error"),
    ],
)
def test_an_error_of_the_system_names_path_and_cause(tmp_path, monkeypatch, number, cause):
    target = tmp_path / "file.txt"
    storage.write_text(target, "old")
    monkeypatch.setattr(Path, "write_bytes", fails(number))
    with pytest.raises(StorageError) as caught:
        storage.write_text(target, "new")
    assert f"Could not write `{target}`: {cause}" in str(caught.value)
    assert ("are free" in str(caught.value)) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_what_is_no_error_of_the_system_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match="mine"), storage.replaced(tmp_path / "file"):
        raise ValueError("mine")
    with pytest.raises(KeyboardInterrupt), storage.replaced(tmp_path / "file"):
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)


def test_errors_of_other_languages_are_recognised(tmp_path):
    """safetensors tells the system's number in words; PIL forgets it."""
    rust = RuntimeError("Error while serializing: I/O error: No space left (os error 28)")
    with pytest.raises(StorageError, match="the disk is full"), storage.writing(tmp_path / "a"):
        raise rust
    with pytest.raises(StorageError, match="encoder error"), storage.writing(tmp_path / "a"):
        raise OSError("encoder error -2 when writing image file")


def test_a_folder_in_the_place_of_a_file_and_the_other_way_round(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file where its folder should be"):
        storage.append_text(tmp_path / "file" / "metrics.jsonl", "row")


LIMITED = """
import resource, sys
from pathlib import Path
from moa_diffusion.files import writing as storage
path = Path(sys.argv[1])
storage.append_text(path, "a" * 600 + "\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    storage.append_text(path, "b" * 600 + "\\n")
except storage.StorageError as error:
    print(error)
storage.append_text(path, "c\\n")
"""


def test_a_line_that_does_not_fit_leaves_no_part_of_itself(tmp_path):
    """The system takes the 399 bytes for which there is room, and refuses the rest."""
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"Could not write `{path}`: the file is larger" in done.stdout
    assert path.read_text() == "a" * 600 + "\nc\n"


def test_a_checkpoint_that_does_not_fit_leaves_the_older_one(tmp_path, monkeypatch):
    target = checkpoint.step_folder(tmp_path, 3)
    with checkpoint.atomic_folder(target) as partial:
        (partial / "weights").write_text("old")
    monkeypatch.setattr(checkpoint, "_fsync", fails(errno.ENOSPC))
    with (
        pytest.raises(StorageError, match=r"step-000003`: the disk is full \(5.0 kB are needed"),
        checkpoint.atomic_folder(target, needed=5000) as partial,
    ):
        (partial / "weights").write_text("new")
    assert (target / "weights").read_text() == "old"
    assert os.listdir(target.parent) == ["step-000003"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (3e9, "3.0 GB")]
)
def test_sizes_are_readable(count, text):
    assert storage.size_text(int(count)) == text


def test_free_space_is_that_of_the_nearest_folder(tmp_path):
    # Others write to the disk meanwhile.
    assert storage.free_bytes(tmp_path / "not" / "there") == pytest.approx(
        storage.free_bytes(tmp_path), rel=0.5
    )
