"""Prompt files to prompts and requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moa_diffusion import assembly
from moa_diffusion.config import Config, from_dict


def configured(folder: Path, files: dict[str, list[str]], **evaluation: Any) -> Config:
    """Held-out prompts in these files."""
    for name, prompts in files.items():
        (folder / name).write_text("\n".join(prompts) + "\n")
    heldout = [str(folder / name) for name in files]
    return from_dict(
        {
            "rewards": {"jpeg_compressibility": {}},
            "prompts": {"heldout": heldout},
            "evaluation": evaluation,
        }
    )


def test_files_are_read_in_turn_and_cut_off(tmp_path: Path):
    files = {"a.txt": ["a red sign", "a blue sign"], "b.txt": ["one", "two", "three"]}
    settings = configured(tmp_path, files, prompts=4)
    texts = [prompt.text for prompt in assembly.heldout_prompts(settings)]
    assert texts == ["a red sign", "one", "a blue sign", "two"]


@pytest.mark.parametrize("every", [0, 5])
def test_prompts_do_not_depend_on_how_often_a_run_evaluates(tmp_path: Path, every: int):
    settings = configured(tmp_path, {"a.txt": ["x", "y"]}, every=every, images_per_prompt=3)
    assert [prompt.text for prompt in assembly.heldout_prompts(settings)] == ["x", "y"]
    requests = assembly.heldout_requests(settings)
    assert len(requests) == (6 if every else 0)


def test_requests_are_siblings_of_the_prompts_with_seeds_of_their_own(tmp_path: Path):
    settings = configured(tmp_path, {"a.txt": ["x", "y"]}, every=1, images_per_prompt=2)
    requests = assembly.heldout_requests(settings)
    assert [(r.prompt, r.group, r.sibling) for r in requests] == [
        ("x", 0, 0),
        ("y", 1, 0),
        ("x", 0, 1),
        ("y", 1, 1),
    ]
    assert len({request.seed for request in requests}) == 4


def test_a_run_without_held_out_prompts_has_none():
    settings = from_dict({"rewards": {"jpeg_compressibility": {}}, "evaluation": {"every": 0}})
    assert assembly.heldout_prompts(settings) == ()
    assert assembly.heldout_requests(settings) == ()
