"""report.html without a browser: what stands in the file, and how large it becomes."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from pathlib import Path
from urllib.parse import unquote

import numpy
from PIL import Image

from moa_diffusion.report.page.page import PACKAGES, versions, write_report
from report_pages import EVIL, Page, random_values, short_summary, table_of, write_run

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
        with Image.open(io.BytesIO(base64.b64decode(small[place]))) as image:
            assert (image.format, image.size) == ("WEBP", (40, 40))
    assert data["images"][2][3][1] != data["images"][0][0][0]
    assert list(target.parent.iterdir()) == [target], "no partial file is left"


def test_texts_stand_in_the_place_of_images(tmp_path: Path):
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


# ---------------------------------------------------------------------- the headline


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
