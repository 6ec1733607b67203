"""A failure in a user's code shows the user's line, wherever it was called from."""

from __future__ import annotations

import asyncio
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from rewards import RewardBatch, RewardError, create
from rewards.blame import cause_of
from rewards.commands.check_head import Unusable, prepare

USER = """
    import numpy as np
    import torch
    from rewards import RewardError, RewardHead

    def helper(prompt):
        return {"a": 1}[prompt]  # the line

    def batch(images, prompts):
        return [helper(prompt) for prompt in prompts]

    def in_a_library(images, prompts):
        return np.concatenate([np.zeros((2, 2)), np.zeros(3)])  # the line

    async def later(images, prompts):
        return [helper(prompt) for prompt in prompts]

    def one(image, prompt):
        return helper(prompt)

    async def one_later(image, prompt):
        return helper(prompt)

    class Head(RewardHead):
        def score(self, batch):
            return torch.tensor([helper(prompt) for prompt in batch.prompts])

    class Unmade(RewardHead):
        def __init__(self, size=3):
            helper("b")

        def score(self, batch): ...

    def told_by_the_user(images, prompts):
        raise RewardError("no such kite")

    def leaving(images, prompts):
        raise SystemExit(3)  # the line
"""
BATCH = RewardBatch(prompts=["a", "b"], images=torch.zeros(2, 3, 4, 4))


@pytest.fixture
def user(tmp_path: Path) -> str:
    file = tmp_path / "my_rewards.py"
    file.write_text(textwrap.dedent(USER))
    return str(file)


def line(user: str, text: str) -> str:
    lines = Path(user).read_text().splitlines()
    number = next(i for i, found in enumerate(lines, start=1) if text in found)
    return f"({user}, line {number}, in "


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("batch", {}),
        ("later", {}),
        ("one", {"per_image": True}),
        ("one_later", {"per_image": True}),
        ("Head", {}),
    ],
)
def test_the_innermost_line_of_the_user_is_told(user: str, name: str, options: dict) -> None:
    head = create("mine", f"{user}:{name}", **options)
    try:
        with pytest.raises(RewardError) as caught:
            head(BATCH)
    finally:
        head.close()
    assert "KeyError: 'b' " + line(user, '{"a": 1}[prompt]') + "helper: return" in str(caught.value)


def test_a_failure_inside_a_library_shows_who_called_it(user: str) -> None:
    with pytest.raises(RewardError) as caught:
        create("mine", f"{user}:in_a_library")(BATCH)
    assert line(user, "np.concatenate") + "in_a_library: return np.concat" in str(caught.value)


def test_a_class_that_cannot_be_made_shows_its_line(user: str) -> None:
    with pytest.raises(Unusable, match=r"KeyError\('b'\) \(") as caught:
        prepare("mine", {}, f"{user}:Unmade")
    assert line(user, '{"a": 1}[prompt]') in str(caught.value)


def test_a_file_that_fails_when_it_is_imported_shows_its_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import json\n\nLIMIT = json.loads('')['limit']\n")
    with pytest.raises(ValueError, match="JSONDecodeError") as caught:
        create("mine", f"{file}:f")
    assert f"({file}, line 3, in <module>: LIMIT = json.loads" in str(caught.value)


def test_what_the_user_says_himself_stays_as_it_is(user: str) -> None:
    with pytest.raises(RewardError) as caught:
        create("mine", f"{user}:told_by_the_user")(BATCH)
    assert caught.value.cause == "no such kite"


def test_a_failure_that_passed_no_code_of_a_user_names_no_line() -> None:
    with pytest.raises(RewardError) as caught:
        create("sharpness")(RewardBatch(prompts=["a"], images=torch.zeros(1, 3, 2, 2)))
    assert "line" not in str(caught.value)


def test_an_exception_without_words_and_one_that_was_never_raised() -> None:
    assert cause_of(asyncio.CancelledError()) == "CancelledError"
    assert cause_of(ValueError("x")) == "ValueError: x"


def test_code_that_stands_in_no_file_has_no_line() -> None:
    try:
        exec(compile("1 / 0", "<typed>", "exec"))
    except ZeroDivisionError as error:
        assert error.__traceback__ is not None
        typed = error.with_traceback(error.__traceback__.tb_next)
    assert cause_of(typed) == "ZeroDivisionError: division by zero"
    assert sys.exc_info() == (None, None, None)
