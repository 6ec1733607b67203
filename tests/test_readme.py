"""The README is true: its example runs, its files exist, its options are options."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from architecture import PAGE, page
from moa_diffusion import assembly, config
from waiting import HANG

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    assert found, language
    return found[1]


def test_the_custom_reward_trains(tmp_path: Path) -> None:
    example = block("python")
    (tmp_path / "my_rewards.py").write_text(example)
    (tmp_path / "prompts.txt").write_text('a red sign that says "GO"\na blue square\n')
    settings = {
        "policy": {"name": "toy"},
        "sampling": {"steps": 2},
        "prompts": {"train": "prompts.txt"},
        "trainer": {"steps": 1, "groups": 2, "group_size": 4, "updates": 1},
        "evaluation": {"every": 0},
        "rewards": {"redness": yaml.safe_load(block("yaml"))["rewards"]["redness"]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    script = str(ROOT / "scripts" / "train_sd.py")
    done = subprocess.run(
        [sys.executable, script, "--config", "run.yaml", "--output_dir", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    assert '"applies/redness": 0.5' in (tmp_path / "out" / "metrics.jsonl").read_text()


def test_the_custom_reward_is_ten_lines() -> None:
    assert len([line for line in block("python").splitlines() if line.strip()]) <= 10


def test_named_options_are_options() -> None:
    options = set(re.findall(r"--((?:[a-z]+\.)+[a-z_]+)", README))
    assert options
    known = set(assembly.flat(config.Config()))
    assert {option for option in options if not option.startswith("rewards.")} <= known


PARTS = ("moa_diffusion", "rewards", "configs", "scripts", "tests", "docs")


def test_the_file_tree_lists_every_room_and_script_and_nothing_else() -> None:
    tree = README.split("## Files")[1].split("## ")[0]
    rooms = {
        f"{path.parent.name}/"
        for package in ("moa_diffusion", "rewards")
        for path in (ROOT / package).glob("*/__init__.py")
    }
    scripts = {path.name for path in (ROOT / "scripts").glob("*.py")}
    flat = {path.name for path in (ROOT / "moa_diffusion").glob("*.py")}
    folders = {f"{name}/" for name in (*PARTS, "dev")}
    named = set(re.findall(r"[a-z_0-9]+(?:/|\.py)", tree))
    assert (rooms | scripts) - named == set()
    assert named - rooms - scripts - flat - folders == set()


def test_the_tree_of_every_module_is_fresh() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert page(written) == written, "run python scripts/dev/architecture.py"


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_linked_files_exist(link: str) -> None:
    assert (ROOT / link).is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"(?:configs|scripts)/\w+\.\w+", README))))
def test_named_files_exist(name: str) -> None:
    assert (ROOT / name).is_file()


def test_every_metric_has_a_row() -> None:
    table = README.split("## Metrics")[1].split("## ")[0]
    package = ROOT / "moa_diffusion"
    source = "".join(
        path.read_text(encoding="utf-8")
        for room in ("", "objectives/", "training/", "monitoring/", "storage/")
        for path in package.glob(f"{room}*.py")
    )
    kinds = (
        "policy|alarm|correlation|cosine|eval_[a-z]+|reward_[a-z]+|mopo_[a-z]+|shortfall|gradient"
    )
    written = {name.split("/")[0] + "/" for name in re.findall(rf'"((?:{kinds})/[^"]*)"', source)}
    written |= set(re.findall(r'"(policy/[a-z_]+)"', source))
    columns = set(re.findall(r'"(apex_[a-z]+)"', source)) | {"weight", "share", "applies"}
    columns |= {
        "image",
        "eval_image",
        "text",
        "eval_text",
        "zero_variance",
        "conflict_advantages",
        "conflict_gradients",
    }
    for name in written | {f"{column}/" for column in columns}:
        assert name in table, name
