"""What a run begins with, and what may follow it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from moa_diffusion.assembly.outline import commands
from moa_diffusion.files import program
from toy_runs import make, settings

ROOT = Path(__file__).parents[2]


def test_a_run_begins_with_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watched = {"blue": {"path": f"{ROOT}/tests/toy_runs.py:green"}}
    trainer = make(
        tmp_path / "run",
        evaluation={"every": 2, "images_per_prompt": 2, "rewards": watched},
        rewards={
            "red": {"path": f"{ROOT}/tests/toy_runs.py:red"},
            "small": {"head": "jpeg_compressibility", "weight": -2},
        },
        objectives={"method": "static"},
    )
    said = capsys.readouterr().out.splitlines()
    assert f"Run: {tmp_path}/run" in said
    parameters = sum(one.numel() for one in trainer.policy.trainable().values())
    assert f"Policy: toy 'tiny', float32: {parameters:,} trainable parameters" in said
    assert "Rewards: red (no unit); small (-kB; weight -2)" in said
    assert "Held out: blue (no unit)" in said
    assert "Method: static (Raw, Static)" in said
    (rollout,) = [line for line in said if line.startswith("Rollout: ")]
    assert rollout.startswith("Rollout: 4 groups x 4 siblings = 16 samples per rollout")
    assert "Evaluation: every 2 rollouts, 6 samples of held-out prompts" in said
    assert len(said) == len(set(said))
    trainer.close()


@pytest.mark.parametrize("script", [str(ROOT / "scripts" / "train_sd.py"), "/a/notebook.py"])
def test_the_next_commands_can_be_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(sys, "argv", [script])
    made = settings(tmp_path / "a run")
    evaluate, export = map(shlex.split, commands(made))
    folder = made.output_dir
    options = ["--run", folder, "--checkpoints", "base,latest"]
    assert evaluate == [*shlex.split(program.words("evaluate")), *options]
    options = ["--run", folder, "--output", f"{folder}/exported"]
    assert export == [*shlex.split(program.words("export")), *options]


def test_without_held_out_prompts_only_the_export_can_be_copied(tmp_path: Path) -> None:
    made = settings(tmp_path / "run", prompts={"train": "tiny"})
    (export,) = commands(made)
    assert " export --run " in export
