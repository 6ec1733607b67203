"""A model's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_files import write


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "model", ["config.json", "model.safetensors"])
