"""Which runs a comparison has, and what is refused before one begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from small_comparison import FAST, planned, write_folder
from written_runs import gain, write_run

from moa_diffusion import config
from moa_diffusion.comparison.plan import PlannedRun, method_settings, plan_comparison
from moa_diffusion.types import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_method_changes_its_sections_alone_and_says_what_it_leaves_out(folder: Path) -> None:
    found = planned(methods=["dual_stage", "static", "mild.yaml"], seeds="2", minutes=1.5)
    assert [run.name for run in found.runs] == [
        *("dual_stage-0", "dual_stage-1", "static-0", "static-1", "mild-0", "mild-1")
    ]
    first, *_, last = (run.settings for run in found.runs)
    assert first.objectives.normalizer == {"floor": 0.5}
    assert (last.objectives.method, last.objectives.normalizer) == ("gdpo", {})
    assert (last.loss.kl_weight, last.loss.clip_range) == (0.01, 1e-3)
    assert (last.trainer.steps, last.trainer.minutes, last.seed) == (2, 1.5, 1)
    assert found.notes == (
        "static: objectives.normalizer.floor is left out, it is not meant for Raw.",
        "mild: of `mild.yaml` only objectives, loss count, not trainer.",
        "mild: objectives.normalizer.floor is left out, it is not meant for GDPO.",
    )
    settings, notes = method_settings("fast.yaml", ["--loss.kl_weight", "0.5"], "mild.yaml")
    assert settings.loss.kl_weight == 0.5  # options are for every run
    assert len(notes) == 2
    assert planned("--seed", "7", seeds="2").runs[1].seed == 8
    assert [run.seed for run in planned("--seed", "7", seeds="5,0").runs] == [5, 0]
    # What the name of a method fixes is no option of it.
    weighting = ("--objectives.weighting.aggregator", "mgda")
    settings, notes = method_settings("fast.yaml", weighting, "upgrad")
    assert settings.objectives.weighting == {}
    assert "aggregator is left out" in notes[0]


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], {"methods": ["statc"]}, "unknown method 'statc'. Did you mean 'static'?"),
        ([], {"methods": []}, "--methods: should name at least one method"),
        ([], {"methods": ["gdpo", "gdpo"]}, "should name a method once. Found 'gdpo' twice"),
        ([], {"methods": ["mild", "mild.yaml"]}, "unknown method 'mild'"),
        ([], {"methods": ["none.yaml"]}, "Found no file `none.yaml`"),
        ([], {"methods": ["typo.yaml"]}, "`typo.yaml`: objectives.metod: unknown key"),
        ([], {"methods": ["empty.yaml"]}, "should have at least one of the sections"),
        ([], {"methods": ["own.yaml"]}, "objectives.weighting.depth: unknown option of Static"),
        ([], {"seeds": "0"}, "Found '0'. The seed 0 alone is `0,`."),
        ([], {"parallel": 0}, "--parallel: should be at least 1. Found 0"),
        ([], {"minutes": 0.0}, "--minutes-per-run: should be positive. Found 0"),
        (["--evaluation.every", "0"], {}, "evaluation.every: should be at least 1"),
        (["--evaluation.images_per_prompt=1"], {}, "images_per_prompt: should be at least 2"),
        (["--objectives.method=gdpo"], {}, "objectives.method: is set for each run"),
        (["--output_dir", "x"], {}, "output_dir: is set for each run by the comparison: use --out"),
        (["--trainer.minutes", "1"], {"minutes": 2.0}, "use --minutes-per-run"),
        (["--trainer.step", "1"], {}, "Did you mean 'trainer.steps'?"),
        (["--trainer.groups", "3", "--trainer.updates", "5"], {}, "should be a multiple of"),
    ],
)
def test_bad_input_is_found_before_anything_runs(
    folder: Path, overrides: list[str], options: dict[str, Any], message: str
) -> None:
    (folder / "typo.yaml").write_text("objectives: {metod: gdpo}")
    (folder / "empty.yaml").write_text("trainer: {steps: 3}")
    (folder / "own.yaml").write_text("objectives: {method: static, weighting: {depth: 3}}")
    with pytest.raises(ConfigError) as caught:
        planned(*overrides, **options)
    assert message in str(caught.value)
    assert not (folder / "out").exists()


def test_one_objective_or_a_changed_configuration_is_an_error(folder: Path) -> None:
    one = FAST | {"rewards": {"colourfulness": {}}}
    (folder / "one.yaml").write_text(yaml.safe_dump(one))
    with pytest.raises(ConfigError, match=r"at least two objectives.*Found colourfulness"):
        plan_comparison("one.yaml", [], methods=["static"], seeds="1", output=folder / "out")
    (run,) = planned().runs
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(config.to_yaml(run.settings))
    assert planned().runs == (run,)
    changed = r"loss.kl_weight: should be 0.0, as `out/static-0` began. Found 0.1. Another --output"
    with pytest.raises(ConfigError, match=changed):
        planned("--loss.kl_weight", "0.1")
    with pytest.raises(ConfigError, match=r"trainer.minutes: should be 0.0.*Found 3.0"):
        planned(minutes=3.0)
    (run.folder / "config.yaml").rename(run.folder / "thesis.txt")
    with pytest.raises(ConfigError, match="`out/static-0` should be a run of this comparison"):
        planned()


def test_a_run_is_finished_when_its_steps_or_its_minutes_are_over(tmp_path: Path) -> None:
    write_run(tmp_path / "a-0", [gain(1, 1)])  # 15 rollouts of 3 seconds

    def finished(steps: int, minutes: float) -> bool:
        settings = config.from_dict({"trainer": {"steps": steps, "minutes": minutes}})
        run = PlannedRun(method="a", seed=0, folder=tmp_path / "a-0", settings=settings)
        assert run.completed() == 15
        return run.finished()

    assert finished(15, 0.0)
    assert not finished(16, 0.0)
    assert finished(16, 0.75)
    assert not finished(16, 0.76)
    (tmp_path / "a-0" / "evaluation" / "step-000015.jsonl").unlink()
    assert not finished(15, 0.0)
