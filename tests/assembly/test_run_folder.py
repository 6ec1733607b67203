"""What may be in the folder of a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from moa_diffusion.assembly.run_folder import run_folder, start_over, write_config
from moa_diffusion.config import from_dict
from moa_diffusion.storage import checkpoint
from moa_diffusion.types import ConfigError


def settings_in(folder: Path, resume: str | None = None):
    values = {"rewards": {"jpeg_compressibility": {}}, "evaluation": {"every": 0}}
    return from_dict(values | {"output_dir": str(folder), "resume": resume})


def finish(folder: Path, rounds: int) -> None:
    """As a run leaves it after so many rounds, without a checkpoint."""
    write_config(settings_in(folder))
    rows = [json.dumps({"step": step}) + "\n" for step in range(rounds + 1)]
    (folder / "metrics.jsonl").write_text("".join(rows))


def test_a_new_folder_and_one_of_a_run_that_learned_nothing_are_new(tmp_path: Path):
    assert run_folder(settings_in(tmp_path / "new")) is None
    finish(tmp_path / "old", 0)
    assert run_folder(settings_in(tmp_path / "old")) is None


def test_another_run_is_not_written_over(tmp_path: Path):
    finish(tmp_path, 3)
    with pytest.raises(ConfigError, match=r"^output_dir: .*another run .*3 rounds.*begin anew"):
        run_folder(settings_in(tmp_path))


def test_a_run_without_a_checkpoint_begins_anew_where_it_is_resumed(tmp_path: Path, caplog):
    finish(tmp_path, 3)
    assert run_folder(settings_in(tmp_path, "latest")) is None
    assert "no checkpoint of the 3 rounds it went" in caplog.text


def test_changed_settings_are_told_at_a_resume(tmp_path: Path, caplog):
    finish(tmp_path, 3)
    folder = checkpoint.step_folder(tmp_path, 3)
    folder.mkdir(parents=True)
    (folder / checkpoint.STATE).write_bytes(b"state")
    settings = dataclasses.replace(settings_in(tmp_path, "latest"), seed=7)
    assert run_folder(settings) == folder
    assert "Resuming with another seed: 7, was 0." in caplog.text


def test_starting_over_takes_away_what_a_run_wrote_and_nothing_else(tmp_path: Path):
    finish(tmp_path, 0)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "step-000000.jsonl").write_text("")
    start_over(tmp_path)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"config.yaml", "notes.txt"}


def test_a_place_that_cannot_be_a_folder_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^output_dir: should be a folder\. Found the file"):
        run_folder(settings_in(tmp_path / "file" / "run"))
