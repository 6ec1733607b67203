"""How a rollout is cut over processes, optimizer steps and forward passes."""

from __future__ import annotations

from collections import Counter

import pytest

from moa_diffusion.training.geometry import Geometry
from moa_diffusion.types import ConfigError


def solve(**changes: int) -> Geometry:
    numbers = {
        "groups": 6,
        "group_size": 4,
        "updates": 2,
        "world_size": 1,
        "max_sample_batch": 16,
        "max_micro_batch": 5,
    }
    return Geometry.solve(**(numbers | changes))


def test_geometry_takes_the_largest_batches_that_divide():
    geometry = solve()
    assert (geometry.samples, geometry.per_rank) == (24, 24)
    assert (geometry.sample_batch, geometry.micro_batch, geometry.accumulation) == (12, 4, 3)
    shared = solve(world_size=4, max_micro_batch=100)
    assert (shared.per_rank, shared.sample_batch, shared.micro_batch) == (6, 6, 3)
    assert shared.accumulation == 1
    assert solve(groups=13, group_size=1, updates=1, max_micro_batch=12).micro_batch == 1


@pytest.mark.parametrize(
    ("rows", "limits", "sizes"),
    [
        (1, (16, 5), (4, 4)),  # as many samples as in training
        (2, (16, 5), (8, 4)),  # two decisions of a sample share a training pass
        (3, (16, 5), (12, 4)),
        (2, (6, 5), (6, 3)),
        (9, (8, 5), (8, 4)),  # a sample alone is more than a sampling pass may hold
        (5, (16, 5), (12, 4)),  # nor do five divide 24
    ],
)
def test_geometry_gives_sampling_and_training_equal_rows_where_it_can(rows, limits, sizes):
    geometry = solve(max_sample_batch=limits[0], max_micro_batch=limits[1], equal_rows=rows)
    assert (geometry.sample_batch, geometry.micro_batch) == sizes


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"world_size": 5}, r"6 \* 4 = 24 samples for 5 processes \* 2 updates"),
        ({"updates": 7}, r"24 samples for 1 processes \* 7 updates"),
        ({"world_size": 8, "updates": 2}, r"24 samples for 8 processes \* 2 updates"),
    ],
)
def test_geometry_refuses_what_cannot_be_shared(changes, found):
    with pytest.raises(ConfigError, match=r"`trainer.groups` \* `trainer.group_size`.*" + found):
        solve(**changes)


def test_geometry_describes_itself():
    assert solve(world_size=2).describe() == (
        "6 groups x 4 siblings = 24 samples per rollout on 2 processes: 12 each, sampled 12 at a "
        "time; 2 optimizer steps of 12 samples (2 micro-batches of 3 per process)"
    )
    assert "1 process: 24 each" in solve(updates=1).describe()
    assert "; 1 optimizer step of" in solve(updates=1).describe()


def global_minibatches(geometry: Geometry, step: int = 0) -> list[list[int]]:
    """Global sample numbers of each optimizer step."""
    steps: list[list[int]] = [[] for _ in range(geometry.updates)]
    for rank in range(geometry.world_size):
        parts = geometry.minibatches(seed=0, step=step, rank=rank)
        assert len(parts) == geometry.updates
        for update, part in enumerate(parts):
            assert part.shape == (geometry.accumulation, geometry.micro_batch)
            assert part.min() >= 0
            assert part.max() < geometry.per_rank
            steps[update] += (part.flatten() + rank * geometry.per_rank).tolist()
    return steps


@pytest.mark.parametrize("updates", [1, 2, 3])
@pytest.mark.parametrize("limit", [1, 4, 100])
def test_minibatches_partition_the_rollout_for_any_number_of_processes(updates, limit):
    alone = global_minibatches(solve(updates=updates, max_micro_batch=limit))
    assert sorted(i for part in alone for i in part) == list(range(24))
    assert {len(part) for part in alone} == {24 // updates}
    for world_size in (2, 4):
        shared = solve(updates=updates, world_size=world_size, max_micro_batch=limit)
        assert [sorted(part) for part in global_minibatches(shared)] == [sorted(p) for p in alone]


def test_minibatches_hold_siblings_of_every_group_and_change_with_the_step():
    geometry = solve(updates=2)
    for part in global_minibatches(geometry):
        assert Counter(i // 4 for i in part) == dict.fromkeys(range(6), 2)
    first, second = (global_minibatches(geometry, step=step) for step in (0, 1))
    assert first != second


def updated(geometry: Geometry, update: int) -> list[list[int]]:
    """Global sample numbers of the forward passes of an optimizer step."""
    return [
        (micro + rank * geometry.per_rank).tolist()
        for rank in range(geometry.world_size)
        for micro in geometry.minibatches(seed=0, step=2, rank=rank)[update]
    ]


def probed(geometry: Geometry, share: float) -> list[list[int]]:
    """Global sample numbers of a probe's forward passes, sorted."""
    return sorted(
        (micro + rank * geometry.per_rank).tolist()
        for rank in range(geometry.world_size)
        for micro in geometry.probe(share, seed=0, step=2, rank=rank)
    )


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_any_number_of_processes_makes_the_same_forward_passes(world_size):
    """Of the same samples in the same order: rows at other places of a pass round differently."""
    sizes = {"groups": 8, "group_size": 12, "updates": 4, "max_micro_batch": 3}
    alone, shared = (solve(**sizes, world_size=number) for number in (1, world_size))
    assert shared.micro_batch == alone.micro_batch == 3
    for update in range(4):
        assert updated(shared, update) == updated(alone, update)
    for share in (0.01, 0.1, 0.25, 0.4, 1.0):
        assert probed(shared, share) == probed(alone, share)
        assert len(probed(shared, share)) == max(1, round(share * 32))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6, 1.0])
def test_processes_share_a_probe_evenly(share):
    geometry = solve(groups=16, group_size=8, updates=2, world_size=4, max_micro_batch=4)
    counts = [len(geometry.probe(share, seed=0, step=0, rank=rank)) for rank in range(4)]
    assert sum(counts) == round(share * 32)
    assert max(counts) - min(counts) <= 2  # one for each of the two optimizer steps
