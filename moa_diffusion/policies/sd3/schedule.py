"""The noise levels of sampling, and the coefficients of every step, on the device once."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from moa_diffusion.policies.samplers import Step, Steps, StochasticSampler, ode


class Schedule:
    """The sigmas of a number of denoising steps, and the deterministic steps between them.

    Coefficients are sent to the device once: numbers sent there one by one wait.

    Args:
        scheduler: The pipeline's scheduler, which is left alone.
        steps: The number of denoising steps.
        tokens: The number of image tokens, which some schedules depend on.
        device: Where the latents live.

    Attributes:
        sigmas: Noise levels, ``steps + 1`` numbers from 1 down to 0.
        sigma: The same as a tensor.
        deterministic: Euler steps, as deployment takes them.
    """

    def __init__(self, scheduler: Any, steps: int, *, tokens: int, device: torch.device) -> None:
        self.sigmas = _sigmas(scheduler, steps, tokens)
        self.sigma = torch.tensor(self.sigmas, dtype=torch.float32, device=device)
        self.deterministic = Steps.of([ode(*pair) for pair in pairwise(self.sigmas)], device)

    def stochastic(self, sampler: StochasticSampler, noise_level: float) -> Steps:
        """Return every step that may be trained: all but the last.

        Raises:
            ValueError: If a step has no positive standard deviation.
        """
        steps = []
        for s, s_next in pairwise(self.sigmas[:-1]):
            step = sampler(s, s_next, noise_level=noise_level, s_second=self.sigmas[1])
            if not isinstance(step, Step) or not step.std > 0:
                raise ValueError(
                    "Parameter `sampler` should return a Step whose `std` is positive. "
                    f"Found {step!r} for the sigmas {s:g} and {s_next:g}."
                )
            steps.append(step)
        return Steps.of(steps, self.sigma.device)


class Walk:
    """Deterministic steps, one after the other.

    ``multistep`` is of second order: it takes the velocity in the middle of a step, extrapolated
    from the step before (the Adams-Bashforth method for steps of any length). Where there is none
    it is Euler's step.

    Args:
        schedule: The noise levels.
        solver: ``euler`` or ``multistep``.
    """

    def __init__(self, schedule: Schedule, solver: Literal["euler", "multistep"]) -> None:
        self._schedule, self._multistep = schedule, solver == "multistep"
        self._last: tuple[int, Tensor] | None = None  # the step before, and its velocity

    def __call__(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        """Return the latents ``[n, C, h, w]`` after step ``i``.

        Args:
            i: Number of the step.
            x: Latents before it.
            v: Velocities there.
        """
        middle = v
        if self._multistep and self._last is not None and self._last[0] == i - 1:
            before, here, after = self._schedule.sigmas[i - 1 : i + 2]
            middle = v + (here - after) / (before - here) / 2 * (v - self._last[1])
        self._last = i, v
        return self._schedule.deterministic[i : i + 1].mean(x, middle)


def _sigmas(scheduler: Any, steps: int, tokens: int) -> list[float]:
    scheduler, arguments = copy.deepcopy(scheduler), {}
    if scheduler.config.get("use_dynamic_shifting"):
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
            calculate_shift,
        )

        arguments["mu"] = calculate_shift(
            tokens,
            scheduler.config.get("base_image_seq_len", 256),
            scheduler.config.get("max_image_seq_len", 4096),
            scheduler.config.get("base_shift", 0.5),
            scheduler.config.get("max_shift", 1.16),
        )
    scheduler.set_timesteps(steps, device="cpu", **arguments)
    sigmas: list[float] = scheduler.sigmas.tolist()
    return sigmas
