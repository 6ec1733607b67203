"""Reading a configuration: options, files and overrides, in their order."""

from __future__ import annotations

import pytest
import yaml

from config_files import BASE, OPEN, loaded, mixed, nested, written
from moa_diffusion.config import Config, parse
from moa_diffusion.types import ConfigError

# ---------------------------------------------------------------------- keys


def test_equals_sign_and_abbreviations(tmp_path):
    assert loaded(tmp_path, BASE, "--trainer.steps=7").trainer.steps == 7
    with pytest.raises(ConfigError, match=r"unknown key\. Did you mean 'trainer\.steps'"):
        loaded(tmp_path, BASE, "--trainer.stepz=7")
    with pytest.raises(ConfigError, match="outpu: unknown key"):
        loaded(tmp_path, BASE, "--outpu", "x")


def test_null_on_the_command_line_takes_a_key_away(tmp_path):
    text = "rewards: {a: {weight: 2, x: 1}, b: {}}\nevaluation: {every: 0}\n"
    floor = "objectives: {normalizer: {floor: 1}}\n"
    options = ["--rewards.b", "null", "--rewards.a.x", "null"]
    config = loaded(tmp_path, text + floor, *options, "--objectives.normalizer.floor", "null")
    assert config.rewards == {"a": {"weight": 2}}
    assert config.objectives.normalizer == {}
    with pytest.raises(ConfigError, match=r"rewards.b: should be a mapping of options. Found None"):
        loaded(tmp_path, "rewards: {a: {}, b: null}")  # in a file it was forgotten, perhaps


@pytest.mark.parametrize("key", ["trainer.stepz", "sed", "policy.lora.rnak"])
def test_null_hides_no_unknown_key(tmp_path, key):
    with pytest.raises(ConfigError, match=rf"^{key}: unknown key"):
        loaded(tmp_path, BASE, f"--{key}", "null")
    with pytest.raises(ConfigError, match=rf"^{key}: unknown key"):
        loaded(tmp_path, BASE | nested(key, None))


def test_null_in_a_later_file_takes_away_what_an_earlier_one_set(tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text("rewards: {b: null, a: {x: null}}\nobjectives: {normalizer: {floor: null}}\n")
    text = "rewards: {a: {weight: 2, x: 1}, b: {}}\nevaluation: {every: 0}\n"
    floor = "objectives: {normalizer: {floor: 1}}\n"
    config = loaded(tmp_path, text + floor, "--config", str(more))
    assert config.rewards == {"a": {"weight": 2}}
    assert config.objectives.normalizer == {}
    more.write_text("rewards: {c: null}\n")
    with pytest.raises(ConfigError, match=r"rewards.c: should be a mapping of options. Found None"):
        loaded(tmp_path, text, "--config", str(more))


# ---------------------------------------------------------------------- overrides and mappings


def test_an_option_may_hold_a_list_or_a_mapping(tmp_path):
    config = loaded(
        tmp_path,
        {"prompts": {"heldout": "tiny"}},
        *("--rewards", '{"ocr": {"weight": 2}, "red": {}}', "--rewards.red.x", "[1, off]"),
        *("--log.trackers", "[tensorboard, wandb]", "--trainer", "{steps: 3, groups: 5}"),
        *("--policy.lora.target_modules", "[to_q]", "--policy.revision", "1e5"),
        *("--loss.kl", "null", "--preferences.objectives=[]", "--optimizer.betas=[0, 0.5]"),
    )
    assert config.rewards == {"ocr": {"weight": 2}, "red": {"x": [1, "off"]}}
    assert config.log.trackers == ["tensorboard", "wandb"]
    assert (config.trainer.steps, config.trainer.groups, config.trainer.updates) == (3, 5, 2)
    assert config.policy.lora.target_modules == ["to_q"]
    assert (config.policy.revision, config.loss.kl) == ("1e5", None)
    assert (config.preferences.objectives, config.optimizer.betas) == ([], [0.0, 0.5])


def test_overrides_win_in_their_order(tmp_path):
    values = BASE | {"trainer": {"steps": 5, "groups": 3}, "seed": 4}
    config = loaded(tmp_path, values, "--trainer.steps", "6", "--trainer.steps", "7")
    assert (config.trainer.steps, config.trainer.groups, config.seed) == (7, 3, 4)
    assert config.trainer.updates == Config().trainer.updates


def test_an_option_is_not_undone_by_a_later_file(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(BASE | {"trainer": {"steps": 5}, "seed": 4}))
    after = f"should come after --config {recipe}, which sets it too"
    for option, value in (("trainer.steps", "6"), ("seed", "3"), ("trainer", "{steps: 7}")):
        with pytest.raises(ConfigError, match=f"^{option}: {after}. Found `--{option} .*{value}`"):
            parse([f"--{option}", value, "--config", str(recipe)])
    config = parse(["--trainer.groups", "3", "--seed", "4", "--config", str(recipe)])
    assert (config.trainer.groups, config.trainer.steps, config.seed) == (3, 5, 4)


def test_an_override_below_an_open_mapping_keeps_its_neighbours(tmp_path):
    config = loaded(
        tmp_path, OPEN, "--rewards.ocr.weight", "2", "--objectives.normalizer.floor", "0.3"
    )
    assert config.rewards == {
        "ocr": {"weight": 2, "workers": 3},
        "red": {"weight": 0.5, "path": "m:f"},
    }
    assert config.objectives.normalizer == {"floor": 0.3, "decay": 0.5}


def test_an_override_may_add_a_reward(tmp_path):
    config = loaded(tmp_path, OPEN, "--rewards.sharpness.weight", "0.1")
    assert list(config.rewards) == ["ocr", "red", "sharpness"]
    assert config.rewards["sharpness"] == {"weight": 0.1}


# ---------------------------------------------------------------------- lists of prompt files


@pytest.mark.parametrize("form", ["option", "equals sign", "second file"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x.txt", "x.txt"),
        ("my [odd] file.txt", "my [odd] file.txt"),
        ("[x.txt, {path: y.txt}]", [("x.txt", 1.0, None), ("y.txt", 1.0, None)]),
        ("[{path: x.txt, weight: 1e-1, column: '3'}]", [("x.txt", 0.1, "3")]),
    ],
)
def test_an_override_replaces_the_whole_list(tmp_path, text, expected, form):
    """Nothing of the old list's second entry stays in the new one's."""
    values = mixed(train=["z.txt", {"path": "z.txt", "weight": 9, "column": "z"}])
    more = tmp_path / "more.yaml"
    more.write_text(f"prompts: {{train: {text if text[0] == '[' else repr(text)}}}")
    options = {
        "option": ["--prompts.train", text],
        "equals sign": [f"--prompts.train={text}"],
        "second file": ["--config", str(more)],
    }
    train = loaded(tmp_path, values, *options[form]).prompts.train
    if not isinstance(train, str):
        train = [(file.path, file.weight, file.column) for file in train]
    assert train == expected


def test_an_override_takes_a_list_away(tmp_path):
    values = mixed() | {"evaluation": {"every": 0}}
    assert loaded(tmp_path, values, "--prompts.heldout", "null").prompts.heldout is None


# ---------------------------------------------------------------------- there and back


@pytest.mark.parametrize("options", ["--print_config", "--help", "--help all"])
def test_printing_options_exit_with_zero(tmp_path, capsys, options):
    with pytest.raises(SystemExit) as caught:
        parse(["--config", written(tmp_path, BASE), "--trainer.steps", "7", *options.split()])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "group_size" in printed
    assert ("--trainer.group_size VALUE" in printed) == (options == "--help all")
    if options == "--print_config":
        assert yaml.safe_load(printed)["trainer"]["steps"] == 7
        assert yaml.safe_load(printed)["rewards"] == BASE["rewards"]
