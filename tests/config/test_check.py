"""Values that the schema alone cannot refuse: names, ranges, and what does not go together."""

from __future__ import annotations

import dataclasses
import math

import pytest
import yaml

from config_files import BASE, loaded, mixed, nested
from moa_diffusion.config import Config, check, from_dict
from moa_diffusion.config.schema import WeightedPromptFileConfig
from moa_diffusion.types import ConfigError


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


FORWARD = BASE | {
    "loss": {"kind": "forward", "forward": {"preset": "ram"}, "kl_weight": 1.0},
    "sampling": {"guidance": 1.0},
}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sampling.guidance": 4.5}, r"sampling\.guidance: should be at most 1 .* Found 4\.5"),
        (
            {"loss.forward.preset": "nft", "sampling.steps": 6},
            r"loss\.forward\.draws: should be at most sampling\.steps = 6 .* grid.* Found 9",
        ),
        ({"sampling.window": 2}, r"sampling\.window: should be 0 \(the default\) .* Found 2"),
        ({"sampling.window_mode": "first"}, r"sampling\.window_mode: should be random .* trained"),
        ({"sampling.noise_level": 0.3}, r"sampling\.noise_level: should be 0\.7 .* trained"),
        ({"sampling.sampler": "cps"}, r"sampling\.sampler: should be flow_sde .* Found 'cps'"),
        ({"sampling.shared_start": True}, r"sampling\.shared_start: should be false .* end alike"),
        ({"loss.clip_range": 1e-5}, r"loss\.clip_range: should be 0\.0001 .* has no ratios"),
        ({"loss.clip": "divergence"}, r"loss\.clip: should be ratio .* has no ratios"),
        ({"loss.ratio_tolerance": 1e-3}, r"loss\.ratio_tolerance: should be null .* no ratios"),
        ({"loss.steps": "equal"}, r"loss\.steps: should be plain .* no step of sampling"),
        ({"loss.kl_weight": 0.0}, r"loss\.kl_weight: should be positive .* Found 0"),
        ({"loss.kl": "gaussian"}, r"loss\.kl: should be velocity or null .* Found 'gaussian'"),
        ({"policy.name": "toy"}, r"loss\.kind: should be grpo for policy\.name toy.* noised again"),
        ({"policy.name": "causal_lm"}, r"loss\.kind: should be grpo for policy\.name causal_lm"),
    ],
)
def test_what_images_that_are_noised_again_do_not_have(tmp_path, overrides, message):
    loaded(tmp_path, FORWARD)
    options = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
    with pytest.raises(ConfigError, match=f"^{message}"):
        loaded(tmp_path, FORWARD, *options)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"loss.clip": "divergence", "policy.name": "toy"}, r"loss\.clip: should be ratio .* toy"),
        ({"loss.norm_weight": 0.1, "policy.name": "causal_lm"}, r"loss\.norm_weight: should be 0 "),
        (
            {"loss.clip": "normalized", "loss.steps": "equal"},
            r"loss\.clip: should be ratio with loss\.steps equal.* Found 'normalized'",
        ),
        ({"loss.kl_target": 0.1}, r"loss\.kl_target: should be null while .* Found 0\.1"),
        ({"loss.kl_target": 0.0}, r"loss\.kl_target: "),
        (
            {"loss.kl_target": 0.1, "loss.kl_weight": 0.1, "sampling.window": 2},
            r"loss\.kl_target: should be null with loss\.kl gaussian .* Found 0\.1",
        ),
        (
            {"loss.kl_target": 0.1, "loss.kl_weight": 0.1, "alarm.action": "raise_kl"},
            r"loss\.kl_target: should be null with alarm\.action raise_kl",
        ),
        (
            {"loss.steps": "noise", "sampling.sampler": "cps"},
            r"loss\.steps: should be plain or equal for sampling\.sampler cps",
        ),
        (
            {"evaluation.resolution": 64, "policy.name": "causal_lm"},
            r"evaluation\.resolution: should be null for policy\.name causal_lm",
        ),
    ],
)
def test_guards_that_have_nothing_to_guard_are_refused(tmp_path, overrides, message):
    options = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
    with pytest.raises(ConfigError, match=f"^{message}"):
        loaded(tmp_path, BASE, *options)


@pytest.mark.parametrize(
    "overrides",
    [
        {"loss.kl": "velocity", "sampling.window": 2},
        {"sampling.window": 2, "sampling.window_mode": "first"},
        {"sampling.window": 0},
    ],
)
def test_a_kl_that_can_be_compared_between_rollouts_may_have_a_target(tmp_path, overrides):
    given = {"loss.kl_target": 0.1, "loss.kl_weight": 0.1} | overrides
    options = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    assert loaded(tmp_path, BASE, *options).loss.kl_target == 0.1


def test_settings_of_another_kind_of_loss_are_refused(tmp_path):
    values = BASE | {"loss": {"forward": {"old": {"weight": 1.0}}}}
    with pytest.raises(
        ConfigError, match=r"^loss\.forward: should be left out for loss\.kind grpo"
    ):
        loaded(tmp_path, values)
