"""What tells that a user's code has changed: module, name and digest of its file."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rewards import FunctionHead
from rewards.heads.simple import Sharpness
from rewards.source import FILE_MODULE, UNKNOWN, source_of, source_of_class
from rewards.targets import import_object

CODE = """
from rewards.heads.simple import Sharpness

def red(images, prompts): ...

class Callable:
    def __call__(self, images, prompts): ...

thing = Callable()

class Mine(Sharpness): ...
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (path := tmp_path / "mine.py").write_text(CODE)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def named(file: Path, name: str) -> Any:
    return import_object(f"{file}:{name}", "reward")


def test_a_function_is_its_files_stem_its_name_and_its_files_digest(file: Path) -> None:
    function = named(file, "red")
    assert function.__module__.startswith(FILE_MODULE)  # which holds the place
    expected = {"module": "mine", "name": "red", "source_sha256": digest(file)}
    assert source_of(function) == expected
    assert source_of(partial(partial(function), prompts=())) == expected


def test_an_object_that_can_be_called_is_its_class(file: Path) -> None:
    assert source_of(named(file, "thing"))["name"] == "Callable"


def test_what_was_typed_into_a_prompt_has_no_digest() -> None:
    scope: dict[str, Any] = {"__name__": "typed_into_a_prompt"}
    exec("def typed(images): ...", scope)
    assert source_of(scope["typed"])["source_sha256"] == UNKNOWN


def test_a_head_of_the_package_is_its_version_and_one_built_on_it_its_own_file(file: Path) -> None:
    assert source_of_class(Sharpness) == {}
    assert source_of_class(FunctionHead) == {}
    assert source_of_class(named(file, "Mine"))["source_sha256"] == digest(file)


def test_the_digest_of_a_class_covers_its_bases_files(tmp_path: Path, file: Path) -> None:
    base = named(file, "Mine")
    (other := tmp_path / "other.py").write_text(
        "def make(base):\n    class Child(base): ...\n    return Child"
    )
    child = named(other, "make")(base)
    found = source_of_class(child)
    assert (found["module"], found["name"]) == ("other", "make.<locals>.Child")
    assert found["source_sha256"] not in {digest(file), digest(other)}
    same = hashlib.sha256(
        repr(sorted({("mine", digest(file)), ("other", digest(other))})).encode()
    ).hexdigest()
    assert found["source_sha256"] == same
