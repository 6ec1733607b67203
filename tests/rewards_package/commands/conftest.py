"""A folder of images with prompts, and a head of the user's own."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images 1.png to 12.png of grey 20 i in two sizes, a text file, and prompts."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(1, 13):
        size = (10, 8) if number % 3 else (8, 8)
        Image.new("RGB", size, (20 * number,) * 3).save(images / f"{number}.png")
    (images / "notes.txt").write_text("not an image")
    lines = [f'prompt {number}, "ü"' for number in range(1, 13)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture
def grey(tmp_path: Path) -> str:
    """Import path of a head of the user's own: the grey level, with columns; fails at 200."""
    code = """
        import torch
        from rewards import RewardHead, Scores

        class Grey(RewardHead):
            unit = "level"

            def __init__(self, limit: float = 300.0) -> None:
                self.limit = limit

            def score(self, batch):
                values = batch.require_images().mean(dim=(1, 2, 3)).mul(255).round()
                assert (values < self.limit).all(), "too bright"
                first = [prompt.split()[1].strip(",") for prompt in batch.prompts]
                mixed = [{"size": list(batch.images.shape[2:])} for _ in first]
                values[[word == "2" for word in first]] = torch.nan
                return Scores(values=values, extra={"word": first, "mixed": mixed})

            def provenance(self):
                return {"weights": "none at all"}
    """
    (tmp_path / "grey.py").write_text(textwrap.dedent(code))
    return f"{tmp_path / 'grey.py'}:Grey"
