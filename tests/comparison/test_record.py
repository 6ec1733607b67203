"""A record of a finished run stands for its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from written_runs import write_run

from moa_diffusion import config
from moa_diffusion.comparison.plan import PlannedRun
from moa_diffusion.comparison.plot import (
    mean_weights,
)
from moa_diffusion.comparison.record import read_record, write_record
from moa_diffusion.comparison.results import (
    compare,
    table,
)
from moa_diffusion.types import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def recorded(
    folder: Path,
    name: str,
    gains: Sequence[Mapping[str, float]],
    key: str = "seed",
    value: str = "0",
) -> PlannedRun:
    """A finished run of two rewards, with an option."""
    write_run(folder / name, gains, noise=0.3, missing=[2])
    only = ["--rewards.jpeg_compressibility", "null", "--rewards.colourfulness", "null"]
    recipe = str(ROOT / "configs" / "tiny_apex.yaml")
    settings = config.load(recipe, [*only, f"--{key}", value])
    return PlannedRun(method="apex", seed=0, folder=folder / name, settings=settings)


def test_a_record_gives_the_table_that_the_folder_gives(tmp_path: Path) -> None:
    gains = [{"ocr": 0.5, "sharpness": 0.25}, {"ocr": 1.0, "sharpness": -0.5}]
    run = recorded(tmp_path, "apex-0", gains)
    path = tmp_path / "kept" / "apex-0.json"
    write_record(path, run, {"torch": "1.2"})
    found, made_with = read_record(path, run)
    assert made_with == {"torch": "1.2"}
    # Sums are kept to five digits.
    for kept, whole in zip(
        (once := compare([found])).methods, (twice := compare([run.read()])).methods, strict=True
    ):
        for name in twice.names:
            for part in ("value", "low", "high"):
                assert getattr(kept.gains[name], part) == pytest.approx(
                    getattr(whole.gains[name], part), rel=1e-3
                )
        assert kept.hypervolume.value == pytest.approx(whole.hypervolume.value, rel=1e-3)
        assert kept.shares == whole.shares
        assert kept.minutes == pytest.approx(whole.minutes)
    assert table(once, {}) == table(twice, {})
    assert mean_weights([found], "ocr") == mean_weights([run.read()], "ocr")
    assert str(tmp_path) not in path.read_text()
    assert path.stat().st_size < 10_000


def test_a_record_of_another_run_is_refused(tmp_path: Path) -> None:
    run = recorded(tmp_path, "apex-0", [{"ocr": 0.5, "sharpness": 0.25}])
    path = tmp_path / "apex-0.json"
    write_record(path, run, {})
    for key, value in (("optimizer.lr", "1e-2"), ("objectives.weighting.floor", "0.1")):
        changed = recorded(tmp_path / key, "apex-0", [{"ocr": 0.5, "sharpness": 0.25}], key, value)
        with pytest.raises(ConfigError, match=rf"{key}: should be .* as in .*apex-0.json"):
            read_record(path, changed)


@pytest.mark.parametrize("text", ["<<<<<<< HEAD\n{}", "{}", "[]"])
def test_a_file_that_is_no_record_is_named(text: str, tmp_path: Path) -> None:
    run = recorded(tmp_path, "apex-0", [{"ocr": 0.5, "sharpness": 0.25}])
    path = tmp_path / "apex-0.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"apex-0.json` should be a run's record"):
        read_record(path, run)
