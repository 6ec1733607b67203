"""The comparison, as a user runs it."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_comparison import planned, write_folder

from moa_diffusion.comparison.execute import execute
from moa_diffusion.storage.log import read_metrics
from waiting import HANG, python, running, wait_for

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "compare.py"
COMMAND = [str(SCRIPT), "--config", "fast.yaml", "--output", "out", "--methods"]
Here = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs the script in this process: exit status, stdout, stderr."""

    def start(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [*COMMAND, *arguments])
        monkeypatch.setattr(sys, "executable", python())
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        printed = capsys.readouterr()
        return int(str(ended.value.code)), printed.out, printed.err

    return start


def test_two_methods_twice_one_dies_and_is_continued(folder: Path, here: Here) -> None:
    command = ("static,mild.yaml", "--seeds", "2", "--parallel", "2")
    (folder / "broken").touch()
    status, said, log = here(*command)
    assert status == 1, log
    assert "static: objectives.normalizer.floor is left out" in said
    assert 'mild-1 died: error: Reward head "mine" failed' in log
    assert "(out/mild-1.log)" in log
    assert "\ncompare: 0 of 8 [" in f"\n{log}"
    assert "\r" not in log  # a bar drawn anew, of which a file would keep every state
    assert "Not in the table: mild-1 died" in said
    result = json.loads((folder / "out" / "results.json").read_text())
    assert list(result["failures"]) == ["mild-1"]
    assert {m["method"]: m["seeds"] for m in result["methods"]} == {"static": [0, 1], "mild": [0]}
    assert [run["rollouts"] for run in result["runs"]] == [2, 2, 2]
    assert result["methods"][0]["seconds"]["update"] > 0
    # The trainer's own gain, of the same images.
    (run,) = [run for run in result["runs"] if run["folder"] == "out/static-1"]
    last = read_metrics(folder / "out" / "static-1" / "metrics.jsonl")[-1]
    for name, value in run["gains"].items():
        assert value == pytest.approx(last[f"eval_gain/{name}"], rel=1e-6)  # sums in another order
        assert value != 0
    assert (folder / "out" / "table.md").read_text() in said
    assert (folder / "out" / "compare.png").stat().st_size > 20_000

    (folder / "broken").unlink()
    kept = (folder / "out" / "static-0.log").stat().st_mtime_ns
    status, said, log = here(*command)
    assert status == 0, log
    assert "died" not in said + log
    result = json.loads((folder / "out" / "results.json").read_text())
    assert {tuple(method["seeds"]) for method in result["methods"]} == {(0, 1)}
    assert (folder / "out" / "static-0.log").stat().st_mtime_ns == kept

    runs = planned(methods=["static", "mild.yaml"], seeds="2").runs
    assert execute(runs, program=["nothing"], parallel=2) == {}  # nothing is started


def test_sigterm_ends_the_runs_and_the_next_call_continues(folder: Path) -> None:
    endless = ("--trainer.steps", "1000", "--checkpoint.every", "0", "--evaluation.every", "1000")
    command = [python(), *COMMAND, "static", "--seeds", "2", *endless]
    with running(command, stderr=subprocess.PIPE) as process:
        wait_for(folder / "out" / "static-0" / "metrics.jsonl", process)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=HANG)
    assert process.returncode == 130, log
    assert "The same command continues." in log
    assert "Traceback" not in log
    assert "Stopped by SIGTERM" in (folder / "out" / "static-0.log").read_text()
    assert list((folder / "out" / "static-0" / "checkpoints").glob("step-*/state.pt"))
    assert not (folder / "out" / "static-1").exists()


def test_bad_input_and_other_launchers_exit_with_2(
    folder: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, processes, message in (
        (["static", "--pair", "mine,ocr"], "1", "--pair: should name two of mine, colourfulness"),
        (["static"], "2", "start it with `python`"),
    ):
        monkeypatch.setenv("WORLD_SIZE", processes)
        status, _, log = here(*arguments)
        assert status == 2, log
        assert message in log
    assert not (folder / "out").exists()
