"""Batches are named that the stated sizes do not fit, or that round differently."""

from __future__ import annotations

import pytest

from moa_diffusion import assembly
from moa_diffusion.config import from_dict


@pytest.mark.parametrize(
    ("sampling", "batches", "problem"),
    [
        ({"window": 2}, (8, 8, 1), None),
        ({"window": 2}, (16, 8, 2), None),
        ({"window": 0}, (16, 8, 2), "divide the 9 trained steps"),
        ({"window": 2}, (1, 8, 2), "1 rows in sampling and 16 in training"),
    ],
)
def test_batches_that_round_differently_are_named(sampling, batches, problem):
    sample_batch, micro_batch, step_batch = batches
    config = from_dict(
        {
            "policy": {"dtype": "float16", "step_batch": step_batch},
            "sampling": {"steps": 10} | sampling,
            "rewards": {"ocr": {}},
            "trainer": {"sample_batch": sample_batch, "micro_batch": micro_batch},
        }
    )
    found = assembly.unequal_batches(config, assembly.solve_geometry(config, 1))
    assert (found is None) if problem is None else (problem in found)


@pytest.mark.parametrize(
    ("world_size", "stated", "warned"),
    [
        (1, {"sample_batch": 12, "micro_batch": 12}, []),
        (2, {"sample_batch": 12, "micro_batch": 12}, []),
        (1, {"sample_batch": 7, "micro_batch": 12}, ["sample_batch: 7", "24 samples", "6 are"]),
        (2, {"sample_batch": 12, "micro_batch": 5}, ["micro_batch: 5", "12 samples", "4 are"]),
    ],
)
def test_a_smaller_batch_than_stated_is_told(world_size, stated, warned, caplog):
    rollout = {"groups": 4, "group_size": 6, "updates": 1}
    config = from_dict({"rewards": {"ocr": {}}, "trainer": rollout | stated})
    geometry = assembly.solve_geometry(config, world_size)
    share = 24 // world_size
    assert share % geometry.sample_batch == share % geometry.micro_batch == 0
    assert len(caplog.records) == bool(warned)
    assert all(part in caplog.text for part in warned)
