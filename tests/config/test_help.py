"""The help explains every key, and the options of what is chosen."""

from __future__ import annotations

from moa_diffusion.config.help import help_text
from moa_diffusion.config.messages import all_keys, is_section


def test_every_key_is_explained():
    lines = help_text({}).splitlines()
    for key, hint in all_keys().items():
        if key != "rewards" and not is_section(hint):
            assert any(line.split()[:1] == [f"--{key}"] for line in lines), key


def test_the_options_of_the_chosen_method_and_heads():
    default = help_text({})
    assert "--objectives.weighting.targets" not in default
    chosen = help_text(
        {
            "objectives": {"method": "apex"},
            "rewards": {"legible": {"head": "ocr"}, "mine": {"path": "mine.py:f"}, "ocr": None},
            "evaluation": {"rewards": {"aesthetic": {}}},
        }
    )
    for option in (
        "--objectives.weighting.targets VALUE",
        "--objectives.normalizer.floor VALUE",
        "--rewards.legible.engine VALUE",
        "--rewards.legible.weight VALUE",
        "--rewards.ocr.engine VALUE",
        "--evaluation.rewards.aesthetic.weight VALUE",
    ):
        assert option in chosen, option
    assert "--rewards.mine" not in chosen


def test_what_is_not_checked_yet_does_no_harm():
    for values in (
        {"objectives": 3},
        {"objectives": {"method": ["apex"]}},
        {"rewards": [1]},
        {"rewards": {"a": {"head": 3}}},
        {"evaluation": {"rewards": "x"}},
    ):
        assert help_text(values).startswith("usage: ")
