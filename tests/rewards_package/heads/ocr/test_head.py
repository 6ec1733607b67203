"""The OCR head with its real engine, on words drawn with Pillow's own font."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from rewards import RewardBatch, RewardError, create
from rewards.heads.ocr.engines import ENGINES
from rewards.heads.ocr.head import _default_workers

pytest.importorskip("rapidocr")
pytest.importorskip("onnxruntime")

WORDS = ["GO", "STOP", "OPEN", "HI", "EXIT", "FISH"]
COLOURS = [(214, 39, 40), (44, 160, 44), (31, 90, 200), (240, 210, 40), (245, 245, 245)]


def sign(word: str, background: tuple[int, int, int], side: int = 64, width: float = 0.8):
    image = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(image)
    size = side
    while draw.textlength(word, font=ImageFont.load_default(size)) > width * side:
        size -= 1
    ink = (25, 25, 25) if sum(background) > 380 else (245, 245, 245)
    font = ImageFont.load_default(size)
    draw.text((side / 2, side / 2), word, font=font, fill=ink, anchor="mm")
    return np.asarray(image)


def batch(arrays, prompts) -> RewardBatch:
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    return RewardBatch(prompts=prompts, images=pixels.contiguous())


def says(word: str) -> str:
    return f'a sign that says "{word}"'


@pytest.fixture(scope="module")
def head():
    head = create("ocr", workers=0)
    yield head
    head.close()


@pytest.mark.parametrize("side", [64, 512])
def test_drawn_words_are_read(head, side):
    backgrounds = [COLOURS[i % len(COLOURS)] for i in range(len(WORDS))]
    arrays = [sign(w, c, side) for w, c in zip(WORDS, backgrounds, strict=True)]
    rewards = head(batch(arrays, [says(word) for word in WORDS]))
    assert rewards.tolist() == [1.0] * len(WORDS)


def test_a_wrong_word_scores_less_and_a_blank_image_nothing(head):
    arrays = [
        sign("STOP", COLOURS[2]),
        sign("STOP", COLOURS[2]),
        np.full((64, 64, 3), 90, np.uint8),
    ]
    right, near, blank = head(batch(arrays, [says("STOP"), says("STEP"), says("STOP")])).tolist()
    assert (right, near, blank) == (1.0, 0.75, 0.0)


def test_lines_are_joined(head):
    array = np.concatenate([sign("NEW", COLOURS[1], 128), sign("YORK", COLOURS[1], 128)])
    assert head(batch([array], [says("New York")])).tolist() == [1.0]


def test_without_detection_a_large_word_is_read_too():
    head = create("ocr", workers=0, detect=False)
    arrays = [sign(word, COLOURS[0]) for word in WORDS[:3]]
    rewards = head(batch(arrays, [says(word) for word in WORDS[:3]]))
    assert rewards.mean() > 0.9


def test_the_engine_reads_text_whichever_way_up(head):
    """What the documentation says of it; another version may do otherwise."""
    array = np.full((128, 256, 3), 255, np.uint8)
    array[32:96, 96:160] = sign("OPEN", (255, 255, 255))
    ways = [np.rot90(array, turns) for turns in range(4)]
    for upright in (ways[0::2], ways[1::2]):
        assert head(batch(upright, [says("OPEN")] * 2)).tolist() == [1.0, 1.0]


def test_the_engine_reads_lines_from_top_to_bottom_at_full_resolution(head):
    array = np.full((1024, 1024, 3), 255, np.uint8)  # the detector sees it at a third
    array[650:714, 100:228] = sign("YORK", (255, 255, 255), 128)[32:96]
    array[200:264, 700:828] = sign("NEW", (255, 255, 255), 128)[32:96]
    assert head.read(batch([array], ["-"]), [0]) == ["NEW\nYORK"]


# --- what the engine cannot read ------------------------------------------------------------------

TOWN = "\u0413\u041e\u0420\u041e\u0414"  # gorod; its O and P look Latin, its G and D do not
UNREADABLE = [
    *(TOWN, "\uc11c\uc6b8", "\u05e9\u05dc\u05d5\u05dd", "OPEN \U0001f642"),
    # Listed by the engine, and read as O, C with caron, Z with a dot, and AE.
    *("\u0391\u0398\u0397\u039d\u0391", "A\u011eA", "\u0179LE", "\u00c6RO"),
]
READABLE = [
    *("OPEN", "CAF\u00c9", "Stra\u00dfe", "\u00dcBER", "SM\u00d8R", "\u6771\u4eac"),
    *("\u3072\u3089", "\u30ab\u30fc", "\u039d\u0395\u039f"),  # the last looks Latin: NEO
    *("50 %", "DON\u2019T", "a\u00adb", "1 \u2615\ufe0f"),  # the last two hold what is not seen
]


@pytest.mark.parametrize("target", UNREADABLE)
def test_a_target_that_the_engine_cannot_write_is_nan_and_not_read(target, caplog):
    head = create("ocr", workers=1)
    prompts = [says(target), says(target), "no text"]
    scores = head.evaluate(batch([sign("GO", COLOURS[0])] * 3, prompts))
    assert scores.values.isnan().all()
    assert scores.extra == {"target": [target, target, None], "read": [None] * 3}
    assert head._pool._workers == []
    (record,) = caplog.records  # once, though asked twice
    head(batch([sign("GO", COLOURS[0])], prompts[:1]))
    assert len(caplog.records) == 1
    assert (
        'Reward head "ocr": 1 of 2 prompts quote characters that the OCR engine "rapidocr" cannot'
        in record.message
    )
    assert repr(target) in record.message
    assert "they score NaN" in record.message


def test_what_the_engine_can_write_is_no_remark():
    assert create("ocr", workers=0).remarks([says(target) for target in READABLE]) == []


def test_a_remark_counts_the_prompts_and_names_what_would_read_them():
    head = create("ocr", workers=0)
    (remark,) = head.remarks([*map(says, UNREADABLE[:1]), *map(says, READABLE), "no text"])
    assert remark.startswith("1 of 15 prompts quote characters")
    assert f"(\u0433 \u0434), first {TOWN!r}" in remark
    assert "`engine: tesseract`" in remark
    if importlib.util.find_spec("easyocr") is not None:
        assert "languages: [CODE]" in remark
        assert " ru," in remark


def test_what_is_not_judged_is_told_with_its_reason(caplog):
    """Text in other quotes, quotes without a partner, no word in them, and a second text."""
    head = create("ocr", workers=1)
    prompts = [
        *("a sign \u201cGO\u201d", "a sign \u00abGO\u00bb", "it's a 'GO' sign"),
        *('a sign "GO', 'a sign"GO"'),
        *('a sign "..."', 'a sign "\u2615\ufe0f"', 'a "" sign'),
        *('a 5" nail and a 6" nail', "a plain sign"),
    ]
    scores = head.evaluate(batch([sign("GO", COLOURS[0])] * len(prompts), prompts))
    assert scores.values.isnan().all()
    assert scores.extra["read"] == [None] * len(prompts)
    assert head._pool._workers == []
    told = [record.message.removeprefix('Reward head "ocr": ') for record in caplog.records]
    assert told == [
        "3 of 10 prompts have text in other quotes (\u201c\u201d \u00ab\u00bb '') than "
        "`quotes: double` reads, first 'a sign \u201cGO\u201d': they score NaN. `quotes: any` "
        "reads them.",
        "2 of 10 prompts have a quotation mark without its partner, first 'a sign \"GO': they "
        "score NaN. Close it, with a space or a mark around the quoted text.",
        "2 of 10 prompts quote neither a letter nor a digit, first '...': they score NaN.",
    ]
    any_quotes = create("ocr", workers=0, quotes="any").remarks(prompts)
    assert [remark.split(" prompts ")[1][:12] for remark in any_quotes] == [
        *("have a quota", "quote neithe"),
    ]
    (remark,) = head.remarks(['"OPEN" and "OPEN"', '"OPEN" and "SHUT"'])
    assert remark.startswith("1 of 2 prompts quote more than one text")


def test_further_text_is_punished_only_on_request(head):
    strict = create("ocr", workers=0, substring_ok=False)
    full = batch([sign("STOP", COLOURS[2])], [says("TOP")])
    assert head(full).tolist() == [1.0]
    assert strict(full).item() == pytest.approx(2 / 3)  # in float32: within 6e-8 of it


def test_no_quoted_text_is_nan_and_costs_no_engine():
    head = create("ocr", workers=2)
    prompts = ["a red circle", 'an empty sign ""', 'a blank sign "  "', "a sign \u201cGO\u201d"]
    rewards = head(batch([sign("GO", COLOURS[0])] * 4, prompts))
    assert rewards.isnan().all()
    assert head._pool._workers == []


def test_only_the_samples_with_a_target_are_read(head, monkeypatch):
    seen = []

    class Counting:
        def read(self, image):
            seen.append(image[0, 0].tolist())
            return ["GO"]

    monkeypatch.setattr(head, "_engine", Counting())
    arrays = [np.full((8, 8, 3), value, np.uint8) for value in (1, 2, 3)]
    rewards = head(batch(arrays, [says("GO"), "nothing", says("GONE")])).tolist()
    assert (rewards[0], rewards[2]) == (1.0, 0.5)
    assert math.isnan(rewards[1])
    assert seen == [[1, 1, 1], [3, 3, 3]]


def test_quote_styles(head):
    curly = create("ocr", workers=0, quotes="curly")
    full = batch([sign("GO", COLOURS[0])], ["a sign that says \u201cGO\u201d"])
    assert curly(full).tolist() == [1.0]
    assert head(full).isnan().all()


def test_texts_are_refused(head):
    with pytest.raises(RewardError, match="Found a batch of texts"):
        head(RewardBatch(prompts=[says("GO")], texts=["GO"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "abbyy"}, "rapidocr"),
        ({"quotes": "odd"}, "'double', 'curly', 'single', 'any'"),
        ({"workers": -1}, "workers = -1"),
        ({"timeout": 0}, "timeout = 0"),
        ({"detection_side": 8}, "detection_side = 8"),
        ({"worker": 1}, "Did you mean 'workers'"),
        ({"engine_options": {"psm": 6}}, 'The OCR engine "rapidocr" has no option "psm"'),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create("ocr", **options)


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    with pytest.raises(ImportError, match=r'needs onnxruntime.*pip install "moa-diffusion\[ocr\]"'):
        create("ocr")


def test_default_workers_share_the_cores_among_the_processes_of_a_job(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(16), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    for processes, workers in (("1", 8), ("4", 4), ("32", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert _default_workers() == workers


# What the prompt asks for, what is read, and the score with and without `substring_ok`.
TABLE = [
    ('a "GO" sign', "double", "GO", "GO", 1.0, 1.0),
    ('a "GO" sign', "double", "GO", "go", 1.0, 1.0),
    ('a "Go Home" sign', "double", "Go Home", "GO\nHOME", 1.0, 1.0),
    ('a "GO" sign', "double", "GO", "CARGO", 1.0, 0.0),
    ('a "STOP" sign', "double", "STOP", "STOPS", 1.0, 0.75),
    ('a "STOP" sign', "double", "STOP", "SHOP", 0.75, 0.75),
    ('a "STOP" sign', "double", "STOP", "", 0.0, 0.0),
    ('"ONE" and "TWO"', "double", "ONE", "TWO", 0.0, 0.0),
    ("a \u201cGO\u201d sign", "double", None, "GO", None, None),
    ("a \u201cGO\u201d sign", "curly", "GO", "GO", 1.0, 1.0),
    ("a \u2018GO\u2019 sign", "curly", "GO", "GO", 1.0, 1.0),
    ("it's a 'GO' sign", "single", "GO", "GO", 1.0, 1.0),
    ('it\'s a "GO" sign', "any", "GO", "GO", 1.0, 1.0),
    ("a GO sign", "any", None, "GO", None, None),
    ('a "" sign', "double", None, "GO", None, None),
    ('a \\"GO\\" sign', "double", "GO", "GO", 1.0, 1.0),
    ('a 5" nail and a 6" nail', "any", None, "GO", None, None),
    ('a 5" nail and "GO"', "double", "GO", "GO", 1.0, 1.0),
    ('a " " sign', "any", None, "GO", None, None),
    ('an unclosed "GO sign', "double", None, "GO", None, None),
    ('a "Stra\u00dfe" sign', "double", "Stra\u00dfe", "STRASSE", 1.0, 1.0),
    ('a "CAF\u00c9" sign', "double", "CAF\u00c9", "cafe\u0301", 1.0, 1.0),
    ('a "CAF\u00c9" sign', "double", "CAF\u00c9", "CAFE", 0.75, 0.75),
    ('a "\uff27\uff2f" sign', "double", "\uff27\uff2f", "GO", 1.0, 1.0),
    ('a "\u51fa\u53e3" sign', "double", "\u51fa\u53e3", "\u51fa", 0.5, 0.5),
]


@pytest.mark.parametrize(("prompt", "quotes", "target", "read", "loose", "strict"), TABLE)
def test_the_formula(prompt, quotes, target, read, loose, strict):
    class Reading:
        def read(self, image):
            return read.split("\n")

    for substring_ok, expected in ((True, loose), (False, strict)):
        head = create("ocr", workers=0, quotes=quotes, substring_ok=substring_ok)
        head._engine = Reading()
        scores = head.evaluate(batch([np.zeros((8, 8, 3), np.uint8)], [prompt]))
        score = scores.values.item()
        assert scores.extra["target"] == [target]
        assert scores.extra["read"] == [read if target else None]
        # A quotient of whole numbers in float32: within 6e-8 of it.
        assert math.isnan(score) if expected is None else score == pytest.approx(expected)


def test_the_scores_table_shows_target_and_reading(head):
    arrays = [sign("STOP", COLOURS[2]), sign("GO", COLOURS[0])]
    scores = head.evaluate(batch(arrays, [says("Step"), "no text"]))
    assert scores.extra == {"target": ["Step", None], "read": ["STOP", None]}


def test_load_starts_the_engine_and_close_ends_it():
    head = create("ocr", workers=0)
    head.load()
    assert head._engine is not None
    head.offload()  # nothing of it is on a GPU
    head.close()
    assert head._engine is None


def test_an_engine_that_does_not_start_is_an_error(monkeypatch):
    class Broken:
        packages = ("json",)

        def __init__(self, *, detect):
            raise OSError("no models")

        def read(self, image): ...

    monkeypatch.setitem(ENGINES, "broken", Broken)
    head = create("ocr", engine="broken", workers=0)
    with pytest.raises(RewardError, match="did not start: OSError: no models"):
        head.load()


def test_provenance_names_versions_and_digests_of_the_models_in_use(head):
    found = dict(head.provenance())
    assert found.pop("engine") == "rapidocr"
    for package in ("rapidocr", "onnxruntime"):
        assert found.pop(package) == importlib.metadata.version(package)
    assert sorted(name.split("_")[1] for name in found) == ["det", "rec"]
    assert all(len(digest) == 64 for digest in found.values())


def test_workers_score_like_this_process(head):
    words = [WORDS[i % len(WORDS)] for i in range(8)]
    arrays = [sign(word, COLOURS[i % len(COLOURS)]) for i, word in enumerate(words)]
    prompts = [says(word) for word in words[1:] + words[:1]]  # wrong words: scores that differ
    pooled = create("ocr", workers=2)
    try:
        pooled.load()
        assert len(pooled._pool._workers) == 2
        full = batch(arrays, prompts)
        torch.testing.assert_close(pooled(full), head(full), rtol=0, atol=0)
    finally:
        pooled.close()


def test_every_engine_keeps_the_interface():
    for name, engine in ENGINES.items():
        assert engine.packages, name
        assert callable(engine.read)
