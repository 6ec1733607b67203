"""The file that keeps a calibration: its keys, and what is damaged in it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from calibrations import NAN, calibrated, matrix, normal
from moa_diffusion.storage.calibration_file import load, save
from moa_diffusion.types import ConfigError


def test_the_file_has_exactly_the_promised_keys(tmp_path: Path):
    path = tmp_path / "new" / "calibration.json"
    values = normal(2, 16)
    values[1] = NAN
    save(calibrated(matrix(values)), path)
    written = json.loads(path.read_text())
    assert list(written) == [
        *("version", "model", "prompts", "images", "seed", "objectives", "correlations"),
    ]
    assert written["version"] == 1
    assert list(written["objectives"]["a"]) == [
        *("mean", "std_total", "std_within", "std_between", "min", "max", "at_min", "at_max"),
        *("applies", "zero_variance", "retest_std", "milliseconds"),
        *("share_static", "share_gdpo", "share_dual_stage", "base", "target", "bound"),
    ]
    assert written["objectives"]["b"]["mean"] is None
    assert written["correlations"]["names"] == ["a", "b"]
    assert written["correlations"]["values"][1] == [None, None]
    assert [file.name for file in path.parent.iterdir()] == ["calibration.json"]


def changed(path: Path, dotted: str, value: Any) -> None:
    """Set a key of the file, or remove it if the value is `...`."""
    whole = json.loads(path.read_text())
    *parents, last = dotted.split(".")
    inner = whole
    for parent in parents:
        inner = inner[parent]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 2, "`version` should be 1. Found 2."),
        ("version", ..., "`version` should be 1. Found none."),
        ("seed", ..., "should have the key `seed`. Found version, model"),
        ("images", "8", "`images` should be of type int. Found '8'."),
        ("objectives", [], "`objectives` should hold a mapping. Found []."),
        ("objectives.a", ..., "`objectives` should hold 'a', which this run has. Found b."),
        ("objectives.a.mean", ..., "`objectives.a` should have the key `mean`. Found std_total"),
        ("objectives.a.mena", 1, "`objectives.a` should have the keys mean, std_total"),
        ("objectives.a.mean", "1", "`objectives.a.mean` should be a finite number or null. Fou"),
        ("objectives.a.mean", True, "`objectives.a.mean` should be a finite number or null. Fou"),
        ("objectives.a.mean", math.inf, "should be a finite number or null. Found inf."),
        ("correlations.names", ["b", "a"], "`correlations.names` should be the objectives ['a', "),
        ("correlations.values", [[1, 0]], "`correlations.values` should be 2 rows of 2. Found [["),
        ("correlations.values", 1, "`correlations.values` should be 2 rows of 2. Found 1."),
    ],
)
def test_a_damaged_file_says_where(tmp_path: Path, key: str, value: Any, message: str):
    path = tmp_path / "calibration.json"
    save(calibrated(matrix(normal(2, 16))), path)
    changed(path, key, value)
    with pytest.raises(ConfigError) as caught:
        load(path, ["a"])
    assert str(caught.value).startswith(f"Calibration file `{path}`")
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "\udcff"])
def test_what_is_no_json_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "calibration.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"calibration.json` should be JSON. Found: "):
        load(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"should hold a mapping. Found \[\]"):
        load(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none.json` should be what scripts/calibrate.py wrote"):
        load(tmp_path / "none.json")
