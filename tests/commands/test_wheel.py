"""The wheel, installed into an empty folder and used from another one, without this checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moa_diffusion import __version__
from moa_diffusion.commands import COMMANDS
from moa_diffusion.storage.log import read_metrics
from waiting import HANG

ROOT = Path(__file__).parents[2]
SMALL = (
    "--trainer.steps 1 --trainer.groups 2 --trainer.group_size 2 --trainer.updates 1 "
    "--trainer.sample_batch 4 --trainer.micro_batch 4 --evaluation.prompts 2 --evaluation.steps 2 "
    "--evaluation.images_per_prompt 2 --evaluation.pictures 0 --sampling.steps 2 "
    "--sampling.window 1 --log.trackers [] --evaluation.rewards.ocr null"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was installed into: packages, and programs in its ``bin``."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "installed"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("moa_diffusion", "rewards", "configs"):
        leave_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=leave_out)
    command = [*(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")]
    command += ["--no-deps", "--no-build-isolation", "--no-index", "--no-compile"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, timeout=HANG)
    return target


def start(installed: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command where only the libraries and the installed folder are to be found."""
    path = os.pathsep.join([str(installed / "bin"), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, "-P", *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed), "PATH": path},
        capture_output=True,
        text=True,
        timeout=HANG,
    )


def test_the_program_lists_its_commands_without_a_library(installed: Path, tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.argv[0] = '__main__.py'\n"
        "try: runpy.run_module('moa_diffusion', run_name='__main__')\n"
        "finally: print(sorted({'torch', 'numpy', 'yaml', 'pydantic'} & set(sys.modules)))"
    )
    for options, shown in ((["--help"], COMMANDS), (["recipes"], ["tiny_apex", "lm_tiny_pama"])):
        done = start(installed, tmp_path, "-c", code, *options)
        assert done.returncode == 0, done.stderr
        assert [name for name in shown if not re.search(rf"{name}\s", done.stdout)] == []
        assert done.stdout.endswith("[]\n")
    for command in COMMANDS:
        done = start(installed, tmp_path, "-c", code, command, "--help")
        assert done.returncode == 0, done.stderr
        assert f"usage: python -m moa_diffusion {command} " in done.stdout
        assert "torch" not in done.stdout.splitlines()[-1]
    done = start(installed, tmp_path, str(installed / "bin" / "moa-diffusion"), "--version")
    assert done.stdout.strip() == __version__
    done = start(installed, tmp_path, "-m", "moa_diffusion", "trian-sd")
    assert done.returncode == 2
    assert "invalid choice: 'trian-sd'" in done.stderr


def test_a_recipe_is_copied_and_trains(installed: Path, tmp_path: Path) -> None:
    program = str(installed / "bin" / "moa-diffusion")
    done = start(installed, tmp_path, program, "train-sd")
    assert "Try: moa-diffusion recipes copy tiny_apex\n" in done.stderr
    done = start(installed, tmp_path, program, "recipes", "copy", "tiny_brightness_hack", "mine")
    assert done.returncode == 0, done.stderr
    recipe = "configs/tiny_brightness_hack.yaml"
    assert done.stdout.endswith(f"cd mine && moa-diffusion train-sd --config {recipe}\n")

    folder = tmp_path / "mine"
    launch = ["-m", "accelerate.commands.launch", "-m", "moa_diffusion.train_sd"]
    done = start(installed, folder, *launch, "--config", recipe, *SMALL.split())
    assert done.returncode == 0, done.stderr
    run = "runs/tiny_brightness_hack"
    assert [row["step"] for row in read_metrics(folder / run / "metrics.jsonl")] == [0, 1]
    assert f"  moa-diffusion evaluate --run {run} --checkpoints base,latest\n" in done.stdout
    code = "import moa_diffusion, rewards; print(moa_diffusion.__file__, rewards.__file__)"
    assert str(ROOT) not in start(installed, folder, "-c", code).stdout


def test_the_packages_say_that_they_are_typed(installed: Path) -> None:
    assert [(installed / name / "py.typed").is_file() for name in ("moa_diffusion", "rewards")] == [
        True,
        True,
    ]
