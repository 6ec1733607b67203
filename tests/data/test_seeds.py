"""Seeds that are derived from names."""

from __future__ import annotations

import torch

from moa_diffusion.data.seeds import derive_seed, generator


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
