"""Does the name `rewards` mean the package that came with this one?

The name is a common one: a file `rewards.py` beside a user's script comes first on Python's path.
Every module of this package is imported after this check, so that the clash is told by one
message, and not by whichever name the user's file happens to lack.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent  # holds both packages


def check_neighbour(name: str) -> None:
    """Check that importing a package by its name gives the one that stands beside this one.

    Raises:
        ImportError: if it gives something else; names both, and what to do.
    """
    own = _ROOT / name / "__init__.py"
    # In a source checkout Python looks into scripts/ first, whose file of this name makes way.
    known = {own, _ROOT / "scripts" / f"{name}.py"}
    place = _place(name)
    if place is not None and place.resolve() not in known:
        begun = name in sys.modules
        raise ImportError(
            f"The name `{name}` should mean the package `{own.parent}`, which moa_diffusion needs. "
            f"{'It has been imported' if begun else 'Python finds it first'} as `{place}`. Rename "
            f"that file or folder (to my_{name}, say), or run from elsewhere: Python looks into "
            f"the folder of the script first, with `python -m` into the current folder."
        )


def _place(name: str) -> Path | None:
    """The file that importing the name would run or has run, or the folder; None: there is none."""
    spec = sys.modules[name].__spec__ if name in sys.modules else importlib.util.find_spec(name)
    if spec is None:
        return None
    if spec.has_location and spec.origin is not None:
        return Path(spec.origin)
    folders = list(spec.submodule_search_locations or ())  # without an __init__.py
    return Path(folders[0]) if folders else None
