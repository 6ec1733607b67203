"""Identities: what changes scores changes them, and they survive JSON."""

from __future__ import annotations

import pytest

from rewards import FunctionHead, create
from rewards.identity import Identity

HEAD = create("sharpness")
IDENTITY = Identity.of("sharp", HEAD, {"option": 1})


def test_an_identity_survives_json():
    assert Identity.model_validate_json(IDENTITY.model_dump_json()) == IDENTITY


def test_options_count_unless_the_head_says_that_they_do_not(monkeypatch):
    assert Identity.of("sharp", HEAD, {"option": 2}).digest != IDENTITY.digest
    monkeypatch.setattr(type(HEAD), "neutral_options", ("device",))
    assert Identity.of("sharp", HEAD, {"option": 1, "device": "cuda"}).digest == IDENTITY.digest


def test_an_option_as_it_is_by_default_is_as_if_left_out():
    head, function = create("prompt_colour"), FunctionHead(lambda images, unit: [0.0])
    for one, options, others in (
        (head, {"share": 0.15, "tolerance": 0.1}, {"share": 0.2}),
        (function, {"per_image": False}, {"unit": ""}),  # the function's own, not the head's
    ):
        without = Identity.of("a", one, {}).digest
        assert Identity.of("a", one, options).digest == without
        assert Identity.of("a", one, others).digest != without


def test_the_name_on_a_server_is_not_part_of_the_digest():
    assert Identity.of("other", HEAD, {"option": 1}).digest == IDENTITY.digest


def test_a_server_of_an_earlier_version_may_not_say_what_a_head_scores():
    value = IDENTITY.model_dump()
    del value["scores"]
    assert Identity.model_validate({**value, "requires": []}).scores == "both"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": None}, "valid string"),
        ({"requires": "text"}, "valid tuple"),
        ({"provenance": {"weights": 1}}, "valid string"),
        ({"scores": "sounds"}, "'texts' or 'both'"),
    ],
)
def test_what_is_no_identity_is_refused(change, message):
    value = {**IDENTITY.model_dump(), "requires": [], **change}
    with pytest.raises(ValueError, match=message):
        Identity.model_validate(value)
    with pytest.raises(ValueError, match="Field required"):
        Identity.model_validate({"head": "sharp"})
