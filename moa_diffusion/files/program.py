"""What a user types to start a command here, and where the recipes lie.

The same commands are there as ``moa-diffusion COMMAND``, as ``python -m moa_diffusion COMMAND``
and, in a checkout, as ``python scripts/COMMAND.py``. What is printed to be copied names the way
that this process was started by.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

NAME = "moa-diffusion"
MODULE = "python -m moa_diffusion"  # with a launcher, `accelerate launch -m moa_diffusion`
_PACKAGE = Path(__file__).resolve().parents[1]
_SCRIPTS = {"rewards": "heads.py"}  # all others have the name of their command


def name() -> str:
    """Return what this process was started as, for the first line of its help."""
    started = sys.argv[0]
    return started if started.startswith((f"{NAME} ", MODULE)) else Path(started).name


def script(command: str) -> Path | None:
    """Return the script of a command, if this process was started by one beside it.

    Args:
        command: A command such as ``train-sd``.
    """
    folder = Path(sys.argv[0]).absolute().parent
    file = folder / _SCRIPTS.get(command, f"{command.replace('-', '_')}.py")
    if folder.name != "scripts" or not file.is_file():
        return None
    near = Path(os.path.relpath(file))
    return min(near, file, key=lambda path: len(str(path)))


def words(command: str) -> str:
    """Return what starts a command, to be typed in a shell in the working directory."""
    file = script(command)
    if file is not None:
        return f"python {shlex.quote(str(file))}"
    return f"{NAME if shutil.which(NAME) else MODULE} {command}"


def described(text: str, command: str) -> str:
    """Return the text about a command with the words that start it here.

    Args:
        text: A text with ``moa-diffusion COMMAND`` and ``-m moa_diffusion COMMAND``.
        command: The command.
    """
    file = script(command)
    if file is not None:
        text = text.replace(f"-m moa_diffusion {command}", shlex.quote(str(file)))
    return text.replace(f"{NAME} {command}", words(command))


def training(command: str) -> list[str]:
    """Return what starts a training in a process of its own, by this Python.

    Args:
        command: ``train-sd`` or ``train-lm``.
    """
    file = script(command)
    if file is not None:
        return [sys.executable, str(file.resolve())]
    # `python -m` looks into the working directory first; -P keeps it from that where this process
    # does not.
    here = sys.path[0] in ("", os.getcwd())
    module = f"moa_diffusion.{command.replace('-', '_')}"
    return [sys.executable, *(() if here else ("-P",)), "-m", module]


def recipes() -> Path:
    """Return the folder of the recipes: in an installed package, or beside it in a checkout."""
    inside = _PACKAGE / "recipes"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"
