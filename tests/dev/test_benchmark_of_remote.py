"""The benchmark of the remote head scores through a real server, and ends its processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.remote import ROOT, measure_remote
from benchmarks.tables import show
from waiting import python

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


@pytest.fixture(autouse=True)
def _forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way and each server is a process, which need not import PyTorch anew."""
    monkeypatch.setattr(sys, "executable", python())


def test_both_ways_are_measured_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report = measure_remote(4, rounds=2)
    local, through = report["rows"]
    assert [(row["tree"], row["way"]) for row in report["rows"]] == [
        (str(ROOT), "local"),
        (str(ROOT), "remote"),
    ]
    assert all(row["per_second"] > 0 for row in report["rows"])
    assert through["client"] > 0
    assert through["server"] > 0
    assert local["client"] > 0
    show("remote", report, tmp_path / "remote.json")
    said = capsys.readouterr().out
    assert "batches of 4 images" in said
    assert f"{through['per_second']:.2f}" in said


def test_a_server_that_does_not_start_is_an_error(tmp_path: Path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "heads.py").write_text("raise SystemExit(3)")
    (tmp_path / "rewards.py").write_text("")
    with pytest.raises(RuntimeError, match="exit status 3"):
        measure_remote(1, rounds=1, against=tmp_path)
