"""The global random generators stay where they were."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from accelerate.utils import set_seed

from moa_diffusion.processes.randomness import seed_globally, undisturbed


def draw() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_drawn_inside_does_not_count(fails):
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])
    try:
        with undisturbed():
            draw()
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert draw() == expected


def test_a_seed_means_what_it_does_to_accelerate():
    found = []
    for seed in (set_seed, seed_globally):
        seed(2**32 - 1)
        found.append(draw())
    assert found[0] == found[1]
