"""Checkpoints are whole or not there, also when the process is killed while it writes."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from moa_diffusion.storage import checkpoint
from moa_diffusion.types import ConfigError


def write(run: Path, step: int, value: float = 0.0) -> Path:
    folder = checkpoint.step_folder(run, step)
    with checkpoint.atomic_folder(folder) as partial:
        (partial / "ema").mkdir()
        (partial / "ema" / "weights").write_text("x")
        (partial / checkpoint.STATE).write_bytes(
            checkpoint.packed({"step": step, "value": torch.tensor(value)})
        )
    return folder


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    folder = write(tmp_path, 7, 0.25)
    assert folder == tmp_path / "checkpoints" / "step-000007"
    state = checkpoint.load_state(folder)
    assert state["step"] == 7
    assert float(state["value"]) == 0.25
    assert (folder / "ema" / "weights").read_text() == "x"
    assert names(tmp_path) == ["step-000007"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_nothing(tmp_path, error):
    target = checkpoint.step_folder(tmp_path, 1)
    with pytest.raises(error), checkpoint.atomic_folder(target) as partial:
        (partial / "half").write_text("x")
        assert not target.exists()
        raise error
    assert names(tmp_path) == []


def test_an_error_while_writing_keeps_the_older_folder(tmp_path):
    write(tmp_path, 1, 1.0)
    with (
        pytest.raises(RuntimeError),
        checkpoint.atomic_folder(checkpoint.step_folder(tmp_path, 1)) as partial,
    ):
        (partial / checkpoint.STATE).write_bytes(checkpoint.packed({"value": torch.tensor(2.0)}))
        raise RuntimeError
    assert float(checkpoint.load_state(checkpoint.find("latest", tmp_path))["value"]) == 1.0
    assert names(tmp_path) == ["step-000001"]


def test_a_complete_folder_replaces_the_older_one(tmp_path):
    (write(tmp_path, 1, 1.0) / "stale").write_text("x")
    folder = write(tmp_path, 1, 2.0)
    assert float(checkpoint.load_state(folder)["value"]) == 2.0
    assert not (folder / "stale").exists()
    assert names(tmp_path) == ["step-000001"]


def kill_yourself(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_process_that_dies(work) -> None:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)  # reached only if nothing killed it
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the process should have been killed"


@pytest.mark.parametrize("moment", ["while filling", "before the flush", "before the rename"])
@pytest.mark.parametrize("step", [3, 2])
def test_kill_while_writing_leaves_the_older_checkpoint(tmp_path, moment, step):
    """Whether the killed writer was at the next step or was replacing the last one."""
    write(tmp_path, 1, 1.0)
    write(tmp_path, 2, 2.0)

    def work() -> None:
        if moment == "before the flush":
            checkpoint._fsync = kill_yourself
        if moment == "before the rename":
            Path.rename = kill_yourself
        with checkpoint.atomic_folder(checkpoint.step_folder(tmp_path, step)) as partial:
            (partial / checkpoint.STATE).write_bytes(
                checkpoint.packed({"value": torch.tensor(9.0)})
            )
            if moment == "while filling":
                kill_yourself()

    in_a_process_that_dies(work)
    latest = checkpoint.find("latest", tmp_path)
    assert latest == checkpoint.step_folder(tmp_path, 2)
    assert float(checkpoint.load_state(latest)["value"]) == 2.0
    write(tmp_path, step, 3.0)  # what was left over is in nobody's way
    assert names(tmp_path) == [f"step-{i:06d}" for i in range(1, max(step, 2) + 1)]


def test_kill_between_the_two_renames_falls_back_to_an_older_step(tmp_path):
    write(tmp_path, 1, 1.0)
    write(tmp_path, 2, 2.0)

    def work() -> None:
        rename, calls = Path.rename, []

        def second_one_dies(self: Path, target: Path) -> Path:
            calls.append(target)
            if len(calls) == 2:
                kill_yourself()
            return rename(self, target)

        Path.rename = second_one_dies
        write(tmp_path, 2, 3.0)

    in_a_process_that_dies(work)
    assert checkpoint.find("latest", tmp_path) == checkpoint.step_folder(tmp_path, 1)
    write(tmp_path, 2, 3.0)
    assert names(tmp_path)[-1] == "step-000002"
    assert float(checkpoint.load_state(checkpoint.find("latest", tmp_path))["value"]) == 3.0


def test_find(tmp_path):
    with pytest.raises(ConfigError, match=r"resume: 'latest' needs a checkpoint .* Found none"):
        checkpoint.find("latest", tmp_path)
    for step in (2, 10, 9):
        write(tmp_path, step)
    assert checkpoint.find("latest", tmp_path).name == "step-000010"
    chosen = checkpoint.step_folder(tmp_path, 9)
    assert checkpoint.find(str(chosen), tmp_path / "elsewhere") == chosen
    every = ", ".join(f"`{checkpoint.step_folder(tmp_path, step)}`" for step in (2, 9, 10))
    for place in (".", "checkpoints", "checkpoints/step-000003", "checkpoints/step-000009/ema"):
        with pytest.raises(ConfigError, match=rf"there are {every}, the newest last\."):
            checkpoint.find(str(tmp_path / place), tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=rf"In `{tmp_path}` there are {every}"):
        checkpoint.find("last", tmp_path)
    with pytest.raises(ConfigError, match=r"no checkpoint in `/nope`, nor in `/elsewhere`"):
        checkpoint.find("/nope", Path("/elsewhere"))
    with pytest.raises(ConfigError, match="resume: should be 'latest' or a checkpoint folder"):
        checkpoint.find(str(tmp_path), tmp_path)
    (checkpoint.step_folder(tmp_path, 10) / checkpoint.STATE).unlink()
    assert checkpoint.find("latest", tmp_path).name == "step-000009"


def test_prune_keeps_what_is_named(tmp_path):
    for step in (2, 10, 9):
        write(tmp_path, step)
    half = tmp_path / "checkpoints" / ".step-000011.partial"
    half.mkdir()
    checkpoint.prune(tmp_path, {2, 9, 10, 11})
    assert len(names(tmp_path)) == 3
    assert not half.exists()
    checkpoint.prune(tmp_path, [10, 2])
    assert names(tmp_path) == ["step-000002", "step-000010"]


@pytest.mark.parametrize("length", [0, 10, 500])
def test_a_damaged_state_is_named(tmp_path, length):
    path = write(tmp_path, 1) / checkpoint.STATE
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ConfigError, match=r"resume: `.*state\.pt` is damaged .*older checkpoint"):
        checkpoint.load_state(path.parent)


def test_a_state_of_another_version_is_refused(tmp_path):
    folder = write(tmp_path, 1)
    torch.save({"version": 99}, folder / checkpoint.STATE)
    with pytest.raises(ConfigError, match=r"should have version 3\. Found 99"):
        checkpoint.load_state(folder)
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match=r"Found no state\.pt"):
        checkpoint.load_state(folder)


def test_loading_a_state_runs_no_code(tmp_path):
    folder = write(tmp_path, 1)
    torch.save({"version": checkpoint.VERSION, "bad": os.system}, folder / checkpoint.STATE)
    with pytest.raises(ConfigError, match="is damaged"):
        checkpoint.load_state(folder)
