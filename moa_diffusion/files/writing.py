"""Files that are either whole or not there, and errors of writing that say what can be done."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moa_diffusion.files.paths import usual_mode

_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "writing there is not permitted",
    errno.EPERM: "writing there is not permitted",
    errno.EFBIG: "the file is larger than the system allows",
    errno.ENOENT: "its folder is gone",
    errno.ENOTDIR: "there is a file where its folder should be",
    errno.EEXIST: "there is a file where its folder should be",
    errno.ESTALE: "the network file system has lost it",
}
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)
# What safetensors, which is written in Rust, makes of an error of the system.
_RUST = re.compile(r"\(os error (\d+)\)")


class StorageError(OSError):
    """Something could not be written; the message names the path, the cause, and the space."""

    cause = ""  # in words, such as "the disk is full"; "" if it was not the system's


@contextmanager
def writing(target: Path, needed: int | None = None) -> Iterator[None]:
    """Turn what the system raises within the block into an error about ``target``.

    Args:
        target: The file or folder that is written.
        needed: Its size in bytes, if it is known.

    Raises:
        StorageError: Naming the path, the cause, and the bytes that are needed and free.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        number = _number(error)
        if number is None:
            raise
        cause = _CAUSES.get(number, os.strerror(number).lower()) if number else str(error)
        space = _space(target, number, needed)
        failure = StorageError(f"Could not write `{target}`: {cause}{space}.")
        failure.cause = cause
        raise failure from error


@contextmanager
def replaced(target: Path, needed: int | None = None) -> Iterator[Path]:
    """Fill a file under a temporary name; it appears as ``target`` only when it is complete.

    It gets the permissions of any new file. If the block raises, nothing remains of it, and an
    older file is as it was.

    Args:
        target: The path of the finished file; its folder is made if missing.
        needed: Its size in bytes, if it is known.

    Raises:
        StorageError: If the file cannot be written.
    """
    # Containers that share the folder may have equal process ids.
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    with writing(target, needed):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.chmod(usual_mode(partial.parent))
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(target)
        except BaseException:
            remove(partial)
            raise


def write_bytes(target: Path, data: bytes | memoryview) -> None:
    """Write a file whole.

    Raises:
        StorageError: If it cannot be written.
    """
    with replaced(target, len(data)) as partial:
        partial.write_bytes(data)


def write_text(target: Path, text: str) -> None:
    """Write a UTF-8 file whole.

    Raises:
        StorageError: If it cannot be written.
    """
    write_bytes(target, text.encode())


def append_text(target: Path, text: str) -> None:
    """Add to the end of a UTF-8 file, all of the text or nothing.

    Raises:
        StorageError: If it cannot be written.
    """
    data = text.encode()
    with writing(target, len(data)):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                left = memoryview(data)
                while left:  # a disk that has room for a part takes it
                    left = left[file.write(left) :]
            except BaseException:
                file.truncate(size)
                raise


def remove(path: Path) -> None:
    """Delete a file or a folder if it is there; what cannot be deleted is left."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:  # The file system has failed already, and that is reported.
        return


def free_bytes(path: Path) -> int | None:
    """Return how many bytes can be written at a path, which need not exist; None: nobody knows."""
    for folder in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return None


def size_text(count: int) -> str:
    """Return a size as text such as ``1.5 MB``, in units of 1000."""
    size = float(count)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _number(error: Exception) -> int | None:
    """Return the system's number of an error; 0 if it is lost.

    The answer is None for an error that is none of the system's.
    """
    if isinstance(error, OSError):
        return error.errno or 0
    match = _RUST.search(str(error))
    return None if match is None else int(match[1])


def _space(target: Path, number: int, needed: int | None) -> str:
    if number not in _OUT_OF_SPACE:
        return ""
    parts = [] if needed is None else [f"{size_text(needed)} are needed"]
    free = free_bytes(target.parent)
    if free is not None:
        parts.append(f"{size_text(free)} are free")
    return f" ({', '.join(parts)})" if parts else ""
