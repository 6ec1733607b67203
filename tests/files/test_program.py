"""What is printed to be typed names the way that the process was started by."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from moa_diffusion.files import program

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_sd.py"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program.shutil, "which", lambda name: f"/bin/{name}")


def test_a_script_names_the_scripts_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: None
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    monkeypatch.chdir(ROOT)
    assert program.name() == "train_sd.py"
    assert program.words("evaluate") == "python scripts/evaluate.py"
    assert program.words("rewards") == "python scripts/heads.py"
    assert program.words("recipes") == "moa-diffusion recipes"  # which has no script
    text = "moa-diffusion evaluate --run a; accelerate launch -m moa_diffusion evaluate --run a"
    assert program.described(text, "evaluate") == (
        "python scripts/evaluate.py --run a; accelerate launch scripts/evaluate.py --run a"
    )
    assert program.training("train-sd") == [sys.executable, str(SCRIPT)]
    monkeypatch.chdir(tmp_path)
    shortest = min(os.path.relpath(ROOT / "scripts"), str(ROOT / "scripts"), key=len)
    assert program.words("export") == f"python {shortest}/export.py"


@pytest.mark.parametrize(
    "started", ["/venv/bin/moa-diffusion train-sd", "/a/notebook.py", f"{program.MODULE}.train_sd"]
)
def test_anything_else_names_the_program(
    monkeypatch: pytest.MonkeyPatch, installed: None, started: str
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert program.words("evaluate") == "moa-diffusion evaluate"
    assert program.described("moa-diffusion plan", "plan") == "moa-diffusion plan"
    monkeypatch.setattr(program.shutil, "which", lambda name: None)
    assert program.words("evaluate") == "python -m moa_diffusion evaluate"


@pytest.mark.parametrize(
    ("first", "options"), [("/venv/bin", ["-P", "-m"]), ("", ["-m"]), (os.getcwd(), ["-m"])]
)
def test_a_training_looks_for_modules_where_its_parent_does(
    monkeypatch: pytest.MonkeyPatch, first: str, options: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moa-diffusion compare"])
    monkeypatch.setattr(sys, "path", [first, *sys.path])
    assert program.training("train-lm") == [sys.executable, *options, "moa_diffusion.train_lm"]


def test_a_checkout_has_its_recipes_beside_the_package() -> None:
    assert program.recipes() == ROOT / "configs"
