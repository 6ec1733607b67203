"""The README is short and whole; what it says is tested with the other pages."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

PARTS = ("moa_diffusion", "rewards", "configs", "scripts", "dev", "tests", "docs")


def test_its_size_is_that_of_one_reading() -> None:
    assert 12_000 <= len(README.encode()) <= 15_000


def test_the_custom_reward_and_the_first_configuration_have_ten_lines_each() -> None:
    for language in ("python", "yaml"):
        longest = max(re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL), key=len)
        assert len([line for line in longest.splitlines() if line.strip()]) <= 10


def test_the_tree_lists_every_room_and_script_and_nothing_else() -> None:
    tree = README.split("The rooms of the code:")[1]
    rooms = {
        f"{path.parent.name}/"
        for package in ("moa_diffusion", "rewards")
        for path in (ROOT / package).glob("*/__init__.py")
    }
    scripts = {path.name for path in (ROOT / "scripts").glob("*.py")}
    flat = {path.name for path in (ROOT / "moa_diffusion").glob("*.py")}
    folders = {f"{name}/" for name in PARTS}
    named = set(re.findall(r"[a-z_0-9]+(?:/|\.py)", tree))
    assert (rooms | scripts) - named == set()
    assert named - rooms - scripts - flat - folders == set()
    assert len([line for line in tree.splitlines() if line.strip()]) <= 15
