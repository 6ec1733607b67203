"""Published settings, and single settings in their place."""

from __future__ import annotations

import pytest

from moa_diffusion.config import check, from_dict
from moa_diffusion.config.presets import PRESETS, CopyRules, ForwardRules, forward_rules
from moa_diffusion.config.schema import CopyConfig, ForwardConfig
from moa_diffusion.types import ConfigError


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_alone_is_what_was_published(preset: str) -> None:
    assert forward_rules(ForwardConfig(preset=preset)) == PRESETS[preset]
    config = from_dict(
        {
            "rewards": {"red": {}},
            "prompts": {"heldout": "tiny"},
            "sampling": {"guidance": 1.0},
            "loss": {"kind": "forward", "kl_weight": 1e-4, "forward": {"preset": preset}},
        }
    )
    check(config)


def test_single_settings_take_the_presets_place() -> None:
    """Also those that are zero or false, and single ones of a copy."""
    rules = forward_rules(
        ForwardConfig(
            preset="awm",
            first=0.0,
            by_time=False,
            draws=3,
            average=CopyConfig(decay_rate=0.0),
            old=CopyConfig(weight=2.0, decay_after=75),
        )
    )
    awm = PRESETS["awm"]
    assert (rules.match, rules.times, rules.scale) == ("huber", "strata", awm.scale)
    assert (rules.first, rules.by_time, rules.draws) == (0.0, False, 3)
    assert rules.average == CopyRules(weight=1.0, decay_rate=0.0, decay_limit=0.3)
    assert rules.old == CopyRules(weight=2.0, decay_after=75)
    assert forward_rules(ForwardConfig()) == ForwardRules()


def test_there_are_the_copies_that_something_looks_at() -> None:
    expected = {"nft": ["old"], "awm": ["average"], "ram": []}
    assert {name: list(rules.copies) for name, rules in PRESETS.items()} == expected
    for forward, copies in (
        (ForwardConfig(draws_with="old"), ["old"]),
        (
            ForwardConfig(old=CopyConfig(weight=0.1), average=CopyConfig(weight=0.1)),
            ["old", "average"],
        ),
        (ForwardConfig(preset="awm", average=CopyConfig(weight=0.0)), []),
        (ForwardConfig(old=CopyConfig(decay_rate=0.1)), []),
    ):
        assert list(forward_rules(forward).copies) == copies


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            {"match": "branches"},
            r"old\.weight: should be positive for match branches, .* Found 0\.",
        ),
        ({"preset": "nft", "old": {"weight": 0}}, r"old\.weight: should be positive .* Found 0\."),
        ({"preset": "awm", "last": 0.1}, r"first: should be less than last, 0\.1\. Found 0\.1\."),
        ({"preset": "dgpo"}, r"preset: should be one of nft, awm, ram or null\. Found 'dgpo'"),
        ({"draws": 0}, r"draws: should be at least 1 or null\. Found 0\."),
        ({"average": {"wieght": 1}}, r"average\.wieght: unknown key\. Did you mean .*weight"),
        ({"old": {"decay_limit": 1.0}}, r"old\.decay_limit: should be .* Found 1\.0\."),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_model_is_loaded(
    forward: dict[str, object], message: str
) -> None:
    values = {
        "rewards": {"red": {}},
        "prompts": {"heldout": "tiny"},
        "sampling": {"guidance": 1.0},
        "loss": {"kind": "forward", "forward": forward},
    }
    with pytest.raises(ConfigError, match=rf"^loss\.forward\.{message}"):
        check(from_dict(values))
