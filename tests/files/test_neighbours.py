"""A user's own module named like our package `rewards` is told, whatever is imported first."""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from moa_diffusion.files.neighbours import check_neighbour
from waiting import python

ROOT = Path(__file__).parents[2]
FILE, PACKAGE, FOLDER = "rewards.py", "rewards/__init__.py", "rewards/mine.py"


def run(
    script: Path, code: str, *, path: str = str(ROOT), program: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    script.write_text(code)
    return subprocess.run(
        [program, str(script)],
        cwd=script.parent,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("own", [FILE, PACKAGE])
@pytest.mark.parametrize(
    "code",
    [
        "import moa_diffusion",
        "from moa_diffusion import assembly",
        "import moa_diffusion.types",
        "import rewards, moa_diffusion",
    ],
)
def test_the_message_names_both_and_the_way_out(tmp_path: Path, own: str, code: str) -> None:
    (tmp_path / own).parent.mkdir(exist_ok=True)
    (tmp_path / own).write_text("def mine(images, prompts): ...\n")
    done = run(tmp_path / "my_script.py", code)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: The name `rewards` should mean the package")
    assert str(ROOT / "rewards") in last
    assert str(tmp_path / own) in last
    assert "Rename that file or folder (to my_rewards, say), or run from elsewhere" in last


def test_a_folder_of_reward_files_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / FOLDER).parent.mkdir()
    (tmp_path / FOLDER).write_text("")
    code = "import moa_diffusion, rewards; rewards.create"
    done = run(tmp_path / "my_script.py", code, program=python())
    assert done.returncode == 0, done.stderr


def test_the_script_of_that_name_makes_way() -> None:
    """scripts/ comes first on the path of every script in it."""
    code = "import sys; sys.path.insert(0, 'scripts'); import moa_diffusion, rewards"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(rewards.__file__)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()) == ROOT / "rewards" / "__init__.py"


@pytest.mark.parametrize("user", [False, True])
def test_a_copy_of_the_scripts_makes_way_too(tmp_path: Path, user: bool) -> None:
    """As beside an installed package; what comes after the copy on the path still counts."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "mine").mkdir()
    shutil.copy(ROOT / "scripts" / "rewards.py", tmp_path / "scripts")
    if user:
        (tmp_path / "mine" / "rewards.py").write_text("def mine(images, prompts): ...\n")
    done = run(
        tmp_path / "scripts" / "train.py",
        "import moa_diffusion, rewards; print(rewards.__file__)",
        path=os.pathsep.join([str(tmp_path / "mine"), str(ROOT)]),
    )
    if user:
        last = done.stderr.splitlines()[-1]
        assert last.startswith("ImportError: The name `rewards` should mean the package")
        assert f"Python finds it first as `{tmp_path / 'mine' / 'rewards.py'}`" in last
    else:
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()) == ROOT / "rewards" / "__init__.py"


def test_a_folder_that_hides_an_installed_package_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An editable install is looked up after the path, where the folder is a namespace package."""
    spec = importlib.machinery.ModuleSpec("rewards", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    module = types.ModuleType("rewards")
    module.__spec__ = spec
    monkeypatch.setitem(sys.modules, "rewards", module)
    with pytest.raises(ImportError, match=f"imported as `{tmp_path}`"):
        check_neighbour("rewards")
