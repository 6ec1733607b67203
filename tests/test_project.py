"""The project's own files agree with each other."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import house
import moa_diffusion
from waiting import python

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(PYPROJECT)["project"]
SETUP = tomllib.loads(PYPROJECT)["tool"]["setuptools"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def normal(name: str) -> str:
    """A distribution's name as the index spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def direct_dependencies() -> set[str]:
    extras = PROJECT["optional-dependencies"].values()
    listed = [*PROJECT["dependencies"], *(item for extra in extras for item in extra)]
    return {normal(re.split(r"[\[<>=!~; ]", item)[0]) for item in listed} - {"moa-diffusion"}


def pins() -> list[str]:
    return [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]


def test_every_direct_dependency_is_pinned() -> None:
    assert direct_dependencies() <= {normal(pin.partition("==")[0]) for pin in pins()}


def test_constraints_are_portable_pins() -> None:
    malformed = [pin for pin in pins() if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)]
    assert malformed == []  # no address, no path, no local build such as `+cpu`
    assert "://" not in CONSTRAINTS
    cuda = [pin for pin in pins() if re.match(r"nvidia|cuda|triton", pin)]
    assert cuda == []  # Linux only; torch pins them


def test_every_bound_has_a_reason() -> None:
    bounds = [line for line in PYPROJECT.splitlines() if re.search(r'"[^"]*[<>=!~]=?[\d.]+', line)]
    assert len(bounds) > 5
    assert [line for line in bounds if not re.search(r"#\s*\w", line)] == []


def test_every_package_is_installed() -> None:
    """They are listed by name, since the recipes are installed as one and lie elsewhere."""
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ("moa_diffusion", "rewards")
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert {*SETUP["packages"]} == {*folders, "moa_diffusion.recipes"}


def test_the_version_is_that_of_the_newest_entry() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    version, date = re.search(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", changes, re.M).groups()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert version == moa_diffusion.__version__ == citation["version"]
    assert date == str(citation["date-released"])


def test_runs_and_the_environment_are_ignored_by_git() -> None:
    assert {"runs/", "exported/", ".venv"} <= set((ROOT / ".gitignore").read_text().splitlines())


def test_scripts_import_the_package_rewards_and_not_the_script_of_that_name() -> None:
    code = "import rewards.base as b, rewards as r; print(r.RewardHead, b.__name__, r.__file__)"
    done = subprocess.run(
        [python(), "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "rewards.base.RewardHead" in done.stdout
    assert done.stdout.strip().endswith("__init__.py")


def test_the_packages_load_no_heavy_library() -> None:
    heavy = ("diffusers", "transformers", "peft", "torchjd", "matplotlib")
    code = f"import sys, moa_diffusion, rewards; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_package_alone_loads_not_even_torch() -> None:
    """What has only to be told of a wrong option should not wait for it."""
    code = "import sys, moa_diffusion; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_and_has_a_main(script: Path) -> None:
    source = script.read_text()
    body = ast.parse(source).body
    names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    names += [one.name for node in body if isinstance(node, ast.ImportFrom) for one in node.names]
    assert "main" in names
    assert len(source.splitlines()) <= 100


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_opens_with_a_comment(config: Path) -> None:
    assert config.read_text().startswith("#")


def test_no_function_that_returns_nothing_says_that_it_returns_something() -> None:
    """A docstring that begins with "Return" stands in a function that hands something back."""
    liars = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("moa_diffusion", "rewards", "scripts")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and isinstance(node.returns, ast.Constant)
        and node.returns.value is None
        and (ast.get_docstring(node) or "").startswith("Return")
    ]
    assert liars == []


def test_the_sizes_of_the_house_are_counted() -> None:
    report = house.report(ROOT)
    assert report["modules in the root of moa_diffusion"] == 6  # three of them programs
    rooms, arrows = report["rooms, arrows: inside rewards"]
    assert 0 < rooms <= arrows < rooms**2
