"""The command line of the training scripts is told from PyTorch, which takes longer to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moa_diffusion.config.command_line import read_command_line
from moa_diffusion.types import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("script", "other"), [("train_sd", "lm_tiny"), ("train_lm", "tiny_apex")])
def test_without_options_a_script_says_what_to_do(monkeypatch, capsys, script, other):
    path = ROOT / "scripts" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(SystemExit) as caught:
        read_command_line()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert f"error: config: should name a recipe. Try: {path} --config " in said
    assert "--help" in said
    assert other not in said
    assert ("lm_tiny_pama.yaml" in said) == (script == "train_lm")
    assert "the launcher reports only that it ended" in said


def test_of_several_processes_none_leaves_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["train_sd.py", "--trainer.stepz", "3"])
    error = read_command_line()
    assert isinstance(error, ConfigError)
    assert str(error).startswith("trainer.stepz: unknown key.")


@pytest.mark.parametrize(
    ("options", "status", "shown"),
    [
        (["--help"], 0, "--trainer.*"),
        (["--help", "all"], 0, "--trainer.group_size VALUE"),
        (
            ["--config", "configs/tiny_apex.yaml", "--trainer.stepz", "3"],
            2,
            "trainer.stepz: unknown",
        ),
        (
            ["--print_config", "--rewards.a.weight", "1", "--evaluation.every", "0"],
            0,
            "group_size:",
        ),
    ],
)
def test_help_and_typos_import_neither_pytorch_nor_a_model(options, status, shown):
    """They answer in half a second of CPU time instead of four and a half (measured once)."""
    code = (
        "import runpy, sys; sys.argv[0] = 'train_sd.py'\n"
        "try: runpy.run_path('scripts/train_sd.py', run_name='__main__')\n"
        "finally: print(sorted({'torch', 'numpy', 'rewards.base'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == status, found.stderr
    assert shown in found.stdout + found.stderr
    assert found.stdout.endswith("[]\n")
