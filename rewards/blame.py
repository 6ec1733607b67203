"""Where in a user's code an exception came from, for messages without a traceback."""

from __future__ import annotations

import linecache
import sysconfig
import traceback
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_OWN = (_HERE, _HERE.parent / "moa_diffusion")
# Folders of Python and of what is installed; a virtual environment shares the first with others.
_INSTALLED = tuple(
    Path(sysconfig.get_path(name)).resolve()
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


def cause_of(error: BaseException) -> str:
    """Return type and message of an exception, and the innermost line of a user's code in it.

    A user's code is what stands in a file outside Python, what is installed, and this project.

    Returns:
        ``KeyError: 'tag' (/home/me/my_rewards.py, line 12, in tagged: return tags[prompt])``, or
        without the parenthesis if no such line was passed.
    """
    message = str(error)
    cause = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return cause + passed(error)


def passed(error: BaseException) -> str:
    """Return the parenthesis of ``cause_of``, after a space.

    It is empty if no line of the user's code was passed.
    """
    if isinstance(error, SyntaxError):  # the message names the line of the imported file
        return ""
    users = [
        (frame, number)
        for frame, number in traceback.walk_tb(error.__traceback__)
        if _is_users(frame.f_code.co_filename)
    ]
    if not users:
        return ""
    frame, number = users[-1]
    code = frame.f_code
    line = linecache.getline(code.co_filename, number, frame.f_globals).strip()
    return f" ({code.co_filename}, line {number}, in {code.co_name}{f': {line}' if line else ''})"


def _is_users(file: str) -> bool:
    path = Path(file)
    if not path.is_file():  # a notebook's cell, or a frozen module
        return bool(linecache.getlines(file))
    path = path.resolve()
    return not any(path.is_relative_to(folder) for folder in (*_OWN, *_INSTALLED))
