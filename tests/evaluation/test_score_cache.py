"""The cache of scores: a version of a head has a file of its own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from moa_diffusion import assembly
from moa_diffusion.data.prompt_files import Prompt
from moa_diffusion.evaluation import score_cache
from moa_diffusion.evaluation.score_cache import HeadVersion, ScoreCache
from moa_diffusion.scoring import create_head
from moa_diffusion.types import ConfigError
from rewards.score_store import Score

HEAD = create_head("sharpness")
VERSION = HeadVersion.of("sharp", HEAD, {})


def test_scores_are_read_as_they_were_added(tmp_path: Path):
    cache = ScoreCache(tmp_path / "scores", VERSION)
    assert cache.read() == {}
    cache.add({"a": Score(value=0.1 + 0.2, extra={"text": "\u00e9"})})
    cache.add({"b": Score(value=math.nan, extra={})})
    scores = ScoreCache(tmp_path / "scores", VERSION).read()
    assert scores["a"] == Score(value=0.1 + 0.2, extra={"text": "\u00e9"})
    assert math.isnan(scores["b"].value)


def test_a_damaged_file_is_named(tmp_path: Path):
    cache = ScoreCache(tmp_path, VERSION)
    cache.path.write_text("not scores")
    with pytest.raises(ConfigError, match=r"sqlite` holds no scores that can be read .* Delete it"):
        cache.read()


def test_a_score_depends_on_the_metadata_of_the_prompt():
    one, two = Prompt(text="p", metadata={"n": 1}), Prompt(text="p", metadata={"n": 2})
    assert ScoreCache.key("sample", one) != ScoreCache.key("sample", two)


def test_options_that_matter_are_part_of_the_version(tmp_path: Path):
    other = HeadVersion.of("sharp", HEAD, {"option": 2})
    assert ScoreCache(tmp_path, VERSION).path != ScoreCache(tmp_path, other).path


def test_code_in_no_file_cannot_be_told_apart():
    space: dict[str, object] = {}
    exec("def unknown(images, prompts):\n    return [0.0] * len(prompts)", space)
    head = score_cache.FunctionHead(space["unknown"])
    with pytest.raises(ConfigError, match="should be code in a file"):
        score_cache.HeadVersion.of("unknown", head, {})
    assembly.check_requirements("rewards", {"unknown": head}, [Prompt(text="a")])
