"""The help explains every key, and the options of what is chosen."""

from __future__ import annotations

from moa_diffusion.config.help import help_text
from moa_diffusion.config.messages import all_keys, is_section


def test_every_key_is_explained():
    lines = help_text({}, everything=True).splitlines()
    for key, hint in all_keys().items():
        if key != "rewards" and not is_section(hint):
            assert any(line.split()[:1] == [f"--{key}"] for line in lines), key


def test_the_short_help_names_sections_and_their_keys_and_explains_no_key(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    short = help_text({}, everything=False)
    assert len(short.splitlines()) < 100
    assert "--help all" in short
    words = set(short.replace("(", " ").replace(")", " ").split())
    for key, hint in all_keys().items():
        section, _, name = key.partition(".")
        inside = name or is_section(hint) or key == "rewards"
        assert (f"--{section}.*" if inside else key) in words, key
        if name:
            first, _, nested = name.partition(".")
            assert (f"{first}.*" if nested or is_section(hint) else name) in words, key
    assert "Number of samples per prompt." not in short
    assert "Number of samples per prompt." in help_text({}, everything=True)


def test_the_options_of_the_chosen_method_and_heads():
    default = help_text({}, everything=True)
    assert "--objectives.weighting.targets" not in default
    chosen = help_text(
        {
            "objectives": {"method": "apex"},
            "rewards": {"legible": {"head": "ocr"}, "mine": {"path": "mine.py:f"}, "ocr": None},
            "evaluation": {"rewards": {"aesthetic": {}}},
        },
        everything=True,
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
        assert help_text(values, everything=True).startswith("usage: ")
