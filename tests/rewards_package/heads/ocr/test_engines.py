"""Engines and their options; Tesseract in earnest and in effigy."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from rewards import RewardBatch, RewardError, create
from rewards.heads.ocr.engines import run_program
from rewards.heads.ocr.plans import plan_engine

posix = pytest.mark.skipif(os.name != "posix", reason="the fake program is a shell script")


real_tesseract = pytest.mark.skipif(
    shutil.which("tesseract") is None, reason="the program tesseract is not installed"
)


def drawn(*lines: str, side: int = 256) -> np.ndarray:
    image = Image.new("RGB", (side, side), (250, 240, 200))
    font = ImageFont.load_default(side // 6)
    for row, line in enumerate(lines):
        place = (side / 2, side * (row + 1) / (len(lines) + 1))
        ImageDraw.Draw(image).text(place, line, font=font, fill=(20, 20, 90), anchor="mm")
    return np.asarray(image)


def batch(*pairs: tuple[np.ndarray, str]) -> RewardBatch:
    pixels = torch.from_numpy(np.stack([image for image, _ in pairs])).permute(0, 3, 1, 2)
    prompts = [f'a sign that says "{text}"' for _, text in pairs]
    return RewardBatch(prompts=prompts, images=(pixels.float() / 255).contiguous())


# --- tesseract ---------------------------------------------------------------------------------


FAKE = """
    #!/bin/sh
    case "$*" in
        --version) echo "tesseract 5.9.9"; echo " leptonica" ;;
        *--list-langs) printf 'List of available languages in "{folder}" (2):\\neng\\nosd\\n' ;;
        *"-l osd"*) echo "no letters in osd" >&2; exit 3 ;;
        *) cat > "{folder}/seen.ppm"; echo "$OMP_THREAD_LIMIT $*" > "{folder}/call"
           printf ' NEW\\n \\nYORK\\n\\f' ;;
    esac
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    program = tmp_path / "tesseract"
    program.write_text(textwrap.dedent(FAKE).lstrip().format(folder=tmp_path))
    program.chmod(0o755)
    (tmp_path / "eng.traineddata").write_bytes(b"English")
    (tmp_path / "osd.traineddata").write_bytes(b"orientation")
    return program


@posix
@pytest.mark.parametrize(
    ("detect", "options", "words"),
    [
        (True, {}, "stdin stdout -l eng --psm 11 --dpi 72"),
        (True, {"psm": 6, "languages": ["eng", "eng"]}, "stdin stdout -l eng+eng --psm 6 --dpi 72"),
        (False, {}, "stdin stdout -l eng --psm 7 --dpi 72"),
        (True, {"model_dir": "m"}, "--tessdata-dir m stdin stdout -l eng --psm 11 --dpi 72"),
    ],
)
def test_tesseract_is_called_with_one_thread_and_the_exact_pixels(fake, detect, options, words):
    head = create(
        "ocr",
        engine="tesseract",
        detect=detect,
        engine_options={"program": str(fake), "min_side": 40, **options},
        workers=0,
    )
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    scores = head.evaluate(batch((image, "New York")))
    assert scores.values.tolist() == [1.0]
    assert scores.extra == {"target": ["New York"], "read": ["NEW\nYORK"]}
    assert fake.with_name("call").read_text() == f"1 {words}\n"
    assert (np.asarray(Image.open(fake.with_name("seen.ppm"))) == image).all()


@posix
def test_tesseract_sees_small_images_enlarged(fake):
    options = {"program": str(fake)}
    head = create("ocr", engine="tesseract", engine_options=options, workers=0)
    head(batch((np.full((32, 64, 3), 9, np.uint8), "GO")))
    seen = np.asarray(Image.open(fake.with_name("seen.ppm")))
    assert seen.shape == (128, 256, 3)
    assert (seen == 9).all()


@posix
def test_tesseract_tells_its_version_and_its_models(fake):
    head = create("ocr", engine="tesseract", engine_options={"program": str(fake)})
    assert head.provenance() == {
        "engine": "tesseract",
        "tesseract": "5.9.9",
        "eng.traineddata": hashlib.sha256(b"English").hexdigest(),
    }


@posix
def test_a_failure_of_tesseract_is_an_error_with_its_words(fake):
    options = {"program": str(fake), "languages": ["osd"]}
    for workers in (0, 1):
        head = create("ocr", engine="tesseract", engine_options=options, workers=workers)
        with pytest.raises(RewardError, match="status 3: no letters in osd") as caught:
            head(batch((drawn("GO"), "GO"), (drawn("UP"), "UP")))
        assert caught.value.samples[0] == (0, 'a sign that says "GO"')
        head.close()


@posix
def test_languages_and_programs_that_are_missing_are_named_with_the_line_that_mends_it(fake):
    options = {"program": str(fake), "languages": ["deu"]}
    with pytest.raises(ValueError, match=r"eng, osd\. Found 'deu'.*install tesseract-ocr-deu"):
        create("ocr", engine="tesseract", engine_options=options)
    options = {"program": str(fake.with_name("nowhere"))}
    with pytest.raises(
        ImportError, match=r"apt-get install tesseract-ocr .*brew install tesseract"
    ):
        create("ocr", engine="tesseract", engine_options=options)


@posix
def test_an_old_tesseract_is_told(fake):
    fake.write_text("#!/bin/sh\necho 'List of available languages (1):'; echo eng\n")
    with pytest.raises(ImportError, match="should be version 5 or later"):
        create("ocr", engine="tesseract", engine_options={"program": str(fake)})


def test_a_program_that_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr("rewards.heads.ocr.engines._PROGRAM_SECONDS", 0.2)
    with pytest.raises(subprocess.TimeoutExpired, match=r"timed out after 0\.2 seconds"):
        run_program([sys.executable, "-c", "import time; time.sleep(60)"])


@real_tesseract
def test_tesseract_reads_in_this_process_and_in_a_worker():
    side = 64
    full = batch(
        (drawn("OPEN", side=side), "open"),
        (drawn("NEW", "YORK", side=side), "New York"),
        (drawn("STOP", side=side), "STEP"),
        (np.full((side, side, 3), 90, np.uint8), "GO"),
    )
    for workers in (0, 1):
        head = create("ocr", engine="tesseract", workers=workers)
        assert head(full).tolist() == [1.0, 1.0, 0.75, 0.0]
        head.close()


@real_tesseract
def test_tesseract_tells_what_it_can_write():
    known = plan_engine("tesseract", detect=True, detection_side=None, options={}).alphabet()
    assert known is not None
    assert set("ABCxyz019&\u20ac") <= set(known)
    # The file of English lists the first, and reads e.
    assert not set("\u00e9 \u00fc\u041c") & set(known)
    head = create("ocr", engine="tesseract", workers=0)
    word = drawn("OPEN")
    full = batch((word, "OPEN"), (word, "\u00dcBER"), (word, "CAF\u00c9"))
    found = head(full)
    assert found[0] == 1.0
    assert found[1:].isnan().all()
    (remark,) = head.remarks(full.prompts)
    assert "(\u00fc \u00e9)" in remark
    assert "`engine: tesseract`" not in remark  # it is the engine
    assert "`engine_options: {languages: [CODE]}`, CODE their language's file of Tess" in remark


@real_tesseract
def test_tesseract_reads_upright_text_from_top_to_bottom():
    head = create("ocr", engine="tesseract", workers=0)
    upright = drawn("NEW", "YORK")
    turned = np.ascontiguousarray(np.rot90(upright, 2))
    found = head(batch((upright, "NEW YORK"), (turned, "NEW YORK")))
    assert found[0] == 1.0
    assert found[1] < 0.5


@real_tesseract
def test_tesseract_reads_a_line_without_detection():
    head = create("ocr", engine="tesseract", detect=False, workers=0)
    assert head(batch((drawn("HOTEL"), "HOTEL"))).tolist() == [1.0]
    assert set(head.provenance()) == {"engine", "tesseract", "eng.traineddata"}
