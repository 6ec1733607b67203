"""From a configuration to a forecast."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moa_diffusion import config
from moa_diffusion.planning.forecast import EAGER, RESERVE, SINGLE, Phase, Work
from moa_diffusion.planning.gpus import GPUS
from moa_diffusion.planning.passes import transformer_cost
from moa_diffusion.planning.planner import Planner
from moa_diffusion.types import ConfigError

CARD = GPUS["h100"]
CLIP = "package://moa_diffusion/tiny/judges/clip"
TINY: dict[str, Any] = {
    "policy": {"path": "tiny", "max_sequence_length": 16, "lora": {"rank": 4}, "vae_batch": 2},
    "sampling": {"resolution": 64, "steps": 6, "guidance": 1.0, "window": 2},
    "prompts": {"train": "tiny", "heldout": "tiny"},
    "rewards": {
        "clipscore": {"model": CLIP},
        "sharpness": {},
    },
    "objectives": {"method": "upgrad"},
    "trainer": {"steps": 40, "groups": 4, "group_size": 4, "micro_batch": 2, "sample_batch": 2},
    "evaluation": {
        "every": 20,
        "steps": 10,
        "guidance": 1.0,
        "rewards": {
            "half": {"head": "clipscore", "dtype": "bfloat16", "model": CLIP},
            "same": {"head": "clipscore", "model": CLIP},  # which the trained one shares
        },
    },
    "checkpoint": {"every": 10, "keep": 2, "front": 1},
}


@pytest.fixture(scope="module")
def planner(stated_costs: None) -> Planner:
    return Planner(config.from_dict(TINY), gpus=2)


def memory(planner: Planner, name: str, **variant: Any) -> Any:
    return next(p.memory for p in planner.forecast(**variant).phases if p.name == name)


def test_a_time_is_that_of_the_rate_or_of_the_bandwidth() -> None:
    work = Work(kind="sample", flops=989e12, moved=1, dtype="float16")
    assert work.seconds(CARD, {}) == pytest.approx(1 / EAGER)
    assert work.seconds(CARD, {"sample": 0.5}) == pytest.approx(2)
    assert work.seconds(CARD, {"update": 0.5}) == pytest.approx(1 / EAGER)
    assert replace(work, moved=2e15).seconds(CARD, {}) == pytest.approx(2e15 / 3350e9)
    single = replace(work, dtype="float32", flops=67e12)
    assert single.seconds(CARD, {}) == pytest.approx(1 / SINGLE)
    phase = Phase(name="sample", times=2, memory={"a": 1.0, "b": 2.0}, work=(work, work))
    assert (phase.peak, phase.seconds(CARD, {})) == (3, pytest.approx(2 / EAGER))


def test_phases_hold_what_is_on_the_card_then(planner: Planner) -> None:
    names = [phase.name for phase in planner.forecast().phases]
    assert names == ["load", "encode", "sample", "decode", "score", "update", "evaluate"]
    trained = planner.transformer(64, False).trained
    for name in names:
        assert memory(planner, name)["LoRA"] == memory(planner, name)["EMA"] == 4 * trained
    assert "text encoders" in memory(planner, "encode")
    assert "judges" not in memory(planner, "encode")
    watched = planner.judges[0].weights + planner.watching[0].weights
    assert memory(planner, "evaluate")["judges"] == watched
    update = memory(planner, "update")
    assert update["gradients"] == 12 * trained
    assert update["objectives' gradients"] == 2 * 8 * trained  # in float64, for two rewards
    assert update["judges"] == memory(planner, "sample")["judges"] == watched


def test_settings_change_what_they_should(planner: Planner) -> None:
    own = planner.settings
    plain = planner.forecast()
    moved = replace(own, scoring=replace(own.scoring, offload=True))
    assert "judges" not in memory(planner, "update", settings=moved)
    assert memory(planner, "sample", settings=moved)["judges"] == planner.judges[0].weights
    split = replace(own, policy=replace(own.policy, shard=True))
    assert memory(planner, "load", settings=split)["transformer"] == 40e6 + 80e6 + 2 * 10e6
    guided = replace(own, sampling=replace(own.sampling, guidance=4.5))
    cost = planner.transformer(64, False)
    assert memory(planner, "update", settings=guided)["saved activations"] == cost.saved.at(4)
    sample, update = (
        {p.name: p for p in planner.forecast(guided).phases}[name].work[0].flops
        for name in ("sample", "update")
    )
    first = {p.name: p.work[0].flops for p in plain.phases if p.work}
    assert (sample, update) == (2 * first["sample"], 2 * first["update"])
    assert first["sample"] == 8 * 6 * cost.forward_flops
    assert first["update"] == 8 * 2 * cost.training_flops
    with_kl = replace(own, loss=replace(own.loss, kl_weight=0.1))
    more = {p.name: p for p in planner.forecast(with_kl).phases}["update"].work[0].flops
    assert more == first["update"] + 8 * 2 * cost.forward_flops
    without = planner.forecast(judges=False)
    assert without.hours(CARD, {}) < plain.hours(CARD, {})
    assert without.peak.peak < plain.peak.peak


def test_a_device_of_another_machine_is_no_error() -> None:
    clip = {**TINY["rewards"]["clipscore"], "device": "cuda:3"}
    judges = Planner(config.from_dict({**TINY, "rewards": {"clipscore": clip}}), gpus=1).judges
    assert judges[0].weights > 0
    clip["device"] = "cpu"
    judges = Planner(config.from_dict({**TINY, "rewards": {"clipscore": clip}}), gpus=1).judges
    assert judges[0].weights == 0


def test_hours_are_those_of_all_cards_and_phases(planner: Planner) -> None:
    own = planner.forecast()
    seconds = {phase.name: phase.times * phase.seconds(CARD, {}) for phase in own.phases}
    assert own.hours(CARD, {}) == pytest.approx(2 * sum(seconds.values()) / 3600)
    assert {phase.name: phase.times for phase in own.phases}["evaluate"] == 3
    assert own.fits(CARD)
    assert own.headroom(CARD) == 80e9 - RESERVE - own.peak.peak
    assert not own.fits(replace(CARD, memory=2))


def test_the_disk_holds_checkpoints_and_embeddings(planner: Planner) -> None:
    trained = planner.transformer(64, False).trained
    own = planner.forecast()
    assert own.disk["checkpoints"] == 3 * 24 * trained
    assert own.disk["prompt embeddings"] == 0
    cached = replace(planner.settings.policy, embeds_dir="somewhere")
    with_files = planner.forecast(replace(planner.settings, policy=cached))
    assert with_files.disk["prompt embeddings"] == planner.prompts * 4 * (32 * 128 + 128)
    crowded = replace(planner.settings.policy, embeds_memory_gb=1e-9)
    visiting = planner.forecast(replace(planner.settings, policy=crowded))
    encode = next(phase for phase in visiting.phases if phase.name == "encode")
    assert encode.times == 40
    assert "judges" in encode.memory


def test_what_is_not_planned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moa_diffusion.planning.planner.transformer_cost", transformer_cost)
    with pytest.raises(ConfigError, match=r"policy\.name: should be sd3"):
        Planner(config.from_dict({**TINY, "policy": {"name": "toy"}}), gpus=1)
    lora = {"path": "tiny", "lora": {"target_modules": ["nothing"]}}
    wrong = Planner(config.from_dict({**TINY, "policy": lora}), gpus=1)
    with pytest.raises(ConfigError, match=r"policy: .*nothing"):
        wrong.forecast()


def test_images_that_are_noised_again_take_draws_and_anchors(planner: Planner) -> None:
    """Of nft: the old copy's pass and the reference's, for each draw; one latent per image."""
    own, cost = planner.settings, planner.transformer(64, False)
    loss = {"kind": "forward", "forward": {"preset": "nft", "draws": 3}, "kl_weight": 1e-4}
    forward = config.from_dict(TINY | {"loss": loss, "sampling": {**TINY["sampling"], "window": 0}})
    phases = {phase.name: phase for phase in planner.forecast(forward).phases}
    trained = 8 * 3 * (cost.training_flops + 2 * cost.forward_flops)
    assert phases["update"].work[0].flops == trained
    assert phases["update"].memory["LoRA copies"] == 4 * cost.trained
    latent = 16 * 8 * 8 * 4
    assert phases["update"].memory["rollout"] == 8 * latent
    plain = {phase.name: phase for phase in planner.forecast().phases}
    assert "LoRA copies" not in plain["update"].memory
    assert plain["update"].memory["rollout"] == 8 * 3 * latent  # before, between and after two
    assert phases["sample"].work[0].flops == plain["sample"].work[0].flops
    assert planner.forecast(forward).disk["checkpoints"] == 3 * 28 * cost.trained
    noisy = replace(own, loss=replace(own.loss, clip="divergence", norm_weight=1.0))
    guarded = {phase.name: phase for phase in planner.forecast(noisy).phases}["update"]
    assert guarded.memory["rollout"] == 8 * 5 * latent
    assert guarded.work[0].flops == 8 * 2 * (cost.training_flops + cost.forward_flops)


def test_larger_evaluations_take_more(planner: Planner) -> None:
    own = planner.settings
    larger = replace(own, evaluation=replace(own.evaluation, resolution=128))
    plain, more = (
        {phase.name: phase for phase in planner.forecast(one).phases} for one in (own, larger)
    )
    assert more["evaluate"].work[0].flops == 4 * plain["evaluate"].work[0].flops
    assert more["evaluate"].memory["activations"] > 3 * plain["evaluate"].memory["activations"]
    assert more["sample"] == plain["sample"]
