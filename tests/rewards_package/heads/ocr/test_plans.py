"""What an OCR engine needs is known before it is made."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from rewards import create
from rewards.heads.ocr.engines import ENGINES
from rewards.heads.ocr.plans import EnginePlan, plan_engine


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        ("rapidocr", {"x": 1}, r'"rapidocr" has no option "x"\. Valid options: none'),
        ("rapidocr", {"detect": False}, "leave out `detect`"),
        ("rapidocr", ["psm"], "should be a mapping"),
        ("tesseract", {"langages": ["eng"]}, "Did you mean 'languages'.*psm"),
        ("tesseract", {"psm": 7}, "Found `psm = 7`"),
        ("tesseract", {"psm": "6"}, "Found `psm = '6'`"),
        ("tesseract", {"min_side": 0}, "Found `min_side = 0`"),
        ("tesseract", {"languages": "eng"}, "should be a list of codes"),
        ("tesseract", {"languages": []}, "should be a list of codes"),
        ("tesseract", {"model_dir": Path("x")}, "should hold numbers, strings and lists"),
    ],
)
def test_wrong_engine_options_are_refused(engine, options, message):
    with pytest.raises(ValueError, match=message):
        create("ocr", engine=engine, engine_options=options)


def test_an_engine_without_a_detector_of_its_own_has_no_detection_side():
    with pytest.raises(ValueError, match=r"`detection_side` means nothing to .*tesseract"):
        create("ocr", engine="tesseract", detection_side=320)


def test_every_engine_can_be_built_from_the_options_of_its_plan(monkeypatch):
    monkeypatch.setattr("rewards.heads.ocr.plans._PLANS", {})  # no programs or weights are needed
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    for engine, kind in ENGINES.items():
        found = plan_engine(engine, detect=True, detection_side=None, options={})
        assert (found.kind, found.options["detect"], found.on_gpu) == (kind, True, False)
        assert all(name in kind.__doc__ for name in found.options)


def test_an_engine_on_a_gpu_reads_in_this_process(monkeypatch):
    monkeypatch.setattr(EnginePlan, "on_gpu", True)
    assert create("ocr").workers == 0
    with pytest.raises(
        ValueError, match=r"should be 0 for an engine on a GPU\. Found `workers = 2`"
    ):
        create("ocr", workers=2)


def test_a_missing_easyocr_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "moa-diffusion\[easyocr\]"'):
        create("ocr", engine="easyocr")
