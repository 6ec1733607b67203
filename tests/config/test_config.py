"""The configuration: every wrong key and value is refused by name, every right one survives."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import yaml

from moa_diffusion.config import Config, check, from_dict, load, parse, to_yaml
from moa_diffusion.config.schema import PromptFileConfig, WeightedPromptFileConfig
from moa_diffusion.types import ConfigError

BASE = {"rewards": {"red": {"weight": 1.0}}, "prompts": {"heldout": "tiny"}}


def written(folder: Path, values: dict | str) -> str:
    path = folder / "run.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return str(path)


def nested(key: str, value: object) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def loaded(folder: Path, values: dict | str, *overrides: str) -> Config:
    return load(written(folder, values), list(overrides))


# ---------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sed", "seed"),
        ("trainer.step", "trainer.steps"),
        ("trainer.groupsize", "trainer.group_size"),
        ("policy.lora.rnak", "policy.lora.rank"),
        ("loss.kl_wieght", "loss.kl_weight"),
        ("reward", "rewards"),
        ("optimizer.learning_rate", None),
    ],
)
@pytest.mark.parametrize("place", ["yaml", "command line"])
def test_unknown_keys_name_the_nearest(tmp_path, key, nearest, place):
    with pytest.raises(ConfigError) as caught:
        if place == "yaml":
            loaded(tmp_path, BASE | nested(key, 3))
        else:
            loaded(tmp_path, BASE, f"--{key}", "3")
    message = str(caught.value)
    assert message.startswith(f"{key}: unknown key.")
    assert nearest is None or f"Did you mean '{nearest}'?" in message
    assert "Valid keys here: " in message


@pytest.mark.parametrize("key", ["seed", "policy.lora.rank", "log.trackers"])
def test_a_key_below_a_value_is_refused(tmp_path, key):
    with pytest.raises(ConfigError, match=rf'^{key}: should be a .*\. Found \{{"x": 3\}}\.$'):
        loaded(tmp_path, BASE, f"--{key}.x", "3")


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, BASE, "--sed", "3", "--trainer.steps", "0", "--policy.lora.rank", "x")
    keys = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert keys == ["policy.lora.rank", "trainer.steps", "sed"]


def test_equals_sign_and_abbreviations(tmp_path):
    assert loaded(tmp_path, BASE, "--trainer.steps=7").trainer.steps == 7
    with pytest.raises(ConfigError, match=r"unknown key\. Did you mean 'trainer\.steps'"):
        loaded(tmp_path, BASE, "--trainer.stepz=7")
    with pytest.raises(ConfigError, match="outpu: unknown key"):
        loaded(tmp_path, BASE, "--outpu", "x")


def test_files_that_are_no_mapping(tmp_path):
    with pytest.raises(ConfigError, match="Found no file"):
        load(tmp_path / "no.yaml")
    for text in ("- a\n- b\n", "just text"):
        with pytest.raises(ConfigError, match="should hold a mapping"):
            loaded(tmp_path, text)
    with pytest.raises(ConfigError, match="should be YAML"):
        loaded(tmp_path, "a: [1\n")


def test_null_on_the_command_line_takes_a_key_away(tmp_path):
    text = "rewards: {a: {weight: 2, x: 1}, b: {}}\nevaluation: {every: 0}\n"
    floor = "objectives: {normalizer: {floor: 1}}\n"
    options = ["--rewards.b", "null", "--rewards.a.x", "null"]
    config = loaded(tmp_path, text + floor, *options, "--objectives.normalizer.floor", "null")
    assert config.rewards == {"a": {"weight": 2}}
    assert config.objectives.normalizer == {}
    with pytest.raises(ConfigError, match=r"rewards.b: should be a mapping of options. Found None"):
        loaded(tmp_path, "rewards: {a: {}, b: null}")  # in a file it was forgotten, perhaps


@pytest.mark.parametrize("text", ["off", "'off'", "no", '"3"'])
def test_text_in_open_mappings_stays_text(tmp_path, text):
    """YAML 1.1 would make a truth value of a bare off, and some parsers of a quoted one as well."""
    base = "rewards: {a: {}}\nevaluation: {every: 0}\n"
    expected = text.strip("'\"")
    from_file = loaded(tmp_path, base + f"objectives: {{weighting: {{conflict: {text}}}}}")
    assert from_file.objectives.weighting == {"conflict": expected}
    again = loaded(tmp_path, to_yaml(from_file))
    assert again.objectives.weighting == {"conflict": expected}
    told = loaded(tmp_path, base, "--objectives.weighting.conflict", text)
    assert told.objectives.weighting == {"conflict": expected}


def test_a_key_given_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"`steps` stands here twice(.|\n)*line 3"):
        loaded(tmp_path, "trainer:\n  steps: 1\n  steps: 2\n")


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


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "many"),
        ("trainer.steps", 2.5),
        ("trainer.steps", "ten"),
        ("trainer.steps", None),
        ("trainer.steps", True),
        ("optimizer.lr", "fast"),
        ("optimizer.betas", 0.9),
        ("policy.dtype", "float64"),
        ("policy.name", "gan"),
        ("policy.gradient_checkpointing", "perhaps"),
        ("sampling.sampler", "ddim"),
        ("loss.kl", "reverse"),
        ("log.trackers", {"a": 1}),
        ("rewards", ["red"]),
        ("rewards.red.weight", "heavy"),
        ("rewards.red.weight", True),
        ("rewards.red.weight", math.inf),
        ("rewards.red.head", 3),
        ("objectives.normalizer", [1]),
        ("trainer", 3),
    ],
)
def test_wrong_types_name_the_key(tmp_path, key, value):
    with pytest.raises(ConfigError, match=key):
        loaded(tmp_path, BASE | nested(key, value))


def test_a_reward_without_options_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"rewards.red: should be a mapping of options. Found 3"):
        loaded(tmp_path, {"rewards": {"red": 3}})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "''"),
        (" ", "' '"),
        ("-/-", "'-/-'"),
        ("\u200b", r"'\\u200b'"),
        ("a\nb", r"'a\\nb'"),
        ("=a", "=a: .* does not begin with `=`"),
        ("a~b", "a~b: .* without `~`"),
        (None, "null: should be a name that is text"),
        (1, '1: should be a name that is text, such as "1" in quotes'),
        (True, "true: should be a name that is text"),
    ],
)
@pytest.mark.parametrize("section", ["rewards", "evaluation.rewards"])
def test_what_is_no_name_of_a_reward_is_refused(tmp_path, section, name, message):
    values = BASE | nested(section, {name: {"head": "red"}})
    with pytest.raises(ConfigError, match=rf"^{section}\.{message}"):
        loaded(tmp_path, values)
    with pytest.raises(ConfigError, match=rf"^{section}\.{message}"):
        check(from_dict(values))


@pytest.mark.parametrize(
    "name", ["my reward", "schärfe", "质量", "50%", "1", "a/b", "../x", "(a)", "_a", "mine.py:red"]
)
def test_a_reward_may_be_called_what_somebody_likes(tmp_path, name):
    config = loaded(tmp_path, BASE | {"rewards": {name: {"head": "red"}}})
    assert list(config.rewards) == [name]


def test_objectives_of_preferences_have_names_too(tmp_path):
    mopo = {"policy": {"name": "causal_lm"}, "objectives": {"method": "mopo"}}
    for given, key in (
        ({"data": "x.jsonl", "objectives": ["a", "b~c"]}, r"preferences\.objectives\.b~c"),
        ({"pairs": {"": "x.jsonl"}}, r"preferences\.pairs\.''"),
    ):
        with pytest.raises(ConfigError, match=f"{key}: should be a name"):
            check(from_dict(BASE | mopo | {"preferences": given}))


RANGES = [
    ("policy.max_sequence_length", 0),
    ("policy.vae_batch", 0),
    ("policy.embeds_memory_gb", 0.0),
    ("policy.lora.rank", 0),
    ("policy.lora.alpha", 0),
    ("policy.lora.target_modules", []),
    ("sampling.resolution", 0),
    ("sampling.steps", 1),
    ("sampling.guidance", -0.1),
    ("sampling.noise_level", 0.0),
    ("sampling.window", -1),
    ("sampling.window", 10),
    ("sampling.window_stay", 0),
    ("loss.clip_range", 0.0),
    ("loss.clip_range", math.nan),
    ("loss.advantage_clip", -5.0),
    ("loss.kl_weight", -0.1),
    ("loss.ratio_tolerance", 0.0),
    ("loss.max_skipped", 0),
    ("optimizer.lr", 0.0),
    ("optimizer.lr", math.inf),
    ("optimizer.eps", 0.0),
    ("optimizer.betas", [0.9]),
    ("optimizer.betas", [0.9, 1.0]),
    ("optimizer.betas", [math.nan, 0.9]),
    ("optimizer.weight_decay", -1.0),
    ("optimizer.max_grad_norm", 0.0),
    ("optimizer.warmup", -1),
    ("ema.decay", 1.0),
    ("ema.decay", -0.1),
    ("ema.every", 0),
    ("trainer.steps", 0),
    ("trainer.groups", 0),
    ("trainer.group_size", 1),
    ("trainer.updates", 0),
    ("trainer.sample_batch", 0),
    ("trainer.micro_batch", 0),
    ("checkpoint.every", -1),
    ("checkpoint.keep", -1),
    ("evaluation.every", -1),
    ("evaluation.images_per_prompt", 0),
    ("evaluation.prompts", -1),
    ("evaluation.steps", 0),
    ("evaluation.guidance", -1.0),
    ("evaluation.pictures", -1),
    ("prompts.heldout", None),
    ("rewards", {}),
]


@pytest.mark.parametrize(("key", "value"), RANGES)
def test_values_out_of_range_name_the_key(key, value):
    config = from_dict(BASE)
    check(config)
    *parents, last = key.split(".")
    owner = config
    for part in parents:
        owner = getattr(owner, part)
    setattr(owner, last, value)
    with pytest.raises(ConfigError, match=f"^{key}: should .* Found "):
        check(config)


def test_every_number_is_checked():
    """A new setting needs a range, or a place among the few that may have any value."""
    numbers = set()

    def walk(kind: object, prefix: str) -> None:
        for entry in dataclasses.fields(kind):
            value = getattr(kind, entry.name)
            if dataclasses.is_dataclass(value):
                walk(value, f"{prefix}{entry.name}.")
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers.add(f"{prefix}{entry.name}")

    walk(Config(), "")
    missing = numbers - {key for key, _ in RANGES} - {"seed", "evaluation.seed"}
    for key in missing:
        owner = config = from_dict(BASE)
        for part in key.split(".")[:-1]:
            owner = getattr(owner, part)
        setattr(owner, key.split(".")[-1], -1)
        with pytest.raises(ConfigError, match=key):
            check(config)


def test_cps_has_its_own_noise_level(tmp_path):
    loaded(tmp_path, BASE, "--sampling.noise_level", "1.2")
    with pytest.raises(ConfigError, match=r"sampling\.noise_level: should be at most 1 for cps"):
        loaded(tmp_path, BASE, "--sampling.noise_level", "1.2", "--sampling.sampler", "cps")


def test_evaluation_off_needs_no_prompts(tmp_path):
    loaded(tmp_path, {"rewards": {"red": {}}, "evaluation": {"every": 0}})


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


@pytest.mark.parametrize("number", ["1e-5", "1e-05", "0.00001"])
def test_numbers_in_scientific_notation(tmp_path, number):
    text = f"rewards: {{red: {{weight: {number}}}}}\nevaluation: {{every: 0}}\n"
    config = loaded(tmp_path, text + f"loss: {{clip_range: {number}}}\n")
    assert config.loss.clip_range == 1e-5
    assert config.rewards["red"]["weight"] == 1e-5
    assert loaded(tmp_path, text, "--loss.clip_range", number).loss.clip_range == 1e-5


OPEN = {
    "rewards": {"ocr": {"weight": 1.0, "workers": 3}, "red": {"weight": 0.5, "path": "m:f"}},
    "objectives": {"method": "dual_stage", "normalizer": {"floor": 0.2, "decay": 0.5}},
    "evaluation": {"every": 0},
}


def test_open_mappings_take_any_key(tmp_path):
    config = loaded(tmp_path, OPEN)
    assert config.rewards == OPEN["rewards"]
    assert list(config.rewards) == ["ocr", "red"]
    assert config.objectives.normalizer == {"floor": 0.2, "decay": 0.5}


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


def test_null_means_none(tmp_path):
    values = BASE | {"policy": {"lora": {"alpha": None}, "embeds_dir": None}, "resume": None}
    config = loaded(tmp_path, values)
    assert config.policy.lora.alpha is config.policy.embeds_dir is config.resume is None
    assert loaded(tmp_path, BASE, "--resume", "latest").resume == "latest"
    assert loaded(tmp_path, BASE | {"resume": "latest"}, "--resume", "null").resume is None


# ---------------------------------------------------------------------- lists of prompt files


MIXED = {
    "train": ["a.txt", {"path": "b.csv", "weight": 2, "column": "null"}, "tiny"],
    "heldout": ["c.txt", {"path": "d.csv", "column": "off"}],
}


def mixed(**prompts: object) -> dict:
    return BASE | {"prompts": MIXED | prompts}


def test_prompt_files_may_be_lists(tmp_path):
    config = loaded(tmp_path, mixed())
    assert config.prompts.train == [
        WeightedPromptFileConfig(path="a.txt"),
        WeightedPromptFileConfig(path="b.csv", weight=2.0, column="null"),
        WeightedPromptFileConfig(path="tiny"),
    ]
    assert config.prompts.heldout == [
        PromptFileConfig(path="c.txt"),
        PromptFileConfig(path="d.csv", column="off"),
    ]
    assert loaded(tmp_path, to_yaml(config)) == config
    assert from_dict(yaml.safe_load(to_yaml(config))) == config


def test_prompt_files_given_in_python(tmp_path):
    config = from_dict(mixed())
    check(config)
    assert config.prompts.train[0] == WeightedPromptFileConfig(path="a.txt")
    assert config.prompts.train[1] == WeightedPromptFileConfig(
        path="b.csv", weight=2, column="null"
    )
    config.prompts.heldout = [WeightedPromptFileConfig(path="c.txt")]
    with pytest.raises(ConfigError, match=r"prompts.heldout\[0\].weight: unknown key"):
        check(config)


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


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train", 3, r"prompts\.train: should be a prompt file or a list of some\. Found 3"),
        ("train", [], r"prompts\.train: should be a prompt file or a list of some\. Found \[\]"),
        ("train", {"path": "a.txt"}, r"should be a prompt file or a list of some\. Found \{"),
        ("train", ["a.txt", 3], r"prompts\.train\[1\]: should be a file or a mapping .* Found 3"),
        ("train", [{"weight": 2}], r"prompts\.train\[0\]: .* mapping with `path`"),
        ("train", [{"path": 3}], r"prompts\.train\[0\]\.path: should be text\. Found 3"),
        ("train", [{"path": None}], r"prompts\.train\[0\]\.path: should be text\. Found null"),
        (
            "train",
            [{"path": "a.txt", "column": 3}],
            r"\[0\]\.column: should be text or null\. Found 3",
        ),
        (
            "train",
            [{"path": "a.txt", "wieght": 3}],
            r"\.wieght: unknown key\. Did you mean 'weight'",
        ),
        ("train", [{"path": "a.txt", "weight": 0}], r"\.weight: should be positive\. Found 0\."),
        ("train", [{"path": "a.txt", "weight": -1.0}], r"positive\. Found -1\.0"),
        ("train", [{"path": "a.txt", "weight": math.inf}], r"finite\. Found inf"),
        ("train", [{"path": "a.txt", "weight": math.nan}], r"finite\. Found nan"),
        ("train", [{"path": "a.txt", "weight": True}], r"number\. Found true"),
        ("train", [{"path": "a.txt", "weight": "2"}], r"a number\. Found '2'"),
        (
            "train",
            ["a.txt", "b.txt", "./a.txt"],
            r"\[2\]: should be another file than prompts\.train",
        ),
        ("heldout", ["a.txt", {"path": "a.txt", "column": "prompt"}], r"Found `a\.txt` again"),
        ("heldout", [{"path": "a.txt", "weight": 1.0}], r"weights are for prompts\.train"),
    ],
)
def test_wrong_lists_name_the_entry(tmp_path, key, value, message):
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, mixed(**{key: value}))
    with pytest.raises(ConfigError, match=message):
        check(from_dict(mixed(**{key: value})))
    if isinstance(value, list):
        with pytest.raises(ConfigError, match=message):
            loaded(tmp_path, BASE, f"--prompts.{key}", yaml.safe_dump(value, width=1000))


def test_one_file_may_stand_twice_with_two_columns(tmp_path):
    both = ["a.csv", {"path": "a.csv", "column": "caption"}]
    assert len(loaded(tmp_path, mixed(train=both)).prompts.train) == 2


def test_printing_shows_the_weights(tmp_path, capsys):
    with pytest.raises(SystemExit):
        loaded(tmp_path, mixed(), "--prompts.train", "[a.txt, {path: b.txt}]", "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)["prompts"]["train"]
    assert printed == [{"path": f"{name}.txt", "weight": 1.0, "column": None} for name in "ab"]


# ---------------------------------------------------------------------- there and back


def test_yaml_round_trip(tmp_path):
    config = loaded(
        tmp_path,
        OPEN,
        "--loss.clip_range",
        "1e-5",
        "--policy.lora.target_modules",
        "[attn.to_q, attn.to_k]",
        "--optimizer.betas",
        "[0.8, 0.99]",
        "--policy.lora.alpha",
        "7",
    )
    assert config.policy.lora.target_modules == ["attn.to_q", "attn.to_k"]
    assert config.optimizer.betas == [0.8, 0.99]
    assert loaded(tmp_path, to_yaml(config)) == config
    assert from_dict(yaml.safe_load(to_yaml(config))) == config


def test_defaults_round_trip(tmp_path):
    config = loaded(tmp_path, BASE)
    assert loaded(tmp_path, to_yaml(config)) == config
    assert config == from_dict(BASE)


@pytest.mark.parametrize("option", ["--print_config", "--help"])
def test_printing_options_exit_with_zero(tmp_path, capsys, option):
    with pytest.raises(SystemExit) as caught:
        parse(["--config", written(tmp_path, BASE), "--trainer.steps", "7", option])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "group_size" in printed
    if option == "--print_config":
        assert yaml.safe_load(printed)["trainer"]["steps"] == 7
        assert yaml.safe_load(printed)["rewards"] == BASE["rewards"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sampling.sampler", "cpss"], "my_module:my_step. Found 'cpss'. Did you mean 'cps'?"),
        (
            ["--policy.dtype", "fp16"],
            "float32, bfloat16, float16. Found 'fp16'. Did you mean 'float16'",
        ),
        (["--loss.kl", "gausian"], "k3 or null. Found 'gausian'. Did you mean 'gaussian'?"),
        (["--trainer.steps", "many"], "trainer.steps: should be a whole number. Found 'many'."),
        (["--trainer.steps", "1.5"], "trainer.steps: should be a whole number. Found 1.5."),
        (["--trainer.steps", "null"], "trainer.steps: should be a whole number. Found null."),
        (["--trainer.steps"], "trainer.steps: should have a value, as in `--trainer.steps VALUE`"),
        (["--optimizer.lr", "fast"], "optimizer.lr: should be a number. Found 'fast'."),
        (["--optimizer.betas", "[0.9, x]"], "betas: should be a list of numbers, such as [1, 2]."),
        (["--generation.chat", "5"], "generation.chat: should be true or false or null. Found 5."),
        (
            ["--policy.lora.target_modules", "[1]"],
            "a list of texts, such as [a, b] or null. Found [1]",
        ),
        (["--log.trackers", "wandb"], "log.trackers: should be a list of texts, such as [a, b]."),
        (["--trainer", "5"], "trainer: should be a mapping of keys. Found 5."),
        (["stray"], "Options should begin with `--`. Found 'stray'."),
    ],
)
def test_a_value_of_the_wrong_type_is_told_in_plain_words(options, message):
    with pytest.raises(ConfigError) as caught:
        parse(["--rewards.ocr.weight", "1", *options])
    assert message in str(caught.value)
    for word in ("typing", "class", "Parser", "Union"):
        assert word not in str(caught.value)
