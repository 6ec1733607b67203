"""Calibration as a user runs it, and what it says."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from moa_diffusion.storage.calibration_file import load

ROOT = Path(__file__).resolve().parents[2]
FAST = {
    "policy": {"path": "tiny", "max_sequence_length": 16, "lora": {"rank": 4}},
    "sampling": {"resolution": 32, "steps": 3, "guidance": 1.0, "shared_start": True},
    "prompts": {"train": "tiny"},
    "rewards": {"prompt_colour": {}, "colourfulness": {}},
    "trainer": {"groups": 4, "group_size": 4, "updates": 1, "sample_batch": 3},
    "evaluation": {"every": 0},
}
TOY = FAST | {"policy": {"name": "toy"}, "sampling": {"steps": 3}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fast.yaml").write_text(yaml.safe_dump(FAST))
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY))
    monkeypatch.chdir(tmp_path)
    return tmp_path


Here = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs the script in this process: exit status, stdout, stderr."""
    script = str(ROOT / "scripts" / "calibrate.py")

    def start(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
        printed = capsys.readouterr()
        return int(str(ended.value.code)), printed.out, printed.err

    return start


def test_the_script_leaves_what_it_promises(folder: Path, here: Here):
    """The two rewards of the shipped pipeline: one of them hijacks, and the script says which."""
    options = ("--prompts", "4", "--images", "4", "--seed", "5", "--output", "out")
    status, said, log = here("--config", "fast.yaml", *options, "--rewards.prompt_colour.weight=2")
    assert status == 0, log
    assert "\ncalibrate: 4 of 4 [" in f"\n{log}"
    assert re.search(r"colourfulness will hijack: it has (9|10)\d", said)
    assert "share, raw weighted sum" in said

    found = load(folder / "out" / "calibration.json", ["prompt_colour", "colourfulness"])
    assert (found.model, found.prompts, found.images, found.seed) == ("tiny", 4, 4, 5)
    assert found.hijacker() == "colourfulness"
    for row in found.objectives.values():
        assert row.applies == 1
        assert row.retest_std == 0
        assert row.milliseconds > 0
        assert row.min <= row.mean <= row.max
        assert row.target > row.base == row.mean
    assert found.objectives["prompt_colour"].max <= 1
    lines = (folder / "out" / "scores.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 16
    assert len({row["prompt"] for row in rows}) == 4
    mean = sum(row["reward/colourfulness"] for row in rows) / 16
    assert mean == pytest.approx(found.objectives["colourfulness"].mean)  # float64
    with Image.open(folder / "out" / "calibration.png") as drawn:
        assert drawn.width > 400
        assert len(drawn.convert("RGB").getcolors(maxcolors=2**24)) > 100


def test_bad_input_says_what_was_expected_and_found(
    folder: Path, here: Here, monkeypatch: pytest.MonkeyPatch
):
    toy = ("--config", "toy.yaml")
    cases = [
        ((*toy, "--images", "1"), "--images: should be at least 2"),
        ((*toy, "--prompts", "0"), "--prompts: should be at least 1. Found 0"),
        ((*toy, "--trainer.step", "3"), "unknown key. Did you mean 'trainer.steps'?"),
        ((*toy, "--prompts.train", "none.txt"), "Prompt file `none.txt` does not exist"),
        ((*toy, "--rewards.ocrr.weight", "1"), 'rewards.ocrr: Unknown reward head "ocrr"'),
        (("--config", "none.yaml"), "config: should be a YAML file. Found no file `none.yaml`"),
    ]
    for options, message in cases:
        status, _, log = here(*options)
        assert status == 2, (options, log)
        assert message in log, (options, log)
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, log = here(*toy)
    assert (status, "calibration runs in one process" in log) == (2, True), log
    assert not (folder / "runs").exists()
