"""The caches of outputs: what is written is read, and a damaged file is named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from moa_diffusion.evaluation.sample_cache import ImageCache, OutputCache, TextCache
from moa_diffusion.types import ConfigError


@dataclass(frozen=True)
class Settings:
    steps: int = 4


def test_images_are_read_as_they_were_written(tmp_path: Path):
    cache = ImageCache(tmp_path / "images")
    pixels = torch.randint(0, 256, (2, 3, 6, 5), generator=torch.Generator().manual_seed(0))
    for key, image in zip("ab", pixels / 255, strict=True):
        cache.write(key, image)
    assert torch.equal(cache.read(["b", "a"]), (pixels / 255).flip(0))
    assert cache.columns("a", tmp_path) == {"image": "images/a.png", "image_digest": "a"}


@pytest.mark.parametrize("text", ["", " two\nlines ", 'q"\u2028\x00', "\U0001f600"])
def test_texts_are_read_to_the_last_blank(tmp_path: Path, text: str):
    cache = TextCache(tmp_path)
    cache.write("a", text)
    assert cache.read(["a", "a"]) == (text, text)
    assert cache.columns("a", tmp_path) == {"text": text, "text_digest": "a"}


def test_what_is_missing_is_listed_once_in_order(tmp_path: Path):
    cache = TextCache(tmp_path)
    cache.write("b", "x")
    assert cache.missing(["c", "b", "a", "c"]) == ["c", "a"]


@pytest.mark.parametrize(
    ("cache", "content"),
    [(ImageCache, b"\x89PNG\r\n"), (TextCache, b'"half a te'), (TextCache, b"[1]")],
)
def test_a_damaged_file_is_named(tmp_path: Path, cache: type[OutputCache], content: bytes):
    one = cache(tmp_path)
    one.path("a").write_bytes(content)
    with pytest.raises(
        ConfigError, match=rf"{one.noun} `.*a\{one.suffix}` cannot be read: .*again"
    ):
        one.read(["a"])
    with pytest.raises(ConfigError, match="cannot be read"):
        one.read(["lost"])


def test_the_key_holds_all_that_an_output_depends_on():
    given = {"model": "m", "prompt": "p", "seed": 1, "deployment": Settings()}
    others = [{"model": "n"}, {"prompt": "q"}, {"seed": 2}, {"deployment": Settings(steps=5)}]
    keys = {OutputCache.key(**{**given, **other}) for other in [{}, *others]}
    assert len(keys) == 5
