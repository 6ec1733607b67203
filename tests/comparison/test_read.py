"""What is read of finished runs, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from written_runs import NAMES, UNITS, compared, gain, write_run

from moa_diffusion.comparison.read import read_run, training_seconds
from moa_diffusion.comparison.results import (
    compare,
    read_pair,
    start_units,
)
from moa_diffusion.storage.log import read_metrics
from moa_diffusion.types import ConfigError


def test_time_and_shares_come_from_the_metrics(tmp_path: Path) -> None:
    (method,) = compared(tmp_path, {"a": [[gain(1, 1), gain(1, 1)]]}).methods
    assert method.rollouts == 30
    assert method.minutes == pytest.approx(30 * 3 / 60)  # without evaluations
    assert method.biggest() == ("ocr", pytest.approx(0.8))  # null is left out, not 0
    assert method.seconds["sample"] == pytest.approx(2.0)
    assert method.seconds["evaluate"] == pytest.approx(2 * 6 / 30)
    assert training_seconds(read_metrics(tmp_path / "a-0" / "metrics.jsonl")) == pytest.approx(90)


def test_missing_rewards_stay_out(tmp_path: Path) -> None:
    found = compared(tmp_path, {"a": [[gain(1.0, 0.5)]]}, missing=range(7))
    (method,) = found.methods
    assert found.units == pytest.approx(UNITS)
    assert method.gains["ocr"].value == pytest.approx(1.0)
    assert method.gains["ocr"].high == pytest.approx(1.0)  # resamples without any prompt of it too
    assert method.worst.value == pytest.approx(0.5)
    assert method.hypervolume.value == pytest.approx(0.5)
    # A sample scored only after training is not paired with anything.
    path = tmp_path / "a-0" / "evaluation" / "step-000000.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[9]["reward/ocr"] = None
    path.write_text("\n".join(json.dumps(row) for row in rows))
    (run,) = compare([read_run(tmp_path / "a-0", method="a", seed=0, names=NAMES)]).runs
    # Of the prompt's images 1, -1, -1 are left, whose spread, sqrt(4/3), is that of 1, -1, 1, -1.
    assert run.gains["ocr"] == pytest.approx(1.0)


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "flat", [gain(1, 1)], spread=0.0)
    write_run(tmp_path / "single", [gain(1, 1)], images=1)
    write_run(tmp_path / "other", [gain(1, 1)], prompts=9)
    write_run(tmp_path / "good", [gain(1, 1)])
    write_run(tmp_path / "nowhere", [gain(1, 1)], missing=range(10))

    def read(name: str) -> Any:
        return read_run(tmp_path / name, method="a", seed=0, names=NAMES)

    with pytest.raises(ValueError, match=r"Objective `ocr` should vary within a prompt.*Found 0"):
        read("flat")
    with pytest.raises(ValueError, match=r"Objective `ocr` should vary.*Found nan"):
        read("nowhere")
    with pytest.raises(ValueError, match="`images_per_prompt` should be at least 2"):
        read("single")
    with pytest.raises(ValueError, match="other` should have the held-out samples"):
        start_units([read("good"), read("other")])
    with pytest.raises(ValueError, match="should have the reward 'no'"):
        read_run(tmp_path / "good", method="a", seed=0, names=["no"])
    with pytest.raises(ValueError, match="No run has finished"):
        compare([])
    (tmp_path / "good" / "evaluation" / "step-000000.jsonl").unlink()
    with pytest.raises(ValueError, match=r"Found steps \[15\]"):
        read("good")
    with pytest.raises(ConfigError, match=r"--pair: should name two of ocr, colour. Found 'ocr'"):
        read_pair("ocr", NAMES)
    assert read_pair("colour, ocr", NAMES) == ("colour", "ocr")
