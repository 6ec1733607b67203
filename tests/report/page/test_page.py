"""report.html without a browser: what stands in the file, and how large it becomes."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html.parser
import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy
import pytest
from PIL import Image

from moa_diffusion.report.page import cards as headline
from moa_diffusion.report.page import thumbnails
from moa_diffusion.report.page.page import PACKAGES, versions, write_report
from moa_diffusion.report.page.runs import POINTS, read_training
from moa_diffusion.report.summary import Summary, summarise
from moa_diffusion.report.table import Column, Table
from moa_diffusion.types import ConfigError

EVIL = '</script><script>window.stolen = 1</script><img src=x onerror="window.stolen = 1">'


def column(label: str, step: int | None = None) -> Column:
    series = label.partition("/")[0] if "/" in label else ""
    return Column(
        label=label,
        series=series,
        step=step,
        weights=None,
        model_digest="m" * 8,
        adapter_digest="" if label == "base" else "a" * 8,
    )


def table_of(
    values: numpy.ndarray, folder: Path | None, *, prompts: tuple[str, ...] = (), side: int = 40
) -> Table:
    """``values [E, K, P, S]``; pictures of noise in a folder, or texts without one."""
    models, rewards, count, seeds = values.shape
    random = numpy.random.default_rng(0)

    def draw(e: int, p: int, s: int) -> Path:
        assert folder is not None
        path = folder / "images" / f"{e}-{p}-{s} #.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        pixels = random.integers(0, 256, (side, side, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(path)
        return path

    def cells(make: Any) -> Any:
        return tuple(
            tuple(tuple(make(e, p, s) for s in range(seeds)) for p in range(count))
            for e in range(models)
        )

    return Table(
        models=(column("base"), *(column(f"run/step-{e}", e) for e in range(1, models))),
        prompts=prompts or tuple(f"prompt {p}" for p in range(count)),
        seeds=tuple(range(seeds)),
        rewards=tuple(f"reward{k}" for k in range(rewards)),
        values=values,
        images=None if folder is None else cells(draw),
        texts=None if folder is not None else cells(lambda e, p, s: f"text {e} {p} {s} {EVIL}"),
        units={f"reward{k}": "points" for k in range(rewards)},
        scorers={f"reward{k}": {"version": "1", "digest": "d"} for k in range(rewards)},
        sampler={"steps": 4, "guidance": 1.5},
    )


def random_values(*shape: int) -> numpy.ndarray:
    return numpy.random.default_rng(1).normal(size=shape)


def short_summary(table: Table) -> Summary:
    return summarise(table, resamples=20)


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the texts of scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data

    def json(self, name: str) -> Any:
        return json.loads(next(text for given, text in self.scripts if given.get("id") == name))


# ---------------------------------------------------------------------- one file


def test_it_needs_nothing_beside_it(tmp_path: Path):
    table = table_of(random_values(3, 2, 4, 2), tmp_path, prompts=("a", "b", EVIL, "d"))
    path = write_report(table, short_summary(table), {}, tmp_path / "report.html")
    page = Page(path)
    assert [tag for tag, _ in page.elements].count("script") == 4
    for tag, attributes in page.elements:
        assert "src" not in attributes, f"{tag} loads {attributes['src']}"
        assert not any(name.startswith("on") for name in attributes)
        if tag in ("a", "link"):
            assert re.match("#|data:|$", attributes.get("href") or "")
    assert "url(" not in path.read_text(encoding="utf-8").partition("</style>")[0]

    policy = next(a["content"] for t, a in page.elements if "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    run = [text for attributes, text in page.scripts if "type" not in attributes]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
    assert re.findall(r"'sha256-([^']+)'", policy) == digests
    assert "unsafe" not in policy.partition("script-src")[2]


def test_what_it_shows_is_the_table(tmp_path: Path):
    values = random_values(3, 2, 4, 2)
    values[1, 1, 2, 0] = math.nan
    table = table_of(values, tmp_path / "cache & more")
    summary = short_summary(table)
    target = tmp_path / "out" / "report.html"
    page = Page(write_report(table, summary, {}, target))
    data = page.json("data")
    shown = numpy.array(data["values"], dtype=float)
    numpy.testing.assert_allclose(shown, values, rtol=1e-5)  # six digits are shown
    assert data["values"][1][1][2][0] is None
    assert [model["label"] for model in data["models"]] == ["base", "run/step-1", "run/step-2"]
    small = page.json("thumbnails")
    assert len(small) == len(data["originals"]) == 24
    for e, p, s in ((0, 0, 0), (2, 3, 1)):
        place = data["images"][e][p][s]
        original = target.parent / unquote(data["originals"][place])
        assert original.samefile(table.images[e][p][s])
        with Image.open(io.BytesIO(base64.b64decode(small[place]))) as picture:
            assert (picture.format, picture.size) == ("WEBP", (40, 40))
    assert data["images"][2][3][1] != data["images"][0][0][0]
    assert list(target.parent.iterdir()) == [target], "no partial file is left"


def test_texts_stand_in_the_place_of_pictures(tmp_path: Path):
    table = table_of(random_values(2, 1, 2, 2), None)
    page = Page(write_report(table, short_summary(table), {}, tmp_path / "report.html"))
    data = page.json("data")
    assert data["images"] is None
    assert data["originals"] == page.json("thumbnails") == []
    assert data["texts"][1][0][1] == f"text 1 0 1 {EVIL}"
    assert len(page.scripts) == 4


def test_versions_name_every_package():
    found = versions()
    assert set(found) == set(PACKAGES)
    assert re.match(r"\d+\.\d+", found["torch"])


# ---------------------------------------------------------------------- how large it becomes


def test_thumbnails_shrink_until_the_page_fits(tmp_path: Path):
    table = table_of(random_values(3, 1, 4, 2), tmp_path, side=256)
    summary = short_summary(table)
    free = write_report(table, summary, {}, tmp_path / "free.html").stat().st_size
    sides = []
    small = Page(tmp_path / "free.html").json("thumbnails")
    least = free - len(json.dumps(small, separators=(",", ":"))) + len("[]")
    for room in (3_000_000, 100_000, 15_000):
        path = write_report(table, summary, {}, tmp_path / "page.html", budget=least + room)
        assert path.stat().st_size <= least + room
        small = Page(path).json("thumbnails")[0]
        with Image.open(io.BytesIO(base64.b64decode(small))) as picture:
            sides.append(picture.width)
    assert sides == sorted(sides, reverse=True)
    assert sides[0] == 256
    assert sides[-1] < 128
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"budget: .*24 pictures of 64 pixels\. Found 100\. Eval"):
        write_report(table, summary, {}, path, budget=least + 100)
    with pytest.raises(ConfigError, match="Found 0"):
        write_report(table, summary, {}, path, budget=1000)
    assert path.read_bytes() == before


def test_a_few_large_pictures_among_small_ones_still_fit(tmp_path: Path):
    """The estimate looks at some pictures; here it sees only the small ones."""
    paths = []
    for i in range(2 * thumbnails.TRIED):
        paths.append(tmp_path / f"{i}.png")
        Image.effect_noise((320, 320) if i % 2 else (16, 16), 90).save(paths[-1])
    room = 60_000
    found = thumbnails.thumbnails(paths, room)
    assert len(json.dumps(found, separators=(",", ":"))) <= room


def test_a_picture_that_is_shown_twice_is_kept_once(tmp_path: Path):
    table = table_of(random_values(2, 1, 3, 2), tmp_path)
    same = dataclasses.replace(table, images=(table.images[0], table.images[0]))
    page = Page(write_report(same, short_summary(same), {}, tmp_path / "report.html"))
    assert len(page.json("thumbnails")) == 6
    data = page.json("data")
    assert data["images"][0] == data["images"][1]


def test_a_missing_picture_is_named(tmp_path: Path):
    table = table_of(random_values(2, 1, 2, 1), tmp_path)
    table.images[1][1][0].unlink()
    with pytest.raises(ConfigError, match=r"1-1-0 #\.png` should be a picture .*Evaluate again"):
        write_report(table, short_summary(table), {}, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_a_large_evaluation_of_noise_stays_under_twenty_megabytes(tmp_path: Path):
    """64 prompts x 6 models x 4 seeds, the hardest to compress.

    Of 256 pixels: larger pictures of noise are greyer, and so smaller, as thumbnails.
    """
    one = table_of(random_values(1, 1, 8, 1), tmp_path, side=256)

    def link(e: int, p: int, s: int) -> Path:
        path = tmp_path / f"{e}-{p}-{s}.png"
        os.link(one.images[0][(e + p + s) % 8][0], path)
        return path

    values = random_values(6, 4, 64, 4)
    images = tuple(
        tuple(tuple(link(e, p, s) for s in range(4)) for p in range(64)) for e in range(6)
    )
    table = dataclasses.replace(table_of(values, None), texts=None, images=images)
    path = write_report(table, short_summary(table), {}, tmp_path / "report.html")
    assert path.stat().st_size < 20_000_000
    small = Page(path).json("thumbnails")
    assert len(small) == 1536
    with Image.open(io.BytesIO(base64.b64decode(small[-1]))) as picture:
        assert picture.width >= 96, "they should still be worth looking at"


# ---------------------------------------------------------------------- what runs left


def write_run(folder: Path, rows: list[dict[str, Any]], alarms: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if alarms:
        (folder / "alarms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alarms))
    return folder


def test_a_run_is_read_whatever_its_method_writes(tmp_path: Path):
    rows: list[dict[str, Any]] = [{"step": 0, "eval_mean/a": 1.0, "eval_mean/h": 5.0}]
    rows += [{"step": step, "reward_mean/a": float(step)} for step in (1, 2, 2, 3)]
    rows[3]["reward_mean/a"] = None
    alarm = {"step": 2, "kind": "drift", "name": "contrast", "action": "warn", "message": "m"}
    found = read_training("run", write_run(tmp_path / "run", rows, [alarm]))
    assert (found.objectives, found.heldout) == (("a",), ("h",))
    curve = found.curves["reward_mean"]["a"]
    assert (curve.steps, curve.values) == ((1, 2, 3), (1.0, None, 3.0))
    assert found.alarms == (alarm,)
    (tmp_path / "empty").mkdir()
    empty = read_training("empty", tmp_path / "empty")
    assert not empty.curves
    assert not empty.alarms
    assert not empty.front


def test_long_curves_are_averaged(tmp_path: Path):
    count = 7 * POINTS // 2
    rows = [{"step": i, "reward_mean/a": float(i), "x/sometimes": None} for i in range(count)]
    found = read_training("run", write_run(tmp_path / "run", rows, []))
    curve = found.curves["reward_mean"]["a"]
    assert found.pooled == 4
    assert POINTS / 2 < len(curve.steps) <= POINTS
    assert curve.steps == pytest.approx(curve.values)  # both are means of the same numbers
    assert curve.values[:2] == (1.5, 5.5)
    assert set(found.curves["x"]["sometimes"].values) == {None}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", '{"step": 1\n{"step": 2}\n', "metrics.jsonl:1: A line should be JSON"),
        ("alarms.jsonl", '{"step": 1, "kind": "drift"}\n', "jsonl:1: .* name, action, message"),
        ("front.json", '{"objectives": []}', "front.json` is damaged: KeyError"),
        ("front.json", "{", "front.json` is damaged"),
        ("front.json", '{"checkpoints": [1]}', "front.json` is damaged: TypeError"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_training("run", tmp_path)


# ---------------------------------------------------------------------- the headline


def test_a_card_names_the_model_with_the_largest_worst_gain(tmp_path: Path):
    values = numpy.zeros((4, 2, 3, 2))
    values[:, :, :, 1] = 2.0**0.5  # the base model's std within a prompt is 1
    for e, (first, second) in enumerate([(5.0, -1.0), (0.5, 0.25), (2.0, 0.125)], start=1):
        values[e] += numpy.array([first, second])[:, None, None]
    table = table_of(values, None)
    (card,) = headline.cards(table, short_summary(table), {})
    assert (card.label, card.model) == ("run/step-2", 2)
    assert card.worst == "+0.25 (reward1)"
    assert [gain.sign for gain in card.gains] == ["up", "up"]
    assert card.gains[0].bar == (98.0, 98.0, 98.0)
    assert card.gains[1].bar == (74.0, 74.0, 74.0)
    assert card.alarms is None
    page = write_report(table, short_summary(table), {}, tmp_path / "report.html").read_text()
    assert '<strong class="up">+0.25 (reward1)</strong>' in page
    assert Page(tmp_path / "report.html").json("data")["first"] == 2


def test_one_seed_has_gains_in_the_units_of_the_rewards(tmp_path: Path):
    values = numpy.zeros((2, 2, 3, 1))
    values[1] = 0.5
    values[:, 1] = math.nan
    table = table_of(values, None)
    (card,) = headline.cards(table, short_summary(table), {})
    assert card.worst is None
    assert [gain.text for gain in card.gains] == ["+0.5 [+0.5, +0.5] points", "does not apply"]
    page = write_report(table, short_summary(table), {}, tmp_path / "report.html").read_text()
    assert "there are no standard deviations" in page


def test_the_base_model_alone_makes_a_page(tmp_path: Path):
    table = table_of(random_values(1, 1, 2, 2), tmp_path)
    page = write_report(table, short_summary(table), {}, tmp_path / "report.html").read_text()
    assert "Only the base model was evaluated" in page
    assert 'id="training"' not in page


def test_alarms_stand_in_the_headline_and_in_a_table(tmp_path: Path):
    alarm = {"step": 4, "kind": "reward_hack", "name": "h", "action": "rollback", "to_step": 2}
    alarm |= {"message": "h fell <b>fast</b>", "best_step": 2, "fall": 0.123456, "rise": None}
    rows = [{"step": 0, "eval_mean/reward1": 0.0}, {"step": 1, "reward_mean/reward0": 0.0}]
    run = write_run(tmp_path / "run", rows, [alarm])
    (run / "config.yaml").write_text("seed: 0 # <script>\n")
    (run / "front.json").write_text(
        json.dumps(
            {
                "objectives": ["reward0"],
                "checkpoints": [
                    {"step": 1, "means": None, "non_dominated": False, "kept_for": ["last"]},
                    {
                        "step": 2,
                        "means": {"reward0": None},
                        "non_dominated": True,
                        "kept_for": ["front"],
                    },
                ],
            }
        )
    )
    table = table_of(random_values(3, 2, 4, 2), None)
    path = write_report(table, short_summary(table), {"run": run}, tmp_path / "report.html")
    page = path.read_text()
    assert 'href="#alarms">1 alarm</a>' in page
    assert "h fell &lt;b&gt;fast&lt;/b&gt;" in page
    assert "rollback to 2" in page
    assert "fall 0.1235" in page
    assert "rise" not in page.partition("</table>\n</div>")[0].partition("fall 0.1235")[2]
    assert "seed: 0 # &lt;script&gt;" in page
    assert "reward1, held-out" in page
    assert "kept in training for" in page
    assert len(Page(path).scripts) == 4
