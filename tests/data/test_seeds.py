"""Seeds that are derived from names."""

from __future__ import annotations

import pytest
import torch

from moa_diffusion.data.seeds import derive_seed, generator, read_seeds
from moa_diffusion.types import ConfigError


def test_seeds_are_frozen_and_fit_63_bits():
    assert derive_seed(0, "sample", 1, 2) == derive_seed("0", "sample", "1", "2")
    seeds = {derive_seed(0, "sample", i) for i in range(1000)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(7, "heldout", 0, 0) == 4682504687724043269, "runs could not be repeated"


def test_a_generator_starts_from_the_derived_seed():
    one = torch.rand(3, generator=generator(1, "a"))
    assert torch.equal(one, torch.rand(3, generator=generator(1, "a")))
    assert not torch.equal(one, torch.rand(3, generator=generator(1, "b")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3", (0, 1, 2)), ("0,4,7", (0, 4, 7)), ("7,", (7,)), (" 5, 0 ", (5, 0)), ("1", (0,))],
)
def test_a_number_of_seeds_or_the_seeds_themselves(text, expected):
    assert read_seeds(text) == expected


def test_a_number_of_seeds_begins_where_it_is_told_to():
    assert read_seeds("2", first=7) == (7, 8)
    assert read_seeds("2,3", first=7) == (2, 3)


@pytest.mark.parametrize("text", ["", ",", "0", "-1", "1,1", "1,-2", "one", "1.5"])
def test_what_names_no_seeds_is_refused(text):
    with pytest.raises(ConfigError, match="--seeds: should be a number of seeds, or different"):
        read_seeds(text)
