"""What a run says: in a file, on a terminal, and once."""

from __future__ import annotations

import io
import logging
import math
import os
import pty
import re
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moa_diffusion.monitoring.console import Console
from moa_diffusion.monitoring.standing import Standing
from moa_diffusion.statistics.bootstrap import Estimate
from toy_runs import make


def standing(name: str, *, gain: float = 0.314, error: float = 0.08) -> Standing:
    return Standing(
        name=name,
        trained=name != "watched",
        base=0.5613,
        now=0.6127,
        gain=gain,
        error=error,
        interval=Estimate(value=gain, low=gain - 0.16, high=gain + 0.16),
    )


STANDINGS = (standing("ocr"), standing("jpeg", gain=-0.001), standing("watched"))
METRICS = {"weight/ocr": 0.7, "weight/jpeg": 0.3, "seconds/total": 1.23}


def console_of(*, shown: bool = True, commands: Sequence[str] = ()) -> Console:
    return Console(shown=shown, title="rollouts", total=2, commands=commands)


def tell(console: Console, *, bar: bool) -> None:
    """All that a run says, with a message of the log in the middle."""
    console.begin([("Run", "runs/mine"), ("Policy", "sd3: 1,234 trainable parameters [all]")])
    with console.rounds(completed=0, bar=bar):
        console.evaluated(0, STANDINGS)
        console.round(1, ("ocr", "jpeg"), METRICS, "")
        logging.getLogger("moa_diffusion.test").warning("Beware of it.")
        console.round(2, ("ocr", "jpeg"), METRICS, "bounds kept")
        console.evaluated(2, STANDINGS)
    console.end("Done: 2 of 2 rollouts, 3 s of training.", STANDINGS, [("Alarms", "none")])


def test_a_file_gets_plain_lines_once(capsys: pytest.CaptureFixture[str]) -> None:
    tell(console_of(commands=["python scripts/export.py --run runs/mine"]), bar=False)
    assert capsys.readouterr().out.splitlines() == [
        "Run: runs/mine",
        "Policy: sd3: 1,234 trainable parameters [all]",
        "Evaluation before training: ocr 0.5613; jpeg 0.5613; watched (held out) 0.5613",
        "1 of 2 rollouts, 1.2 s: weights ocr 0.70, jpeg 0.30",
        "2 of 2 rollouts, 1.2 s: weights ocr 0.70, jpeg 0.30; bounds kept",
        "Evaluation after 2 rollouts: ocr 0.5613 -> 0.6127, gain +0.31 ± 0.08; "
        "jpeg 0.5613 -> 0.6127, gain +0.00 ± 0.08; "
        "watched (held out) 0.5613 -> 0.6127, gain +0.31 ± 0.08",
        "",
        "Done: 2 of 2 rollouts, 3 s of training.",
        "reward                base     now  gain [95% interval]",
        "ocr                 0.5613  0.6127  +0.31 [+0.15, +0.47]",
        "jpeg                0.5613  0.6127  +0.00 [-0.16, +0.16]",
        "watched (held out)  0.5613  0.6127  +0.31 [+0.15, +0.47]",
        "Gains are in spreads of the base within a prompt, intervals over prompts.",
        "Alarms: none",
        "Next:",
        "  python scripts/export.py --run runs/mine",
    ]


def test_what_is_not_known_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    console = console_of()
    console.evaluated(3, [standing("ocr", gain=math.nan, error=math.nan)])
    assert "ocr 0.5613 -> 0.6127, gain -\n" in capsys.readouterr().out
    console.evaluated(3, [standing("ocr", error=math.nan)])  # a single prompt
    assert "gain +0.31\n" in capsys.readouterr().out
    unknown = Estimate(value=math.nan, low=math.nan, high=math.nan)
    console.end("Done.", [replace(standing("ocr"), interval=unknown)], [])
    assert "0.6127  +0.31 ± 0.08\n" in capsys.readouterr().out


def test_what_stdout_cannot_write_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    console_of().evaluated(1, [standing("größe")])
    assert b"gr??e 0.5613 -> 0.6127, gain +0.31 ? 0.08" in written.getvalue()


def test_other_processes_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    tell(console_of(shown=False, commands=["never"]), bar=True)
    assert "ocr" not in "".join(capfd.readouterr())


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Stdout and stderr as one terminal of 160 columns; call it for what was written there."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    termios.tcsetwinsize(theirs, (40, 160))

    def read() -> str:
        parts = []
        with suppress(BlockingIOError):
            while part := os.read(ours, 65536):
                parts.append(part)
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", b"".join(parts).decode())

    with (
        open(theirs, "w", encoding="utf-8", buffering=1) as written,
        monkeypatch.context() as patch,
    ):
        patch.setenv("COLUMNS", "160")
        patch.setenv("TERM", "xterm")
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, written)
        patch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(written)])
        yield read
    os.close(ours)


def test_a_terminal_gets_tables_and_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    console = console_of(commands=["python scripts/export.py --run runs/mine"])
    with terminal(monkeypatch) as read:
        tell(console, bar=True)
        said = read()
    assert "ocr +0.31±0.08 w0.70, jpeg +0.00±0.08 w0.30, watched +0.31±0.08" in said
    assert "1 of 2 rollouts" not in said  # the bar says it
    lines = [line.strip() for line in re.split(r"[\r\n]+", said)]
    assert "Policy  sd3: 1,234 trainable parameters [all]" in lines  # brackets are no markup
    assert "Beware of it." in lines  # in a line of its own, not in the bar's
    for row in (r"reward\s+base\s+now\s+gain", r"ocr\s+0.5613\s+0.6127\s+\+0.31 ± 0.08"):
        assert sum(re.fullmatch(row, line) is not None for line in lines) == 1
    assert sum(line.startswith("Done: 2 of 2") for line in lines) == 1
    assert "python scripts/export.py --run runs/mine" in lines


def test_a_run_that_goes_on_shows_its_last_gains_and_says_how_it_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"evaluation__every": 2, "evaluation__images_per_prompt": 2}
    first = make(tmp_path / "run", trainer__steps=2, **options)
    first.run()
    ended = capsys.readouterr().out
    assert ended.count("Evaluation after 2 rollouts: red ") == 1
    assert ended.count("Done: 2 of 2 rollouts") == 1
    assert f"Checkpoint: {tmp_path}/run/checkpoints/step-000002" in ended
    assert "Alarms: none" in ended
    assert f"--run {tmp_path}/run --checkpoints base,latest" in ended
    again = make(tmp_path / "run", resume="latest", trainer__steps=2, **options)
    for name in ("start", "latest"):  # what gains, their errors and intervals are made of
        assert torch.equal(vars(again.heldout)[name], vars(first.heldout)[name])
    again.run()  # there is nothing left to do, and the same is said of it
    assert capsys.readouterr().out.partition("Done:")[2] == ended.partition("Done:")[2]
