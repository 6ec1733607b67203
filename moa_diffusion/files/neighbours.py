"""Does the name ``rewards`` mean the package that came with this one?

The name is a common one: a file ``rewards.py`` beside a user's script comes first on Python's path.
Every module of this package is imported after this check, so that the clash is told by one
message, and not by whichever name the user's file happens to lack.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]  # holds both packages


def check_neighbour(name: str) -> None:
    """Check that importing a package by its name gives the one that stands beside this one.

    Raises:
        ImportError: If it gives something else; names both, and what to do.
    """
    own = _ROOT / name / "__init__.py"
    place = _place(name)
    if place is not None and place.resolve() != own:
        begun = name in sys.modules
        raise ImportError(
            f"The name `{name}` should mean the package `{own.parent}`, which moa_diffusion needs. "
            f"{'It has been imported' if begun else 'Python finds it first'} as `{place}`. Rename "
            f"that file or folder (to my_{name}, say), or run from elsewhere: Python looks into "
            f"the folder of the script first, with `python -m` into the current folder."
        )


def _place(name: str) -> Path | None:
    """Return the file or folder that importing the name would run or has run; None without one."""
    spec = sys.modules[name].__spec__ if name in sys.modules else importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None and _makes_way(Path(spec.origin), name):
        first = Path(spec.origin).resolve().parent
        spec = PathFinder.find_spec(name, [p for p in sys.path if Path(p).resolve() != first])
    if spec is None:
        return None
    if spec.has_location and spec.origin is not None:
        return Path(spec.origin)
    folders = list(spec.submodule_search_locations or ())  # without an __init__.py
    return Path(folders[0]) if folders else None


def _makes_way(file: Path, name: str) -> bool:
    """Return whether a file is this project's script of the name, or a copy of it.

    Python looks there first when it runs a script beside it. Imported by its name, that script
    takes its folder off the path and has the import done anew, and says so in these lines.
    """
    if file.name != f"{name}.py":
        return False
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return any(line.startswith(f'if __name__ == "{name}":') for line in lines) and (
        "    del sys.modules[__name__]" in lines
    )
