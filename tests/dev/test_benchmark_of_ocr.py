"""The OCR benchmark: its images are what they say, and it reports every engine."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.ocr import HEIGHTS, NOISES, SIDES, measure_ocr, renderings
from rewards.heads.ocr.engines import ENGINES

pytest.importorskip("rapidocr")
pytest.importorskip("onnxruntime")

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench.py"


@pytest.fixture
def engines(monkeypatch):
    """The default engine and one that is not installed."""

    class Absent:
        packages = ("no_such_package",)

        def __init__(self, *, detect): ...

    for name in [*ENGINES][:0:-1]:  # the last first, so that they come back in their order
        monkeypatch.delitem(ENGINES, name)
    monkeypatch.setitem(ENGINES, "absent", Absent)


@pytest.mark.parametrize("side", SIDES)
def test_renderings_are_seeded_and_lie_inside(side):
    clean = renderings(6, side=side, noise=0, seed=1)
    again = renderings(6, side=side, noise=0, seed=1)
    noisy = renderings(6, side=side, noise=0.1, seed=1)
    other = renderings(6, side=side, noise=0, seed=2)
    assert [image.text for image in clean] == [image.text for image in noisy]
    assert [image.text for image in clean] != [image.text for image in other]
    for one, same, grainy in zip(clean, again, noisy, strict=True):
        assert one.pixels.shape == (side, side, 3)
        assert (one.pixels == same.pixels).all()
        ink = (one.pixels != one.pixels[0, 0]).any(axis=2)
        rows = ink.any(axis=1).sum()
        assert 2 < rows <= 2 * HEIGHTS[side][1] * side
        change = grainy.pixels.astype(float) - one.pixels
        middle = (one.pixels > 80) & (one.pixels < 175)  # where nothing is clipped
        if middle.any():
            # A tenth of 255. Of some hundred values, the fewest, it has a standard error of 4 %.
            assert change[middle].std() == pytest.approx(25.5, rel=0.15)


def test_every_size_and_noise_is_measured(engines):
    report = measure_ocr(2)
    cases = [(row["side"], row["noise"]) for row in report["rows"]]
    assert cases == [(side, noise) for side in SIDES for noise in NOISES]
    assert all(row["engine"] == "rapidocr" for row in report["rows"])
    assert all(0 <= row["exact"] <= 1 and row["milliseconds"] > 0 for row in report["rows"])
    first = report["rows"][0]
    assert (first["exact"], first["mean"]) == (1.0, 1.0)
    assert "no_such_package" in report["absent"]["absent"]
    assert "rapidocr" in report["provenance"]["rapidocr"]


def test_the_script_prints_a_table_and_writes_the_numbers(engines, monkeypatch, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("bench_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    file = tmp_path / "new" / "ocr.json"
    for name in ("OMP_NUM_THREADS", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # the script sets them for good
    monkeypatch.setattr(sys, "argv", ["bench.py", "ocr", "--images", "1", "--json", str(file)])
    assert bench.main() == 0
    report = json.loads(file.read_text())
    shown = capsys.readouterr().out
    assert report["images"] == 1
    assert len(report["rows"]) == len(SIDES) * len(NOISES)
    assert "rapidocr" in shown
    assert ">= 0.98, <= 90 ms" in shown
    assert "Without absent:" in shown
    assert np.isclose(report["rows"][0]["mean"], 1.0)
