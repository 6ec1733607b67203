"""The studies in docs/results can be run; training them is not a test's business."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import study
import yaml
from written_runs import write_run

from moa_diffusion import assembly, config
from moa_diffusion.types import ConfigError

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "docs" / "results").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_run_of_a_study_can_be_made(path: Path, tmp_path: Path) -> None:
    values = read(path)
    runs = study.planned(values, tmp_path)
    assert runs.keys() == values["sets"].keys() == values["recipes"].keys()
    for of_set in runs.values():
        assert len({run.folder for run in of_set}) == len(of_set)
        assert len(of_set) == len(values["seeds"]) * len(values["ways"])
        for run in of_set:
            assembly.objectives(run.settings)
        # Gains are compared on the same samples, in the same unit.
        assert len({run.settings.evaluation.seed for run in of_set}) == 1
        assert len({str(run.settings.prompts) for run in of_set}) == 1
        assert len({str(run.settings.rewards) for run in of_set}) == 1


def test_losses_are_compared_at_equal_forward_passes(tmp_path: Path) -> None:
    values = read(ROOT / "docs" / "results" / "losses.yaml")
    for of_set in study.planned(values, tmp_path).values():
        for run in of_set:
            spent = study.passes(run.settings) * run.settings.trainer.steps
            assert spent == pytest.approx(405, abs=study.passes(run.settings) / 2)


def test_passes_are_those_of_sampling_of_training_and_of_what_it_compares_with() -> None:
    recipe = "configs/tiny_apex.yaml"
    forward = {
        "loss.kind": "forward",
        "loss.clip_range": 1e-4,
        "loss.kl_weight": 0.1,
        "loss.forward.draws": 2,
        "sampling.window": 0,
        "sampling.window_mode": "random",
        "sampling.noise_level": 0.7,
        "sampling.shared_start": False,
    }
    found = [
        study.passes(study.settings(recipe, options, 0, Path("nowhere")))
        for options in (
            {},  # 6 steps, 3 of them trained
            {"loss.kl_weight": 0.1},
            {"loss.norm_weight": 0.1},
            forward | {"loss.forward.preset": "ram"},  # the reference
            forward | {"loss.forward.preset": "nft"},  # the old copy, and the reference
            forward | {"loss.forward.preset": "nft", "loss.kl_weight": 0.0},
        )
    ]
    assert found == [9, 12, 12, 10, 12, 10]


def test_a_run_that_cannot_be_made_is_told_before_the_first(tmp_path: Path) -> None:
    values = read(STUDIES[0])
    values["ways"]["wrong"] = {"loss.kl_wieght": 1}
    with pytest.raises(ConfigError, match=r"loss\.kl_wieght"):
        study.planned(values, tmp_path)


SMALL = """
recipes: {two: RECIPE}
sets: {two: {rewards.jpeg_compressibility: null, rewards.colourfulness: null}}
seeds: [1, 2]
common: {trainer.steps: 15}
subject: apex
reference: static
ways:
  apex: {}
  static: {method: static}
"""


def test_records_stand_for_the_folders_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished runs are recorded; then tables are made, and runs skipped, without the folders."""
    path, runs, kept = tmp_path / "small.yaml", tmp_path / "runs", tmp_path / "kept"
    text = SMALL.replace("RECIPE", str(ROOT / "configs" / "tiny_apex.yaml"))
    path.write_text(text, encoding="utf-8")
    for run in study.planned(yaml.safe_load(text), runs)["two"]:
        worst = 0.5 if run.method == "apex" else -0.25
        if (run.method, run.seed) != ("static", 2):  # one that has not finished
            write_run(run.folder, [{"ocr": worst, "sharpness": 1.0}], seed=run.seed)
            # What training writes into the folder, so that the study knows its own runs.
            (run.folder / "config.yaml").write_text(config.to_yaml(run.settings))

    def call(*options: str) -> int:
        words = ["study.py", str(path), "--output", str(runs), "--records", str(kept), *options]
        monkeypatch.setattr("sys.argv", words)
        return study.main()

    assert call("--tables") == 0
    names = {"two-apex-1", "two-apex-2", "two-static-1", "two"}
    assert {file.stem for file in kept.glob("*.json")} == names
    first = (kept / "two.md").read_text()
    assert "+0.75 [+0.75, +0.75]" in first  # apex less static, of seed 1
    assert "static's best worst gain is -0.250" in first
    assert json.loads((kept / "two.json").read_text())["made_with"][0]["torch"]
    assert (kept / "two.png").stat().st_size > 10_000

    shutil.rmtree(runs)
    capsys.readouterr()
    assert call("--tables") == 0
    assert (kept / "two.md").read_text() == first
    assert not runs.exists()

    path.write_text(text.replace("steps: 15", "steps: 30"))
    assert call("--tables") == 2
    assert "trainer.steps: should be 15, as in" in capsys.readouterr().err
