"""Sizes of pipelines, from files or as published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moa_diffusion import tiny
from moa_diffusion.planning.shapes import published_shape, read_shape
from moa_diffusion.types import ConfigError

MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
LARGE = "stabilityai/stable-diffusion-3.5-large"


def test_a_folder_is_read() -> None:
    shape = read_shape(str(tiny.PIPELINE_PATH))
    assert shape.transformer["num_layers"] == 4
    assert list(shape.encoders) == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    assert shape.clip_tokens == 16
    assert shape.latent(64) == (16, 8, 8)


def test_published_sizes_are_those_of_the_model_cards() -> None:
    medium, large = published_shape(MEDIUM), published_shape(LARGE)
    assert (medium.transformer["num_layers"], large.transformer["num_layers"]) == (24, 38)
    assert medium.transformer["dual_attention_layers"] == list(range(13))
    assert large.transformer["dual_attention_layers"] == []
    assert medium.latent(1024) == large.latent(1024) == (16, 128, 128)
    assert medium.encoders == large.encoders
    with pytest.raises(ConfigError, match=r"sampling\.resolution"):
        medium.latent(515)


def test_a_model_that_is_not_at_hand_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"policy\.path.*medium.*Found 'someone/model'"):
        read_shape("someone/model")


def test_a_pipeline_may_lack_an_encoder(tmp_path: Path) -> None:
    shutil.copytree(tiny.PIPELINE_PATH, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "text_encoder_3")
    assert list(read_shape(str(tmp_path / "model")).encoders) == ["text_encoder", "text_encoder_2"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps({})[:1])
    with pytest.raises(ConfigError, match=r"policy\.path: .*config\.json should be JSON"):
        read_shape(str(tmp_path))
