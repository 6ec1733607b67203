"""Processes of a comparison: how they end, and what is left alone."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from small_comparison import FAKE, FAKE_PROGRAM, planned, write_folder

from moa_diffusion.comparison.execute import cause_of_death, execute


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_last_words_are_the_error(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert cause_of_death(log, 3) == "exit 3"
    log.write_text("bar\rbar 2\nKilled\n\n")
    assert cause_of_death(log, 1) == "Killed"
    log.write_text("error: no paint\nThe state after 3 rollouts is there.\n")
    assert cause_of_death(log, -9) == "error: no paint"


def test_a_reward_without_spread_ends_the_comparison_at_once(folder: Path) -> None:
    (folder / "fake.py").write_text(FAKE)
    with pytest.raises(ValueError, match=r"Objective `mine` should vary within a prompt.*Found 0"):
        execute(planned(seeds="2").runs, program=FAKE_PROGRAM, parallel=1)
    assert not (folder / "out" / "static-1").exists()


def test_a_run_that_still_goes_on_is_left_alone(folder: Path) -> None:
    (folder / "fake.py").write_text(FAKE)
    (run,) = planned().runs
    run.folder.mkdir(parents=True)
    with run.log.open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        log.write("at work")
        log.flush()
        with pytest.raises(ValueError, match="Another process is at work on `out/static-0`"):
            execute([run], program=FAKE_PROGRAM, parallel=1)
    assert run.log.read_text() == "at work"
