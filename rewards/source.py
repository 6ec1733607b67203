"""Which code scores: the module, name and file digest of functions and classes that users write."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rewards.base import RewardHead

FILE_MODULE = "_reward_"  # begins the name of a module that was imported by its file's path
UNKNOWN = "unknown: the code is in no file"
_OWN = __name__.partition(".")[0]


def source_of(target: Callable[..., Any]) -> dict[str, str]:
    """Return where the code of a function, class or callable object stands, and what it hashes to.

    The digest is that of one file: what the file imports does not change it, nor does what a
    partial or a callable object holds.

    Returns:
        ``module`` (the file's stem if it was imported by its path, so that the same file at another
        place has the same name), ``name``, and ``source_sha256``, hexadecimal, or ``UNKNOWN`` for
        what was typed into a prompt.
    """
    while isinstance(target, partial):
        target = target.func
    if not (inspect.isclass(target) or inspect.isroutine(target)):  # an object with `__call__`
        target = type(target)
    module = sys.modules.get(target.__module__)
    file = None if module is None else vars(module).get("__file__")
    digest, name = UNKNOWN, target.__module__
    if file is not None and Path(file).is_file():  # and no archive, or frozen program
        if name == "__main__" or name.startswith(FILE_MODULE):
            name = Path(file).stem
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return {"module": name, "name": target.__qualname__, "source_sha256": digest}


def source_of_class(kind: type[RewardHead]) -> Mapping[str, str]:
    """Return the module, name and file digest of a class of heads.

    ``source_sha256`` also covers the files of its bases outside this package.

    Empty for a head of this package, which its version describes.
    """
    kinds = [base for base in kind.__mro__ if _foreign(base)]
    if not kinds:
        return {}
    files = {(source["module"], source["source_sha256"]) for source in map(source_of, kinds)}
    if len(files) == 1:
        return source_of(kind)
    digest = hashlib.sha256(repr(sorted(files)).encode()).hexdigest()
    return {**source_of(kind), "source_sha256": digest}


def _foreign(kind: type) -> bool:
    package = kind.__module__.partition(".")[0]
    return package != _OWN and package not in sys.stdlib_module_names
