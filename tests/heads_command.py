"""`scripts/heads.py` in this process."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "heads.py"
HeadsCommand = Callable[..., tuple[int, str, str]]


def starter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> HeadsCommand:
    """Return what runs the script: exit status, stdout, stderr."""

    def start(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        printed = capsys.readouterr()
        return int(str(ended.value.code)), printed.out, printed.err

    return start
