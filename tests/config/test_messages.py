"""Messages name what is wrong in plain words: the key, what it should be, what was found."""

from __future__ import annotations

import math

import pytest

from config_files import BASE, loaded, nested
from moa_diffusion.config import parse
from moa_diffusion.types import ConfigError


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
