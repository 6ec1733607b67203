"""Paths: names before and commas between, and what can only be a place."""

from __future__ import annotations

from pathlib import Path

import pytest

from moa_diffusion.evaluation.candidates import named_folders
from moa_diffusion.files.paths import expanded, names_a_place, split_list, split_name
from moa_diffusion.types import ConfigError

pytestmark = pytest.mark.usefixtures("home")


# ---------------------------------------------------------------------- names and commas


def test_a_folder_that_exists_is_not_split(home: Path):
    for folder in ("runs/lr=1e-4,seed=0", "a=b", "b", "c", str(home / "d=e")):
        Path(folder).mkdir(parents=True)
    assert named_folders("--run", ["runs/lr=1e-4,seed=0", "x=c", "~/d=e", "y=~/d=e"]) == {
        "lr=1e-4,seed=0": Path("runs/lr=1e-4,seed=0"),
        "x": Path("c"),
        "d=e": home / "d=e",
        "y": home / "d=e",
    }
    assert split_name("x=runs/lr=1e-4,seed=0") == ("x", Path("runs/lr=1e-4,seed=0"))
    assert split_name("runs/lr=1") == (None, Path("runs/lr=1"))  # no name has a separator
    with pytest.raises(ConfigError, match=r"--run: .*Found both `a=b` and `b`: `./a=b` means"):
        named_folders("--run", ["a=b"])
    assert split_name("./a=b") == (None, Path("a=b"))
    assert split_name("a=./b") == ("a", Path("b"))
    with pytest.raises(ConfigError, match=r"Found none at `runs/lr=2`"):
        named_folders("--run", ["runs/lr=2"])
    with pytest.raises(ConfigError, match=r"--run.*surrogate"):
        named_folders("--run", ["caf\udce9"])


def test_a_list_keeps_names_that_have_commas():
    known = {"a", "b", "a,b", "lr=1,seed=0"}.__contains__
    assert split_list("lr=1,seed=0, b", known) == ["lr=1,seed=0", "b"]
    assert split_list("a,b", known) == ["a,b"]
    assert split_list("b,a", known) == ["b", "a"]
    assert split_list("x,y", known) == ["x", "y"]


def test_what_can_only_be_a_place():
    places = ("/nope", "./nope", "../nope", "~/nope", "a/b/c", "C:\\models")
    assert all(names_a_place(text) for text in places)
    assert not any(names_a_place(text) for text in ("gpt2", "owner/name", "owner/na.me"))
    assert expanded("a/~") == Path("a/~")
