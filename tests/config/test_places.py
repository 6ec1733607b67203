"""Places in a configuration: home folders in every key, and runs that moved."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from moa_diffusion import assembly, config
from moa_diffusion.config.places import expand_homes
from moa_diffusion.storage import checkpoint
from moa_diffusion.types import ConfigError

pytestmark = pytest.mark.usefixtures("home")


TOY = ["--policy.name=toy", "--rewards.a.path=m:f", "--evaluation.every=0"]


def parsed(*arguments: str) -> config.Config:
    return config.parse([*TOY, *arguments])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output_dir", "~/x"),
        ("output_dir", "~"),
        ("resume", "~/x/checkpoints/step-000001"),
        ("policy.path", "~/x"),
        ("policy.embeds_dir", "~/x"),
        ("prompts.train", "~/x.txt"),
        ("prompts.heldout", "~/x.txt"),
        ("objectives.calibration", "~/x.json"),
        ("preferences.pairs.one", "~/x.jsonl"),
        ("rewards.a.model", "~/x"),
        ("evaluation.rewards.b.model", "~/x"),
    ],
)
@pytest.mark.parametrize("as_option", [True, False])
def test_a_home_folder_works_in_every_key(home: Path, key: str, value: str, as_option: bool):
    arguments = [f"--{key}={value}"]
    if key.startswith("preferences"):
        arguments += ["--policy.name=causal_lm", "--objectives.method=mopo"]
    if not as_option:
        nested: object = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        Path("run.yaml").write_text(yaml.safe_dump(nested))
        arguments = ["--config=run.yaml", *arguments[1:]]
    found: object = parsed(*arguments)
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else vars(found)[part]
    assert found == value.replace("~", str(home))


def test_a_home_folder_works_in_lists_of_prompt_files(home: Path):
    found = parsed('--prompts.train=[{"path": "~/a.txt", "weight": 2}, "~/b.txt"]').prompts.train
    assert [file.path for file in found] == [f"{home}/a.txt", f"{home}/b.txt"]
    settings = config.from_dict({"prompts": {"heldout": ["~/a.txt", "b.txt"]}})
    expand_homes(settings)
    assert [file.path for file in settings.prompts.heldout] == [f"{home}/a.txt", "b.txt"]


def test_every_path_of_the_schema_is_known():
    """A new key of a file or folder has to be among those whose ~ is replaced."""
    words = ("path", "dir", "file", "calibration", "resume", "adapter", "data", "pairs")
    keys, seen = [], [("", config.Config)]
    for prefix, kind in seen:
        for field in dataclasses.fields(kind):
            default = field.default_factory() if callable(field.default_factory) else None
            if dataclasses.is_dataclass(default):
                seen.append((f"{prefix}{field.name}.", type(default)))
            elif any(word in field.name for word in words) and "int" not in str(field.type):
                keys.append(f"{prefix}{field.name}")
    for key in keys:
        values: object = {"one": "~/x"} if key.endswith("pairs") else "~/x"
        for part in reversed(key.split(".")):
            values = {part: values}
        settings = config.from_dict(values)
        expand_homes(settings)
        assert "~" not in config.to_yaml(settings), key


def test_another_user_and_a_folder_called_so(home: Path):
    with pytest.raises(ConfigError, match=r"output_dir: .*no such user"):
        parsed("--output_dir=~no_such_user_here/x")
    with pytest.raises(ConfigError, match=r"config: .*no such user"):
        config.parse(["--config=~no_such_user_here/x.yaml"])
    assert parsed("--output_dir=./~/x").output_dir == "./~/x"
    assert parsed("--rewards.a.text=~ 5 cats").rewards["a"]["text"] == "~ 5 cats"
    (home / "run.yaml").write_text("seed: 7\n")
    assert parsed("--config", "~/run.yaml").seed == 7


# ---------------------------------------------------------------------- runs that moved


def run_in(folder: str, began: str) -> Path:
    """A run's folder as it looks after three rollouts."""
    path = Path(folder)
    step = checkpoint.step_folder(path, 3)
    step.mkdir(parents=True)
    (step / checkpoint.STATE).write_bytes(b"")
    (path / "config.yaml").write_text(f"output_dir: {began}\n")
    return step


@pytest.mark.parametrize(
    "options", [["--resume=latest"], ["--resume=moved/checkpoints/step-000003"]]
)
def test_a_moved_run_goes_on_where_it_is(options: list[str]):
    step = run_in("moved", "old")
    settings = parsed("--config=moved/config.yaml", *options)
    assert settings.output_dir == "moved"
    assert assembly.run_folder.run_folder(settings) == step
    assert not Path("old").exists()


def test_a_recipe_and_a_checkpoint_of_its_moved_run():
    step = run_in("moved", "old")
    Path("recipe.yaml").write_text("output_dir: old\n")
    settings = parsed("--config=recipe.yaml", f"--resume={step}")
    assert Path(settings.output_dir) == Path("moved").absolute()


def test_another_output_dir_starts_another_run(caplog: pytest.LogCaptureFixture):
    """Of the command line, or of a recipe that is not the run's."""
    step = run_in("moved", "old")
    Path("recipe.yaml").write_text("output_dir: other\n")
    for options in (
        ["--config=moved/config.yaml", "--output_dir=new"],
        ["--config=recipe.yaml"],
        ["--config=moved/config.yaml", "--config=recipe.yaml"],
    ):
        settings = parsed(*options, f"--resume={step}")
        assert settings.output_dir in ("new", "other")
        assert assembly.run_folder.run_folder(settings) == step
        assert f"A new run in `{settings.output_dir}` goes on from" in caplog.text
        caplog.clear()


def test_a_runs_own_config_never_starts_over_in_the_old_place():
    run_in("moved", "old")
    with pytest.raises(ConfigError, match=r"Found another run in `moved`"):
        assembly.run_folder.run_folder(parsed("--config=moved/config.yaml"))


def test_a_config_alone_is_a_recipe():
    Path("configs").mkdir()
    Path("configs/config.yaml").write_text("output_dir: old\n")
    assert parsed("--config=configs/config.yaml").output_dir == "old"


# ---------------------------------------------------------------------- text that has no bytes


def test_text_that_cannot_be_encoded_is_refused():
    Path("run.yaml").write_text('rewards: {a: {path: "m:f", question: "\\ud83d\\ude00"}}\n')
    with pytest.raises(ConfigError, match=r"run\.yaml`: rewards: a: question: .*surrogate"):
        config.parse(["--config=run.yaml"])
    with pytest.raises(ConfigError, match=r"command line.*surrogate"):
        parsed("--output_dir=caf\udce9")
