"""What all commands have, what a user types to start one here, and where the recipes lie.

The same commands are there as ``moa-diffusion COMMAND``, as ``python -m moa_diffusion COMMAND``
and, in a checkout, as ``python scripts/COMMAND.py``. What is printed to be copied names the way
that this process was started by.
"""

from __future__ import annotations

import functools
import os
import select
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

NAME = "moa-diffusion"
MODULE = "python -m moa_diffusion"  # with a launcher, `accelerate launch -m moa_diffusion`
_PACKAGE = Path(__file__).resolve().parents[1]
_SCRIPTS = {"rewards": "heads.py"}  # all others have the name of their command


def entry(main: Callable[[], int]) -> Callable[[], int]:
    """Give the ``main`` of a command what all of them have, whatever they are started by.

    A stream that whoever started it has closed takes what is written, and leads nowhere. Where
    stderr is no terminal, and on all processes but the main one, libraries that load models
    draw no progress bars. Where the reader of stdout ends before the command does, as ``head``, the
    command ends without a word, with exit status 1: https://docs.python.org/3/library/signal.html
    (note on SIGPIPE).

    Args:
        main: What the command does; it imports tqdm, and what imports that, inside.
    """

    @functools.wraps(main)
    def run() -> int:
        if sys.stdout is None:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        if sys.stderr is None:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
            os.environ["TQDM_DISABLE"] = "1"  # the switch of them all, read when tqdm is imported
        try:
            try:
                status = main()
            except SystemExit:  # as after --help
                sys.stdout.flush()
                raise
            sys.stdout.flush()  # at exit, nobody could catch what it raises
        except BrokenPipeError:
            if not _unread():  # it is of another pipe
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the rest, at exit
            return 1
        return status

    return run


def _unread() -> bool:
    """Return whether nobody is left to read stdout."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # asks for errors alone, such as that
    return bool(poll.poll(0))


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
