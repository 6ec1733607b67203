"""Scoring a folder of images: rows in order, formats, and what survives a failure."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import pytest
from heads_command import HeadsCommand
from PIL import Image

from rewards.commands.score_folder import ScoreTable, match

LOSSLESS = {"webp": {"lossless": True}}  # and JPEG keeps a flat grey


def expected_rows() -> list[dict[str, object]]:
    return [
        {
            "file": f"{number}.png",
            "prompt": f'prompt {number}, "ü"',
            "score": None if number == 2 else 20 * number,
            "word": str(number),
            "mixed": {"size": [8, 10] if number % 3 else [8, 8]},
        }
        for number in range(1, 13)
    ]


def score(
    run: HeadsCommand, folder: Path, head: str, output: str, *more: object
) -> tuple[int, str, str]:
    files = ("--images", folder / "images", "--prompts", folder / "prompts.txt")
    return run("score", head, *files, "--output", folder / output, "--batch_size", 5, *more)


def test_score_writes_rows_in_natural_order(
    heads_command: HeadsCommand, folder: Path, grey: str
) -> None:
    status, printed, _ = score(heads_command, folder, grey, "out/scores.jsonl")
    assert status == 0
    lines = (folder / "out" / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == expected_rows()
    beside = json.loads((folder / "out" / "scores.jsonl.json").read_text())
    assert beside["provenance"]["weights"] == "none at all"
    code = Path(grey.rpartition(":")[0]).read_bytes()
    assert beside["provenance"]["source_sha256"] == hashlib.sha256(code).hexdigest()
    assert beside["unit"] == "level"
    assert "12 images, the objective applies to 11: mean 138.2" in printed
    assert "from 20 (1.png) to 240 (12.png)" in printed
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "scores.jsonl",
        "scores.jsonl.json",
    ]


def test_score_writes_csv_and_parquet(heads_command: HeadsCommand, folder: Path, grey: str) -> None:
    assert score(heads_command, folder, grey, "scores.csv")[0] == 0
    with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {
        "file": "2.png",
        "prompt": 'prompt 2, "ü"',
        "score": "",
        "word": "2",
        "mixed": '{"size": [8, 10]}',
    }
    parquet = pytest.importorskip("pyarrow.parquet")
    assert score(heads_command, folder, grey, "scores.parquet")[0] == 0
    table = parquet.read_table(folder / "scores.parquet")
    assert table["score"].to_pylist() == [row["score"] for row in expected_rows()]
    assert table["file"].to_pylist() == [row["file"] for row in expected_rows()]
    metadata = json.loads(table.schema.metadata[b"provenance"])
    assert metadata["provenance"]["weights"] == "none at all"


def test_prompts_may_name_their_files(folder: Path) -> None:
    files = [f"{number}.png" for number in range(12, 0, -1)]
    prompts = [(f"of {file}", {"file": file, "tag": 1}) for file in files]
    pairs = match(folder / "images", prompts)
    assert [(file.name, prompt) for file, prompt, _ in pairs] == [
        (f"{number}.png", f"of {number}.png") for number in range(1, 13)
    ]
    assert all(metadata == {"tag": 1} for _, _, metadata in pairs)
    for wrong, reason in (
        (prompts[1:], "1 images have no prompt: 12.png"),
        ([*prompts, ("p", {"file": "13.png"})], "1 files of the prompts are not in the folder"),
        ([*prompts, prompts[0]], "1 files have more than one prompt: 12.png"),
        ([*prompts, ("p", {})], "1 of 13 prompts lack a `file`"),
    ):
        with pytest.raises(ValueError, match=reason):
            match(folder / "images", wrong)


def test_images_of_every_kind_are_taken_and_others_are_told(
    heads_command: HeadsCommand, folder: Path, grey: str
) -> None:
    images = folder / "images"
    rows = expected_rows()
    for number, suffix in enumerate(("gif", "jfif", "webp", "bmp", "tiff", "GIF"), start=1):
        file = images / f"{number}.png"
        with Image.open(file) as image:
            image.save(images / f"{number}.{suffix}", **LOSSLESS.get(suffix, {}))
        file.unlink()
        rows[number - 1]["file"] = f"{number}.{suffix}"
    assert score(heads_command, folder, grey, "scores.jsonl")[0] == 0
    found = (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in found] == rows

    frames = [Image.new("RGB", (10, 8), (shade,) * 3) for shade in (0, 99)]
    frames[0].save(images / "1.gif", save_all=True, append_images=frames[1:])
    _, _, error = score(heads_command, folder, grey, "more.jsonl")
    assert "1.gif` cannot be used: it has several frames; save the one" in error
    with pytest.raises(ValueError, match=r"1 files .* another kind than \.png, .*: notes\.txt"):
        match(images, [("p", {"file": "notes.txt"})])


def test_a_mismatch_is_told_before_anything_is_loaded(
    heads_command: HeadsCommand, folder: Path
) -> None:
    (folder / "prompts.txt").write_text("one\ntwo\n")
    status, _, error = score(heads_command, folder, "no_such_head", "scores.csv")
    assert status == 2
    assert "Found 12 images" in error
    assert "and 2 prompts" in error
    assert not (folder / "scores.csv").exists()


def test_a_blank_line_between_prompts_is_told_by_line(
    heads_command: HeadsCommand, folder: Path, grey: str
) -> None:
    lines = [f"prompt {number}" for number in range(1, 13)]
    lines.insert(3, " ")
    (folder / "prompts.txt").write_text("\n".join([*lines[:-1], "", ""]))
    status, _, error = score(heads_command, folder, grey, "scores.csv")
    assert status == 2
    assert f"{folder / 'prompts.txt'}:4: The prompt of image 4 should stand here" in error
    (folder / "prompts.txt").write_text("\n".join([*lines[:3], *lines[4:], "", ""]))
    assert score(heads_command, folder, grey, "scores.csv")[0] == 0  # at the end they shift nothing


def test_a_failed_run_is_continued(heads_command: HeadsCommand, folder: Path, grey: str) -> None:
    file = folder / "images" / "12.png"
    whole = file.read_bytes()
    file.write_bytes(b"broken")
    partial = folder / "scores.jsonl.partial.sqlite"
    assert score(heads_command, folder, grey, "scores.jsonl")[0] == 2
    before = partial.read_bytes()
    assert score(heads_command, folder, grey, "scores.jsonl")[0] == 2
    assert partial.read_bytes() == before  # the same failure loses nothing
    file.write_bytes(whole)
    status, printed, _ = score(heads_command, folder, grey, "scores.jsonl")
    assert status == 0
    assert "10 of 12 scores are in" in printed
    found = (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in found] == expected_rows()
    assert not partial.exists()


def test_the_scores_of_another_head_are_refused_and_kept(
    heads_command: HeadsCommand, folder: Path, grey: str
) -> None:
    partial = folder / "scores.csv.partial.sqlite"
    assert score(heads_command, folder, grey, "scores.csv", "--option", "limit=210")[0] == 1
    before = partial.read_bytes()
    status, _, error = score(heads_command, folder, grey, "scores.csv", "--option", "limit=220")
    assert (status, partial.read_bytes()) == (2, before)
    assert "of another head, of other options or weights" in error
    Image.new("RGB", (10, 8), (99,) * 3).save(folder / "images" / "4.png")
    status, printed, _ = score(heads_command, folder, grey, "scores.csv", "--option", "limit=210")
    assert status == 1
    assert "9 of 12 scores are in" in printed, "an image that has changed is scored anew"
    partial.write_text("file,score\n")
    status, _, error = score(heads_command, folder, grey, "scores.csv")
    assert (status, partial.read_text()) == (2, "file,score\n")
    assert "holds no scores that can be read" in error


def test_what_was_scored_survives_a_failure(
    heads_command: HeadsCommand, folder: Path, grey: str
) -> None:
    status, printed, error = score(
        heads_command, folder, grey, "scores.csv", "--option", "limit=210"
    )
    assert status == 1
    assert "too bright" in error
    assert "10 of 12 scores are kept in" in printed
    assert (folder / "scores.csv.partial.sqlite").is_file()
    assert not (folder / "scores.csv").exists()
    (folder / "images" / "12.png").write_bytes(b"\x89PNG broken")
    status, printed, error = score(heads_command, folder, grey, "other.csv")
    assert status == 2
    assert "12.png` cannot be used" in error
    assert "10 of 12" in printed
    Image.new("RGBA", (10, 8)).save(folder / "images" / "1.png")
    status, printed, error = score(heads_command, folder, grey, "third.csv")
    assert "transparent" in error
    assert "kept" not in printed
    assert list(folder.glob("third*")) == []


def test_score_refuses_other_formats(
    heads_command: HeadsCommand, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    assert "should end in one of" in score(heads_command, folder, "sharpness", "scores.xlsx")[2]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "moa-diffusion\[report\]"'):
        ScoreTable(tmp_path / "scores.parquet", [])
