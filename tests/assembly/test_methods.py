"""A method's name and options to its normalizer and weighting."""

from __future__ import annotations

from typing import Any

import pytest

from moa_diffusion.assembly.methods import METHODS, check_ppo, objectives
from moa_diffusion.config import Config, from_dict
from moa_diffusion.objectives.gradient import Gradient
from moa_diffusion.types import ConfigError

REWARDS = {"sharpness": {"weight": 2}, "jpeg_compressibility": {}}


def configured(method: str, rewards: dict[str, Any] = REWARDS, **sections: Any) -> Config:
    values = {"rewards": rewards, "evaluation": {"every": 0}}
    values["objectives"] = {"method": method, **sections.pop("objectives", {})}
    return from_dict(values | sections)


@pytest.mark.parametrize("method", METHODS)
def test_a_name_gives_its_classes_for_the_rewards_of_the_run(method: str):
    options = {"weighting": {"aggregator": "upgrad"}} if method == "gradient" else {}
    normalizer, weighting = objectives(configured(method, objectives=options))
    assert type(normalizer) is METHODS[method].normalizer
    assert type(weighting) is METHODS[method].weighting


def test_an_aggregators_name_fixes_the_options_of_the_weighting():
    _, weighting = objectives(configured("mgda"))
    assert isinstance(weighting, Gradient)
    with pytest.raises(ConfigError, match=r"^objectives\.weighting\.aggregator: unknown option"):
        objectives(configured("mgda", objectives={"weighting": {"aggregator": "upgrad"}}))


def test_an_unknown_method_is_told_the_nearest_and_all_others():
    with pytest.raises(ConfigError, match=r"'appex'\. Did you mean 'apex'\? .*static, .*mopo"):
        objectives(configured("appex"))


@pytest.mark.parametrize(("method", "told"), [("static", False), ("apex", True)])
def test_a_weight_without_effect_is_told(method: str, told: bool, caplog):
    objectives(configured(method))
    assert ("rewards.sharpness.weight = 2 is not used" in caplog.text) == told


def test_a_single_reward_has_nothing_to_be_weighed_against(caplog):
    objectives(configured("apex", {"sharpness": {}}))
    assert "apex has a single reward to weigh" in caplog.text


def test_value_heads_need_a_method_that_weighs_decisions():
    check_ppo(configured("pama", loss={"kind": "ppo"}))
    with pytest.raises(ConfigError, match=r"^loss\.kind: should be grpo for the method apex"):
        check_ppo(configured("apex", loss={"kind": "ppo"}))
