"""Every option of a run is written down, and what is written down is the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moa_diffusion.assembly import METHODS
from moa_diffusion.assembly.defaults import changes, flat, with_defaults
from moa_diffusion.assembly.methods import objectives
from moa_diffusion.assembly.scorers import heads
from moa_diffusion.config import Config, check, from_dict, load, to_yaml
from moa_diffusion.types import ConfigError
from toy_runs import make, settings, with_method

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def read_back(written: Config) -> Config:
    config = from_dict(yaml.safe_load(to_yaml(written)))
    check(config)
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_of_every_recipe_all_options_are_written_and_read_back(path: Path) -> None:
    recipe = load(path)
    written = with_defaults(recipe)
    assert read_back(written) == written
    assert with_defaults(written) == written
    assert changes(written, recipe) == {}  # a resumed run has no other settings
    assert changes(recipe, recipe) == {}  # and none that began with an earlier version
    for name, options in recipe.rewards.items():
        assert options.items() <= written.rewards[name].items()


@pytest.mark.parametrize("method", METHODS)
def test_with_all_options_a_method_is_built_as_with_those_that_are_given(
    tmp_path: Path, method: str
) -> None:
    given = settings(tmp_path / "run", **with_method(method))
    for one, other in zip(objectives(given), objectives(with_defaults(given)), strict=True):
        assert type(one) is type(other)
        assert str(vars(one)) == str(vars(other))


def test_heads_have_their_defaults_and_functions_keep_their_metadata() -> None:
    given = from_dict(
        {
            "rewards": {
                "ocr": {"weight": 2},
                "own": {"path": f"{ROOT}/tests/toy_runs.py:tagged"},
            },
            "evaluation": {"every": 0, "rewards": {"held": {"head": "sharpness"}}},
        }
    )
    written = with_defaults(given)
    assert written.rewards["ocr"]["weight"] == 2
    assert written.rewards["ocr"]["engine"] == "rapidocr"
    # `tag` is a column of the prompts: as an option it would be the same for all.
    own = {**given.rewards["own"], "weight": 1.0, "per_image": False}
    assert written.rewards["own"] == own
    assert "weight" not in written.evaluation.rewards["held"]  # of what nobody trains on
    assert given == from_dict(yaml.safe_load(to_yaml(given)))  # what was given is as it was
    held = heads(written, "evaluation.rewards")["held"]
    assert vars(held) == vars(heads(given, "evaluation.rewards")["held"])


def test_changes_are_told_whether_the_defaults_were_written_or_not(tmp_path: Path) -> None:
    given = settings(tmp_path / "run", objectives={"method": "apex", "weighting": {"need": 3.0}})
    other = settings(tmp_path / "run", objectives={"method": "apex", "weighting": {"floor": 0.1}})
    key = "objectives.weighting"
    said = {f"{key}.need": (3.0, 2.0), f"{key}.floor": (0.05, 0.1)}
    assert changes(with_defaults(given), other) == said
    assert changes(given, other) == {**said, f"{key}.floor": (None, 0.1)}  # as versions before did


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"objectives": {"method": "apx"}}, "objectives.method: unknown method 'apx'"),
        ({"rewards": {"sharpnes": {}}}, 'rewards.sharpnes: Unknown reward head "sharpnes"'),
        (
            {"rewards": {"a": {"head": "ocr", "path": "b:c"}}},
            "rewards.a: should have `head` or `path`",
        ),
    ],
)
def test_what_is_unknown_is_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_defaults(settings(tmp_path / "run", **changed))


def test_a_run_writes_them_and_is_resumed_without_a_warning(tmp_path: Path, caplog) -> None:
    changed = {"objectives": {"method": "apex"}, "trainer__steps": 1}
    make(tmp_path / "run", **changed).run()
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["objectives"]["weighting"]["horizon"] == 10
    assert written["objectives"]["normalizer"]["floor"] == 0.1
    caplog.clear()
    make(tmp_path / "run", resume="latest", **changed)
    assert "Resuming with another" not in caplog.text
    changed["objectives"] = {"method": "apex", "weighting": {"horizon": 9}}
    with pytest.raises(ConfigError, match=r"resume: objectives\.weighting has other settings"):
        make(tmp_path / "run", resume="latest", **changed)
    assert "Resuming with another objectives.weighting.horizon: 9, was 10." in caplog.text


def test_keys_are_dotted_and_values_plain() -> None:
    made = from_dict({"rewards": {"sharpness": {}}, "evaluation": {"every": 0}})
    rows = flat(made)
    assert rows["trainer.steps"] == made.trainer.steps
    assert rows["resume"] == "None"
    assert all(isinstance(value, str | int | float | bool) for value in rows.values())
