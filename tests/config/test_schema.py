"""The sections of the configuration: what is right survives, there and back."""

from __future__ import annotations

import pytest
import yaml

from config_files import BASE, OPEN, loaded, mixed
from moa_diffusion.config import from_dict, to_yaml
from moa_diffusion.config.schema import PromptFileConfig, WeightedPromptFileConfig


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


def test_open_mappings_take_any_key(tmp_path):
    config = loaded(tmp_path, OPEN)
    assert config.rewards == OPEN["rewards"]
    assert list(config.rewards) == ["ocr", "red"]
    assert config.objectives.normalizer == {"floor": 0.2, "decay": 0.5}


def test_null_means_none(tmp_path):
    values = BASE | {"policy": {"lora": {"alpha": None}, "embeds_dir": None}, "resume": None}
    config = loaded(tmp_path, values)
    assert config.policy.lora.alpha is config.policy.embeds_dir is config.resume is None
    assert loaded(tmp_path, BASE, "--resume", "latest").resume == "latest"
    assert loaded(tmp_path, BASE | {"resume": "latest"}, "--resume", "null").resume is None


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


def test_printing_shows_the_weights(tmp_path, capsys):
    with pytest.raises(SystemExit):
        loaded(tmp_path, mixed(), "--prompts.train", "[a.txt, {path: b.txt}]", "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)["prompts"]["train"]
    assert printed == [{"path": f"{name}.txt", "weight": 1.0, "column": None} for name in "ab"]


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
