"""YAML files: what is read as it was written, and what is no configuration."""

from __future__ import annotations

import pytest

from config_files import loaded
from moa_diffusion.config import load
from moa_diffusion.types import ConfigError


def test_files_that_are_no_mapping(tmp_path):
    with pytest.raises(ConfigError, match="Found no file"):
        load(tmp_path / "no.yaml")
    for text in ("- a\n- b\n", "just text"):
        with pytest.raises(ConfigError, match="should hold a mapping"):
            loaded(tmp_path, text)
    with pytest.raises(ConfigError, match="should be YAML"):
        loaded(tmp_path, "a: [1\n")


def test_a_key_given_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"`steps` stands here twice(.|\n)*line 3"):
        loaded(tmp_path, "trainer:\n  steps: 1\n  steps: 2\n")


@pytest.mark.parametrize("number", ["1e-5", "1e-05", "0.00001"])
def test_numbers_in_scientific_notation(tmp_path, number):
    text = f"rewards: {{red: {{weight: {number}}}}}\nevaluation: {{every: 0}}\n"
    config = loaded(tmp_path, text + f"loss: {{clip_range: {number}}}\n")
    assert config.loss.clip_range == 1e-5
    assert config.rewards["red"]["weight"] == 1e-5
    assert loaded(tmp_path, text, "--loss.clip_range", number).loss.clip_range == 1e-5
