"""The table of cards."""

from __future__ import annotations

import pytest

from moa_diffusion.planning.gpus import GPUS, gpu
from moa_diffusion.types import ConfigError


def test_a_card_is_known_by_its_name() -> None:
    card = gpu("h100")
    assert (card.memory, card.half) == (80, 989)
    assert card.rate("bfloat16") == card.rate("float16") == 989e12
    assert card.rate("float32") == 67e12
    assert card.rate("float32", convolutions=True) == 989e12 / 2


def test_half_precision_is_faster_on_every_card() -> None:
    for card in GPUS.values():
        assert card.half > card.single > 0
        assert card.memory > 0 and card.bandwidth > 0


def test_an_unknown_card_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--card: should be one of .*Found 'h10'.*h100"):
        gpu("h10")
