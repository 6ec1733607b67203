"""Progress bars: what a file gets, what a terminal gets, and that there are no others."""

from __future__ import annotations

import ast
import math
import sys

import pytest
from test_layers import MODULES

from rewards import progress_bar as module
from rewards.progress_bar import progress_bar

EVERY = 0.0  # seconds between lines; no test waits for a clock


def lines(text: str) -> list[str]:
    """The lines of a file, without their seconds."""
    assert "\r" not in text
    assert text.endswith("\n")
    return [line.partition(" [")[0] for line in text.splitlines()]


def test_a_file_gets_a_line_per_5_percent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "SECONDS", EVERY)
    assert list(progress_bar(range(50), title="draw")) == list(range(50))
    places = [*range(0, 50, 3), 50]
    assert lines(capsys.readouterr().err) == [f"draw: {n} of 50" for n in places]


@pytest.mark.parametrize(("leave", "places"), [(True, (0, 50)), (False, ())])
def test_what_is_quick_gets_its_start_and_its_end(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    leave: bool,
    places: tuple[int, ...],
) -> None:
    monkeypatch.setattr(module, "SECONDS", math.inf)
    assert len(list(progress_bar(range(50), title="draw", leave=leave))) == 50
    written = capsys.readouterr().err
    assert (lines(written) if written else []) == [f"draw: {n} of 50" for n in places]


def test_a_bar_that_is_told_of_its_steps_ends_where_it_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "SECONDS", EVERY)
    with progress_bar(title="  compare", total=100, initial=40, unit="rollout") as bar:
        bar.set_postfix_str("apex 1", refresh=False)
        bar.update(7)
        bar.write("apex died", sys.stderr)
        for _ in range(100):
            bar.update(0)  # has nothing to say
        bar.total = 90
        bar.update(2)
    written = capsys.readouterr().err
    assert lines(written) == [
        *("compare: 40 of 100", "compare: 47 of 100", "apex died"),
        *("compare: 47 of 100", "compare: 49 of 90"),
    ]
    assert written.count(", apex 1]\n") == 3


def test_nothing_is_shown_by_other_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar([1, 2], title="draw", shown=False)) == [1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(range(2), title="draw", unit="batch") as bar:
        bar.refresh()
    drawn = capsys.readouterr().err
    assert drawn.count("\rdraw:   0%|") >= 2
    assert "batch/s]" in drawn


def test_a_bar_knows_its_steps() -> None:
    with pytest.raises(ValueError, match="`total` should be the number of steps"):
        progress_bar(title="compare")


def test_all_bars_are_made_here_but_that_of_rounds() -> None:
    """It has lines of its own, with what a round has measured."""
    calls = {
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "tqdm"
    }
    assert calls == {"rewards.progress_bar", "moa_diffusion.monitoring.console"}
