"""Deterministic steps: Euler's, and those of second order."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from sections import sd3_policy
from torch import Tensor

from moa_diffusion import tiny
from moa_diffusion.policies.sd3 import load_pipeline
from moa_diffusion.policies.sd3.schedule import Schedule, Walk
from moa_diffusion.types import Request

CPU = torch.device("cpu")


def schedule(steps: int) -> Schedule:
    return Schedule(FlowMatchEulerDiscreteScheduler(shift=3.0), steps, tokens=16, device=CPU)


def walked(steps: int, solver: str, velocity) -> float:
    """From 1 at noise level 1 down to 0."""
    levels = schedule(steps)
    walk, x = Walk(levels, solver), torch.ones(1, 1, 1, 1)
    for i, s in enumerate(levels.sigmas[:-1]):
        x = walk(i, x, velocity(x, s))
    return float(x)


def test_a_velocity_that_grows_evenly_is_followed_exactly_after_the_first_step() -> None:
    """``dx/ds = s``: the middle of a step is met, where Euler takes its beginning."""
    first = schedule(8).sigmas[1]
    lost = (1 - first) ** 2 / 2  # of the first step, which has none before it
    found = walked(8, "multistep", lambda x, s: torch.full_like(x, s))
    # The integral is 1/2. Float32, eight steps.
    assert found == pytest.approx(1 - 0.5 - lost, abs=1e-6)
    assert walked(8, "euler", lambda x, s: torch.full_like(x, s)) < found - 0.05


def test_halving_the_steps_costs_four_times_the_error() -> None:
    """``dx/ds = x``, from 1 back to exp(-1): second order, where Euler's is first."""
    errors = {
        solver: [abs(walked(n, solver, lambda x, s: x) - math.exp(-1)) for n in (20, 40)]
        for solver in ("euler", "multistep")
    }
    assert 1.8 < errors["euler"][0] / errors["euler"][1] < 2.2
    assert 3.4 < errors["multistep"][0] / errors["multistep"][1] < 4.6


def test_a_step_that_does_not_follow_is_eulers() -> None:
    """Behind a window of steps with noise, say."""
    levels, x = schedule(6), torch.ones(1, 1, 1, 1)
    walk, euler = (Walk(levels, solver) for solver in ("multistep", "euler"))
    walk(0, x, torch.full_like(x, 5.0))
    assert torch.equal(walk(2, x, x), euler(2, x, x))
    assert not torch.equal(walk(3, x, 2 * x), euler(3, x, 2 * x))


def test_fewer_steps_draw_the_same_images() -> None:
    """Root mean square distances of pixels from 60 steps: 0.013, 0.006 and 0.005."""
    prompts = ["a red circle on a blue background", 'a sign that says "GO"']
    requests = [Request(prompt=prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    pipeline = load_pipeline(str(tiny.PIPELINE_PATH))

    def drawn(steps: int, solver: str) -> Tensor:
        policy = sd3_policy(
            copy.deepcopy(pipeline),
            resolution=64,
            max_sequence_length=16,
            eval_guidance=1.0,
            eval_steps=steps,
            eval_solver=solver,
        )
        policy.prepare(prompts)
        return policy.generate(requests).outputs

    exact = drawn(60, "multistep")
    ten, twenty, second = (
        float((drawn(steps, solver) - exact).square().mean().sqrt())
        for steps, solver in ((10, "euler"), (20, "euler"), (10, "multistep"))
    )
    assert second < twenty < ten / 2 + 0.001
    assert second < ten / 2
