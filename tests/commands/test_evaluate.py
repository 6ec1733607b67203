"""The command that evaluates: on two processes, and what it says of wrong options."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from evaluated_runs import ROOT, ask
from pyarrow import parquet

from moa_diffusion.evaluation.evaluate import evaluate
from moa_diffusion.evaluation.write import write_results
from waiting import HANG, python


def test_two_processes_give_the_table_of_one(two_runs: Path, tmp_path: Path):
    """Nine images in batches of four: one process has more than the other."""
    options = {"run": [str(two_runs / "a")], "seeds": "1"}
    plan = ask(two_runs, tmp_path / "one", **options)
    write_results(evaluate(plan), plan.output, shown=12, runs=plan.runs)
    torchrun = [python(), "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [
            *(*torchrun, "--nproc_per_node", "2", "--", "scripts/evaluate.py"),
            *("--run", str(two_runs / "a"), "--prompts", str(two_runs / "three.txt")),
            *("--seeds", "1", "--output", str(tmp_path / "two")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Drawn: 9 of 9 images; scored: 18 of 18 scores") == 1
    one, two = (parquet.read_table(tmp_path / name / "scores.parquet") for name in ("one", "two"))
    assert one.column_names == two.column_names
    for name in one.column_names:
        mine, other = one[name].to_pylist(), two[name].to_pylist()
        # Other batches may round a few pixels to the next of 256 levels: less than a thousandth.
        floats = isinstance(mine[0], float)
        assert other == (pytest.approx(mine, rel=1e-3) if floats else mine), name
    said = [(tmp_path / name / "summary.md").read_text() for name in ("one", "two")]
    words = [re.sub(r"-?\d+\.\d+", "number", text) for text in said]
    assert words[0] == words[1]


def test_the_script_says_it_in_one_line(
    two_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    script = str(ROOT / "scripts" / "evaluate.py")
    monkeypatch.setattr(sys, "argv", [script, "--run", str(two_runs / "a"), "--checkpoints", "9"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: --checkpoints: '9' is not in")
    assert (said.out, said.err.count("\n")) == ("", 1)
