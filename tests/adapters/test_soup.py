"""Soups: the update is the weighted sum of the members' updates."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from moa_diffusion.adapters.soup import mix, mixtures
from moa_diffusion.policies.adapters import Adapter, read_sd3_adapter, sd3_skeleton
from moa_diffusion.storage import checkpoint
from moa_diffusion.tiny import PIPELINE_PATH
from moa_diffusion.types import ConfigError


def adapter(seed: int, rank: int, names: str = "xy") -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: (torch.randn(rank, 5, generator=generator), torch.randn(4, rank, generator=generator))
        for name in names
    }
    return Adapter(layers=layers, digest=f"digest {seed}")


def update(one: Adapter, name: str) -> torch.Tensor:
    a, b = one.layers[name]
    return b @ a


@pytest.mark.parametrize(("members", "points"), [(2, 5), (3, 3), (4, 2)])
def test_weights_sum_to_one_and_have_even_distances(members, points):
    weights = mixtures(members, points)
    assert len(weights) == len(set(weights)) == math.comb(points + members - 2, members - 1)
    assert all(sum(one) == pytest.approx(1) and min(one) >= 0 for one in weights)
    assert weights[0] == (0,) * (members - 1) + (1,)
    assert weights[-1] == (1,) + (0,) * (members - 1)


def test_the_update_is_the_weighted_sum():
    one, two, three = adapter(1, 2), adapter(2, 3), adapter(3, 1, "x")
    soup = mix([one, two, three], [0.2, 0.3, 0.5])
    parts = [(0.2, one), (0.3, two), (0.5, three)]
    expected = sum(weight * update(part, "x") for weight, part in parts)
    torch.testing.assert_close(update(soup, "x"), expected)
    torch.testing.assert_close(update(soup, "y"), 0.2 * update(one, "y") + 0.3 * update(two, "y"))
    assert [soup.layers[name][0].shape[0] for name in "xy"] == [6, 5]


def test_the_ends_are_the_members_themselves():
    one, two = adapter(1, 2), adapter(2, 3)
    assert mix([one, two], [0.0, 1.0]) is two


def test_the_digest_depends_on_members_and_weights_and_not_on_their_order():
    one, two = adapter(1, 2), adapter(2, 3)
    assert (
        mix([one, two], [1 / 3, 2 / 3]).digest == mix([two, one], [0.66666667, 0.33333333]).digest
    )
    assert mix([one, two], [0.25, 0.75]).digest != mix([one, two], [0.75, 0.25]).digest


@pytest.mark.parametrize(("members", "points", "key"), [(1, 5, "--soup"), (2, 1, "--points")])
def test_fewer_than_two_are_refused(members, points, key):
    with pytest.raises(ConfigError, match=rf"^{key}: should .* at least"):
        mixtures(members, points)


def test_a_soup_is_the_weighted_sum_of_the_updates(two_runs: Path):
    transformer = sd3_skeleton(str(PIPELINE_PATH))
    a, b = (
        read_sd3_adapter(checkpoint.step_folder(two_runs / name, 2) / "ema", transformer)
        for name in ("a", "b")
    )
    assert (a.rank, b.rank) == (4, 2)
    half = mix([a, b], [0.25, 0.75])
    assert half.rank == 6
    for name, (low, high) in half.layers.items():
        one, other = (adapter.layers[name] for adapter in (a, b))
        expected = 0.25 * one[1] @ one[0] + 0.75 * other[1] @ other[0]
        # Ranks in one sum or in two, in float32: some roundings, 6e-8 each.
        torch.testing.assert_close(high @ low, expected, rtol=1e-4, atol=1e-6)
    assert mix([a, b], [1.0, 0.0]) is a
    assert mix([a, b], [0.0, 1.0]) is b
    assert half.digest == mix([b, a], [0.75, 0.25]).digest
    assert half.digest != mix([a, b], [0.75, 0.25]).digest
