"""The commands of `scripts/heads.py`: list, check, score, serve."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import runpy
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import RewardBatch, RewardError, available, create, register, registry
from rewards.commands import cli
from rewards.commands.check_head import PROMPT, prepare, try_head
from rewards.commands.head_cards import CARDS
from rewards.commands.head_options import about
from rewards.commands.score_folder import ScoreTable, match
from rewards.serving.server import Limits, listen
from waiting import HANG, python

SCRIPT = Path(__file__).parents[2] / "scripts" / "heads.py"
OPTIONS = SCRIPT.parents[1] / "moa_diffusion" / "config" / "options.json"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the script in this process: exit status, stdout, stderr."""

    def start(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        printed = capsys.readouterr()
        return int(str(ended.value.code)), printed.out, printed.err

    return start


def test_the_old_name_of_the_script_says_the_new_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = SCRIPT.with_name("rewards.py")
    monkeypatch.setattr(sys, "argv", [str(old), "check", "sharpness"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(old), run_name="__main__")
    printed = capsys.readouterr()
    assert ended.value.code == 0
    assert "scripts/rewards.py is now called scripts/heads.py" in printed.err
    assert "sharpness" in printed.out


LOSSLESS = {"webp": {"lossless": True}}  # and JPEG keeps a flat grey


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


def test_every_built_in_head_has_a_card_and_the_reverse() -> None:
    assert set(CARDS) == set(registry._BUILT_IN)


def test_list_shows_all_heads(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    available()  # imports the built-in heads, which register themselves for good
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    register("my_own_head", unit="[kg]")(lambda images, prompts: [0.0] * len(prompts))
    status, printed, _ = run("list")
    assert status == 0
    lines = [line.split("│") for line in printed.splitlines()]
    rows = {cells[1].strip(): cells for cells in lines if len(cells) > 8}
    assert set(CARDS) <= set(rows)
    assert [cell.strip() for cell in rows["my_own_head"][2:9]] == ["[kg]", *["-"] * 6]
    assert "quoted text" in rows["ocr"][4]
    header = next(line.split("┃") for line in printed.splitlines() if "licence" in line)
    assert header[8].strip() == "packages"  # not "installed": weights are not looked for
    assert rows["sharpness"][8].strip() == "none needed"


def test_list_names_the_packages_that_are_missing(run: Run, monkeypatch) -> None:
    found = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == "rapidocr" else found(name)
    )
    assert "missing: rapidocr" in run("list")[1]


def cells_of(printed: str) -> dict[str, list[str]]:
    """Cells of a table by the first of the row; those of lines that go on are joined."""
    rows: dict[str, list[str]] = {}
    for line in printed.splitlines():
        if "│" in line:
            cells = [cell.strip() for cell in line.split("│")[1:-1]]
            name = cells[0] or list(rows)[-1]
            before = rows.get(name, [""] * len(cells))
            rows[name] = [f"{a} {b}".strip() for a, b in zip(before, cells, strict=True)]
    return rows


def test_list_shows_the_options_of_a_head(run: Run) -> None:
    status, printed, _ = run("list", "prompt_colour")
    assert status == 0
    assert printed.startswith("prompt_colour: ")
    assert "unit share of named colours; range 0 to 1; weights none" in printed
    rows = cells_of(printed)
    assert list(rows) == ["share", "tolerance"]
    assert rows["share"][1:3] == ["a number", "0.15"]
    assert rows["share"][3].startswith("Part of the pixels")
    assert "in (0, 1]" in rows["share"][3]


def test_list_of_what_has_no_options_or_is_none(run: Run, grey: str) -> None:
    assert "It has no options." in run("list", "sharpness")[1]
    assert cells_of(run("list", grey)[1])["limit"][1:3] == ["a number", "300.0"]
    status, _, error = run("list", "sharpnes")
    assert status == 2
    assert "Did you mean 'sharpness'?" in error


@pytest.mark.parametrize("name", list(CARDS))
def test_every_option_of_a_built_in_head_is_explained_as_in_the_documentation(name: str) -> None:
    known = json.loads(OPTIONS.read_text(encoding="utf-8"))
    sentence, options = about(name)
    assert sentence == known["heads"][name]["meaning"]
    said = {one.name: one.meaning for one in options}
    assert said == {row["name"]: row["meaning"] for row in known["heads"][name]["options"]}


def test_check_scores_the_fitting_image_higher(run: Run) -> None:
    status, printed, _ = run("check", "prompt_colour", "--option", "share=0.05")
    assert status == 0
    scores = [float(value) for value in re.findall(r"sample: (\S+)", printed)]
    assert len(scores) == 2
    assert scores[0] > scores[1] + 0.2


def test_the_check_image_can_be_read() -> None:
    assert '"MARBLE"' in PROMPT
    head = prepare("ocr", {"workers": 0})
    assert try_head(head).scores.values.tolist() == [1, 0]
    head.close()


def test_check_scores_texts(run: Run, tmp_path: Path) -> None:
    code = "def length(texts, prompts):\n    return [len(text) for text in texts]\n"
    (tmp_path / "mine.py").write_text(code)
    status, printed, _ = run("check", "--texts", f"{tmp_path / 'mine.py'}:length")
    assert status == 0
    assert "fitting sample: 31" in printed


def test_check_says_what_is_wrong(run: Run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        from rewards import RewardHead

        class Absent(RewardHead):
            def load(self):
                raise OSError("no weights")

            def score(self, batch):
                return 1 / 0
        """)
    )
    absent = f"{tmp_path / 'mine.py'}:Absent"
    for arguments, reason in (
        (["sharpnes"], "Did you mean 'sharpness'"),
        (["sharpness", "--option", "x=1"], 'has no option "x"'),
        (["remote", "--option", "url=http://localhost:1", "--option", "remote_name=x"], "Refused"),
        ([absent], "Downloads are forbidden by HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"),
        (["sharpness", "--texts"], "Found a batch of texts"),
    ):
        status, _, error = run("check", *arguments)
        assert status == 1
        assert reason in error
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE")
    assert "name their folder as `model`" in run("check", absent)[2]
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    assert run("check", "sharpness", "--option", "x")[0] == 2


def test_a_missing_package_is_told_with_the_install_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        from rewards import RewardHead

        class Needy(RewardHead):
            def __init__(self):
                raise ImportError('Install with: pip install "moa-diffusion[ocr]"')

            def score(self, batch): ...
        """)
    )
    status, _, error = run("check", f"{tmp_path / 'mine.py'}:Needy")
    assert status == 1
    assert 'Install with: pip install "moa-diffusion[ocr]"' in error


def test_whatever_a_constructor_raises_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        from rewards import RewardHead

        class Boom(RewardHead):
            def __init__(self):
                raise RuntimeError("cannot")

            def score(self, batch): ...
        """)
    )
    status, _, error = run("check", f"{tmp_path / 'mine.py'}:Boom")
    assert status == 1
    assert "mine.py:Boom\": RuntimeError('cannot')" in error


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


def score(run: Run, folder: Path, head: str, output: str, *more: object) -> tuple[int, str, str]:
    files = ("--images", folder / "images", "--prompts", folder / "prompts.txt")
    return run("score", head, *files, "--output", folder / output, "--batch_size", 5, *more)


def test_score_writes_rows_in_natural_order(run: Run, folder: Path, grey: str) -> None:
    status, printed, _ = score(run, folder, grey, "out/scores.jsonl")
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


def test_score_writes_csv_and_parquet(run: Run, folder: Path, grey: str) -> None:
    assert score(run, folder, grey, "scores.csv")[0] == 0
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
    assert score(run, folder, grey, "scores.parquet")[0] == 0
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
    run: Run, folder: Path, grey: str
) -> None:
    images = folder / "images"
    rows = expected_rows()
    for number, suffix in enumerate(("gif", "jfif", "webp", "bmp", "tiff", "GIF"), start=1):
        file = images / f"{number}.png"
        with Image.open(file) as image:
            image.save(images / f"{number}.{suffix}", **LOSSLESS.get(suffix, {}))
        file.unlink()
        rows[number - 1]["file"] = f"{number}.{suffix}"
    assert score(run, folder, grey, "scores.jsonl")[0] == 0
    found = (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in found] == rows

    frames = [Image.new("RGB", (10, 8), (shade,) * 3) for shade in (0, 99)]
    frames[0].save(images / "1.gif", save_all=True, append_images=frames[1:])
    _, _, error = score(run, folder, grey, "more.jsonl")
    assert "1.gif` cannot be used: it has several frames; save the one" in error
    with pytest.raises(ValueError, match=r"1 files .* another kind than \.png, .*: notes\.txt"):
        match(images, [("p", {"file": "notes.txt"})])


def test_a_mismatch_is_told_before_anything_is_loaded(run: Run, folder: Path) -> None:
    (folder / "prompts.txt").write_text("one\ntwo\n")
    status, _, error = score(run, folder, "no_such_head", "scores.csv")
    assert status == 2
    assert "Found 12 images" in error
    assert "and 2 prompts" in error
    assert not (folder / "scores.csv").exists()


def test_a_blank_line_between_prompts_is_told_by_line(run: Run, folder: Path, grey: str) -> None:
    lines = [f"prompt {number}" for number in range(1, 13)]
    lines.insert(3, " ")
    (folder / "prompts.txt").write_text("\n".join([*lines[:-1], "", ""]))
    status, _, error = score(run, folder, grey, "scores.csv")
    assert status == 2
    assert f"{folder / 'prompts.txt'}:4: The prompt of image 4 should stand here" in error
    (folder / "prompts.txt").write_text("\n".join([*lines[:3], *lines[4:], "", ""]))
    assert score(run, folder, grey, "scores.csv")[0] == 0  # at the end they shift nothing


def test_a_failed_run_is_continued(run: Run, folder: Path, grey: str) -> None:
    file = folder / "images" / "12.png"
    whole = file.read_bytes()
    file.write_bytes(b"broken")
    partial = folder / "scores.jsonl.partial.sqlite"
    assert score(run, folder, grey, "scores.jsonl")[0] == 2
    before = partial.read_bytes()
    assert score(run, folder, grey, "scores.jsonl")[0] == 2
    assert partial.read_bytes() == before  # the same failure loses nothing
    file.write_bytes(whole)
    status, printed, _ = score(run, folder, grey, "scores.jsonl")
    assert status == 0
    assert "10 of 12 scores are in" in printed
    found = (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in found] == expected_rows()
    assert not partial.exists()


def test_the_scores_of_another_head_are_refused_and_kept(run: Run, folder: Path, grey: str) -> None:
    partial = folder / "scores.csv.partial.sqlite"
    assert score(run, folder, grey, "scores.csv", "--option", "limit=210")[0] == 1
    before = partial.read_bytes()
    status, _, error = score(run, folder, grey, "scores.csv", "--option", "limit=220")
    assert (status, partial.read_bytes()) == (2, before)
    assert "of another head, of other options or weights" in error
    Image.new("RGB", (10, 8), (99,) * 3).save(folder / "images" / "4.png")
    status, printed, _ = score(run, folder, grey, "scores.csv", "--option", "limit=210")
    assert status == 1
    assert "9 of 12 scores are in" in printed, "an image that has changed is scored anew"
    partial.write_text("file,score\n")
    status, _, error = score(run, folder, grey, "scores.csv")
    assert (status, partial.read_text()) == (2, "file,score\n")
    assert "holds no scores that can be read" in error


def test_what_was_scored_survives_a_failure(run: Run, folder: Path, grey: str) -> None:
    status, printed, error = score(run, folder, grey, "scores.csv", "--option", "limit=210")
    assert status == 1
    assert "too bright" in error
    assert "10 of 12 scores are kept in" in printed
    assert (folder / "scores.csv.partial.sqlite").is_file()
    assert not (folder / "scores.csv").exists()
    (folder / "images" / "12.png").write_bytes(b"\x89PNG broken")
    status, printed, error = score(run, folder, grey, "other.csv")
    assert status == 2
    assert "12.png` cannot be used" in error
    assert "10 of 12" in printed
    Image.new("RGBA", (10, 8)).save(folder / "images" / "1.png")
    status, printed, error = score(run, folder, grey, "third.csv")
    assert "transparent" in error
    assert "kept" not in printed
    assert list(folder.glob("third*")) == []


def test_score_refuses_other_formats(run: Run, folder: Path, tmp_path: Path, monkeypatch) -> None:
    assert "should end in one of" in score(run, folder, "sharpness", "scores.xlsx")[2]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "moa-diffusion\[report\]"'):
        ScoreTable(tmp_path / "scores.parquet", [])


def test_serve_in_a_process_of_its_own() -> None:
    options = json.dumps({"sharpness": None, "prompt_colour": {"share": 0.5}})
    command = [python(), str(SCRIPT), "serve", "--port", "0", "--options", options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = []
            while not lines or "Serving" not in lines[-1]:
                lines.append(process.stdout.readline())
                assert lines[-1], lines
            url = re.search(r"http://\S+", lines[-1]).group()
            head = create("remote", url=url, remote_name="prompt_colour")
            head.load()
            images = torch.from_numpy(np.random.default_rng(0).random((3, 3, 16, 16))).float()
            batch = RewardBatch(prompts=["red", "nothing", "a blue cat"], images=images)
            local = create("prompt_colour", share=0.5)(batch)
            # The same head in another process, maybe with more threads: some roundings of 6e-8.
            torch.testing.assert_close(head(batch), local, rtol=1e-6, atol=0, equal_nan=True)
            assert head.unit == create("prompt_colour").unit
            with pytest.raises(RewardError, match="Served: sharpness, prompt_colour"):
                create("remote", url=url, remote_name="ocr").load()
            process.send_signal(signal.SIGTERM)
            assert process.wait(HANG) == 0
            assert process.stdout.read() == "Stopped.\n"
        finally:
            process.kill()
    assert lines[0] == "[1/2] loading sharpness ...\n"
    assert re.fullmatch(r"\[1/2\] sharpness: \d+\.\d s, digest \w{12}\n", lines[1])


def test_a_signal_whose_exception_is_lost_ends_the_server_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a callback of an import, whose exceptions Python ignores."""

    def prepared(*given: Any) -> Any:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        return prepare(*given)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "prepare", prepared)
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: pytest.fail("it serves"))
    cli.serve({"sharpness": {}}, host="127.0.0.1", port=0, token="", limits=Limits())
    assert capsys.readouterr().out.endswith("Stopped.\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_head_that_cannot_load_stops_the_server(run: Run) -> None:
    options = json.dumps({"remote": {"url": "http://localhost:1", "remote_name": "x"}})
    status, printed, error = run("serve", "--port", "0", "--options", options)
    assert status == 1
    assert "[1/1] loading remote" in printed
    pairs = ("--option", "url=http://localhost:1", "--option", "remote_name=x")
    assert error == run("check", "remote", *pairs)[2]  # the same words
    assert "Serving" not in printed


def test_beyond_loopback_a_token_is_needed(run: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv(cli.TOKEN_VARIABLE, raising=False)
    for host in ("0.0.0.0", "::", "example.org"):
        status, printed, error = run("serve", "--heads", "sharpness", "--host", host)
        assert status == 2
        assert "the server needs a token" in error
        assert "loading" not in printed
    (tmp_path / "token").write_text(" se cret\n")
    status, _, error = run("serve", "--heads", "sharpness", "--token_file", tmp_path / "token")
    assert "without white space" in error
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        cli.read_token(tmp_path / "token")
    with pytest.raises(ValueError, match="cannot be read"):
        cli.read_token(tmp_path / "none")
    monkeypatch.setenv(cli.TOKEN_VARIABLE, "secret")
    assert cli.read_token(None) == "secret"


def test_a_port_that_is_taken_is_told_before_loading(run: Run) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        status, printed, error = run("serve", "--heads", "sharpness", "--port", port)
    assert status == 2
    assert "in use" in error
    assert "loading" not in printed


def test_a_server_without_its_packages_is_told_before_loading(run: Run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, printed, error = run("serve", "--heads", "sharpness", "--port", 0)
    assert status == 2
    assert 'needs uvicorn. Install with: pip install "moa-diffusion[server]"' in error
    assert "loading" not in printed


def test_heads_are_chosen_from_a_training_config(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("rewards:\n  text: {head: ocr, weight: 2.0, workers: 1}\n  sharpness:\n")
    everything = {"text": {"head": "ocr", "weight": 2.0, "workers": 1}, "sharpness": {}}
    assert cli.chosen_heads(None, config, None) == everything
    assert cli.chosen_heads("sharpness, ocr", config, None) == {"sharpness": {}, "ocr": {}}
    assert cli.chosen_heads("ocr", None, '{"ocr": {"workers": 1}}') == {"ocr": {"workers": 1}}
    for arguments, reason in (
        ((None, None, None), "Name the heads"),
        (("ocr,ocr", None, None), "each once"),
        (("ocr", None, "{"), "should be JSON"),
        (("ocr", None, '{"ocr": 3}'), "should read"),
        (("ocr", None, '{"sharpness": {}}'), "not served: sharpness"),
        (("ocr", tmp_path / "none.yaml", None), "cannot be read"),
    ):
        with pytest.raises(ValueError, match=reason):
            cli.chosen_heads(*arguments)


def test_options_are_json_or_text() -> None:
    parsed = cli.parse_options(["a=1e-3", "b=true", "c=cuda:0", "d=x=y", 'e=["u", "v"]', "f=null"])
    assert parsed == {
        "a": 0.001,
        "b": True,
        "c": "cuda:0",
        "d": "x=y",
        "e": ["u", "v"],
        "f": None,
    }
    with pytest.raises(ValueError, match="key=value"):
        cli.parse_options(["a"])
