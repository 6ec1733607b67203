"""The studies in docs/results can be run; training them is not a test's business."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

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
        assert len({str(run.settings.prompts.heldout) for run in of_set}) == 1
        if path.stem != "words":  # which compares lists of training prompts
            assert len({str(run.settings.prompts.train) for run in of_set}) == 1
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
        "sampling.sampler": "flow_sde",
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


Call: TypeAlias = Callable[..., int]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Writes a small study's finished runs, and calls it, with its files in ``tmp_path``."""
    path, runs, kept = tmp_path / "small.yaml", tmp_path / "runs", tmp_path / "kept"
    text = SMALL.replace("RECIPE", str(ROOT / "configs" / "tiny_apex.yaml"))

    def made(*options: str, unfinished: str = "", old: str = "", new: str = "") -> int:
        path.write_text(text.replace(old, new), encoding="utf-8")
        for run in study.planned(yaml.safe_load(text), runs)["two"] if unfinished else ():
            worst = 0.5 if run.method == "apex" else -0.25
            if run.name not in unfinished.split():
                write_run(run.folder, [{"ocr": worst, "sharpness": 1.0}], seed=run.seed)
                # What training writes into the folder, so that the study knows its own runs.
                (run.folder / "config.yaml").write_text(config.to_yaml(run.settings))
        words = ["study.py", str(path), "--output", str(runs), "--records", str(kept), *options]
        monkeypatch.setattr("sys.argv", words)
        return study.main()

    return made


def test_records_stand_for_the_folders_of_runs(
    tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished runs are recorded; then tables are made, and runs skipped, without the folders."""
    runs, kept = tmp_path / "runs", tmp_path / "kept"
    assert call("--tables", unfinished="two-static-2") == 0
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

    assert call("--tables", old="steps: 15", new="steps: 30") == 2
    assert "trainer.steps: should be 15, as in" in capsys.readouterr().err


def test_a_table_names_all_versions_that_its_runs_were_made_with(
    tmp_path: Path, call: Call
) -> None:
    """A record of other libraries stays as it is."""
    kept = tmp_path / "kept"
    assert call("--tables", unfinished="two-static-2") == 0
    path = kept / "two-apex-1.json"
    now = json.loads((kept / "two.json").read_text())["made_with"]
    assert [one["runs"] for one in now] == [3]
    path.write_text(path.read_text().replace(f'"torch": "{now[0]["torch"]}"', '"torch": "0.9"'))
    assert call("--tables") == 0
    table = (kept / "two.md").read_text()
    assert re.search(r"Runs made with .*torch 0\.9,.*: 1\.", table)
    assert re.search(rf"Runs made with .*torch {re.escape(now[0]['torch'])},.*: 2\.", table)
    assert {one["runs"] for one in json.loads((kept / "two.json").read_text())["made_with"]} == {
        1,
        2,
    }


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (ValueError("no"), 2)])
def test_what_has_finished_is_kept_when_a_call_ends_early(
    error: BaseException,
    status: int,
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ended(*_: Any, **__: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(study, "execute", ended)
    assert call(unfinished="two-static-1 two-static-2") == status
    assert {file.name for file in (tmp_path / "kept").glob("two-*")} == {
        "two-apex-1.json",
        "two-apex-2.json",
    }


def test_a_run_with_a_record_is_not_trained_again(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the commit is that of the runs which the call has finished, not of earlier ones."""
    assert call("--tables", unfinished="two-static-2") == 0
    shutil.rmtree(tmp_path / "runs")
    asked = []

    def execute(runs: Any, **_: Any) -> dict[str, str]:
        for run in runs:
            asked.append(run.name)
            write_run(run.folder, [{"ocr": 1.0, "sharpness": 1.0}])
        return {}

    monkeypatch.setattr(study, "execute", execute)
    monkeypatch.setattr(study, "commit", lambda: "0123abcd")
    assert call() == 0
    assert asked == ["two-static-2"]
    records = {path.stem: read(path) for path in (tmp_path / "kept").glob("two-*.json")}
    named = {name for name, record in records.items() if "commit" in record["made_with"]}
    assert named == {"two-static-2"}
    assert len(records) == 4


def test_ways_without_a_common_seed_have_no_difference(tmp_path: Path, call: Call) -> None:
    assert call("--tables", unfinished="two-apex-2 two-static-1") == 0
    assert re.search(r"\| static +\| +- \| +0 \|", (tmp_path / "kept" / "two.md").read_text())


@pytest.mark.parametrize("role", ["subject", "reference"])
def test_a_study_asks_about_ways_that_it_has(
    role: str, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    way = {"subject": "apex", "reference": "static"}[role]
    assert call("--tables", old=f"{role}: {way}", new=f"{role}: {way}s") == 2
    assert f"{role}: should be one of apex, static. Found '{way}s'. Did you mean '{way}'?" in (
        capsys.readouterr().err
    )


def test_the_commit_of_the_code_is_told_if_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "scripts" / "train_sd.py"
    monkeypatch.setattr(study, "SCRIPT", script)
    assert study.commit() == ""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    code = tmp_path / "moa_diffusion" / "code.py"
    for folder in (code.parent, tmp_path / "rewards"):
        folder.mkdir()
        (folder / "code.py").write_text("1")
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    for words in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "code")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    assert re.fullmatch("[0-9a-f]{12}", found := study.commit())
    (tmp_path / "table.md").write_text("a result is no change of the code")
    assert study.commit() == found
    code.write_text("2")
    assert study.commit() == found + "+"
