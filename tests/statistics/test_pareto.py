"""Fronts: against the definition, and volumes against boxes."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from moa_diffusion.statistics.pareto import crowding, hypervolumes, nondominated, thinned


def test_nondominated_points_are_those_of_the_definition():
    points = torch.randint(0, 4, (40, 3), generator=torch.Generator().manual_seed(0)).double()

    def dominated(one: torch.Tensor) -> bool:
        return any((other >= one).all() and (other > one).any() for other in points)

    assert nondominated(points) == [not dominated(one) for one in points]


def test_a_column_with_nan_counts_for_nobody():
    points = torch.tensor([[1.0, math.nan], [2.0, 9.0]])
    assert nondominated(points) == [False, True]
    assert nondominated(points[:, 1:]) == [False, False]


def test_the_ends_stay_longest():
    points = torch.tensor([[0.0, 10.0], [1.0, 9.0], [5.0, 5.0], [10.0, 0.0]])
    distances = crowding(points)
    assert distances[0] == distances[3] == math.inf
    assert thinned(points, 3) == [0, 2, 3]
    assert thinned(points, 2) == [0, 3]
    assert thinned(points, 9) == [0, 1, 2, 3]


def test_volumes_are_those_of_boxes():
    pytest.importorskip("moocore")
    points = numpy.array(
        [[[1.0, 2.0], [2.0, 1.0]], [[1.0, 2.0], [-1.0, 9.0]], [[1.0, math.nan]] * 2]
    )
    volumes = hypervolumes(points)
    assert volumes[:2].tolist() == [3.0, 2.0]
    assert math.isnan(volumes[2])
    for model, boxes in ((0, [2.0, 2.0]), (1, [2.0, 0.0])):  # each model by itself
        volumes = hypervolumes(points[:, [model]])
        assert volumes[:2].tolist() == boxes
        assert math.isnan(volumes[2])
