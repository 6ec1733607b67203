"""Thumbnails: how small they become, and what each is kept for."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from moa_diffusion.report.page import thumbnails
from moa_diffusion.report.page.page import write_report
from moa_diffusion.types import ConfigError
from report_pages import Page, random_values, short_summary, table_of


def test_thumbnails_shrink_until_the_page_fits(tmp_path: Path):
    table = table_of(random_values(3, 1, 2, 2), tmp_path, side=256)
    summary = short_summary(table)
    free = write_report(table, summary, {}, tmp_path / "free.html").stat().st_size
    sides = []
    small = Page(tmp_path / "free.html").json("thumbnails")
    least = free - len(json.dumps(small, separators=(",", ":"))) + len("[]")
    for room in (1_500_000, 50_000, 7_500):
        path = write_report(table, summary, {}, tmp_path / "page.html", budget=least + room)
        assert path.stat().st_size <= least + room
        small = Page(path).json("thumbnails")[0]
        with Image.open(io.BytesIO(base64.b64decode(small))) as image:
            sides.append(image.width)
    assert sides == sorted(sides, reverse=True)
    assert sides[0] == 256
    assert sides[-1] < 128
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"budget: .*12 images of 64 pixels\. Found 100\. Eval"):
        write_report(table, summary, {}, path, budget=least + 100)
    with pytest.raises(ConfigError, match="Found 0"):
        write_report(table, summary, {}, path, budget=1000)
    assert path.read_bytes() == before


def test_a_few_large_images_among_small_ones_still_fit(tmp_path: Path):
    """The estimate looks at some images; here it sees only the small ones."""
    paths = []
    for i in range(2 * thumbnails.TRIED):
        paths.append(tmp_path / f"{i}.png")
        Image.effect_noise((320, 320) if i % 2 else (16, 16), 90).save(paths[-1])
    room = 60_000
    found = thumbnails.thumbnails(paths, room)
    assert len(json.dumps(found, separators=(",", ":"))) <= room


def test_an_image_that_is_shown_twice_is_kept_once(tmp_path: Path):
    table = table_of(random_values(2, 1, 3, 2), tmp_path)
    same = dataclasses.replace(table, images=(table.images[0], table.images[0]))
    page = Page(write_report(same, short_summary(same), {}, tmp_path / "report.html"))
    assert len(page.json("thumbnails")) == 6
    data = page.json("data")
    assert data["images"][0] == data["images"][1]


def test_a_missing_image_is_named(tmp_path: Path):
    table = table_of(random_values(2, 1, 2, 1), tmp_path)
    table.images[1][1][0].unlink()
    with pytest.raises(ConfigError, match=r"1-1-0 #\.png` should be an image .*Evaluate again"):
        write_report(table, short_summary(table), {}, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_a_large_evaluation_of_noise_keeps_its_budget(tmp_path: Path):
    """A quarter of 64 prompts x 6 models x 4 seeds, the hardest to compress.

    So is its share of the usual 18 MB beside the plotting library. Of 256 pixels: larger images
    of noise are greyer, and so smaller, as thumbnails.
    """
    one = table_of(random_values(1, 1, 8, 1), tmp_path, side=256)

    def link(e: int, p: int, s: int) -> Path:
        path = tmp_path / f"{e}-{p}-{s}.png"
        os.link(one.images[0][(e + p + s) % 8][0], path)
        return path

    values = random_values(6, 4, 16, 4)
    images = tuple(
        tuple(tuple(link(e, p, s) for s in range(4)) for p in range(16)) for e in range(6)
    )
    table = dataclasses.replace(table_of(values, None), texts=None, images=images)
    page = tmp_path / "report.html"
    path = write_report(table, short_summary(table), {}, page, budget=8_000_000)
    assert path.stat().st_size < 8_000_000
    small = Page(path).json("thumbnails")
    assert len(small) == 384
    with Image.open(io.BytesIO(base64.b64decode(small[-1]))) as image:
        assert image.width >= 96, "they should still be worth looking at"
