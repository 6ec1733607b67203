"""One denoising step of a rectified flow: as an ODE, as an SDE, and its Gaussian log-prob.

A flow model predicts the velocity ``v = noise - data`` at ``x = (1 - s) data + s noise`` (Esser et
al., arXiv 2403.03206). Sampling walks sigma ``s`` from 1 to 0 in steps ``D = s_next - s < 0``.
All functions are pure, work on ``[N, C, H, W]`` tensors in float32 (cast before calling), and take
sigmas as Python floats; ``mean, std = step(...)`` describes the Gaussian from which a stochastic
step draws ``x_next = mean + std * noise``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

KL_KINDS = ("gaussian", "dt_free", "velocity")


def ode_step(x: Tensor, v: Tensor, s: float, s_next: float) -> Tensor:
    """Euler step of the probability-flow ODE (what deployment uses)."""
    return x + (s_next - s) * v


def flow_sde_step(
    x: Tensor, v: Tensor, s: float, s_next: float, *, noise_level: float, s_second: float
) -> tuple[Tensor, float]:
    """Euler-Maruyama step of the SDE with the flow's marginals (Flow-GRPO, arXiv 2505.05470).

    Args:
        x: latents ``[N, C, H, W]`` at sigma ``s``.
        v: velocity ``[N, C, H, W]``, after guidance.
        s: this step's sigma, in (0, 1].
        s_next: the next sigma, in [0, s).
        noise_level: ``a`` in the paper, > 0; 0.7 there.
        s_second: the schedule's second sigma; replaces ``s`` in ``1 - s`` where ``s`` is 1.

    Returns:
        mean ``[N, C, H, W]`` and standard deviation (scalar, > 0).
    """
    dt = s_next - s
    std = noise_level * math.sqrt(s / (1 - (s_second if s >= 1 else s)))
    mean = x * (1 + std**2 / (2 * s) * dt) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
    return mean, std * math.sqrt(-dt)


def cps_step(
    x: Tensor, v: Tensor, s: float, s_next: float, *, noise_level: float
) -> tuple[Tensor, float]:
    """Coefficients-preserving step (Flow-CPS, arXiv 2509.05952): the noise left is exactly s_next.

    Args:
        x: latents ``[N, C, H, W]`` at sigma ``s``.
        v: velocity ``[N, C, H, W]``, after guidance.
        s: this step's sigma, in (0, 1].
        s_next: the next sigma, in (0, s).
        noise_level: share of fresh noise, in (0, 1]; 1 replaces all noise.

    Returns:
        mean ``[N, C, H, W]`` and standard deviation (scalar, > 0).
    """
    std = s_next * math.sin(noise_level * math.pi / 2)
    data, noise = x - s * v, x + (1 - s) * v
    # max(): the difference of two equal numbers may round below zero when noise_level is 1.
    keep = math.sqrt(max(s_next**2 - std**2, 0.0))
    return (1 - s_next) * data + keep * noise, std


def gaussian_log_prob(x_next: Tensor, mean: Tensor, std: float) -> Tensor:
    """Log density of ``x_next [N, C, H, W]``, averaged over C, H, W: ``[N]`` in nats/dimension.

    The average, not the sum, is the field's convention (Flow-GRPO), and the reason why clip ranges
    are as small as 1e-4: a ratio of 1.0001 per dimension is a large step for the whole image.
    """
    z = (x_next - mean) / std
    per_dimension = -0.5 * z.square() - math.log(std) - 0.5 * math.log(2 * math.pi)
    return per_dimension.flatten(1).mean(1)


def step_kl(
    mean: Tensor, mean_ref: Tensor, std: float, s: float, s_next: float, kind: str
) -> Tensor:
    """KL between two steps of equal spread, averaged over C, H, W: ``[N]``, >= 0.

    Args:
        mean: ``[N, C, H, W]`` under the policy.
        mean_ref: ``[N, C, H, W]`` under the reference.
        std: their common standard deviation.
        s: this step's sigma.
        s_next: the next sigma.
        kind: ``gaussian``, the true KL ``|dm|^2 / 2 std^2``; or ``dt_free``, the same times the
            step length, as Flow-GRPO's code has it.

    Raises:
        ValueError: for another kind (``velocity`` needs the velocities: see ``velocity_kl``).
    """
    kl = ((mean - mean_ref) / std).square().flatten(1).mean(1) / 2
    if kind == "gaussian":
        return kl
    if kind == "dt_free":
        return kl * (s - s_next)
    raise ValueError(f"Parameter `kind` should be 'gaussian' or 'dt_free'. Found {kind!r}.")


def velocity_kl(v: Tensor, v_ref: Tensor) -> Tensor:
    """Mean squared difference of two velocities ``[N, C, H, W]``: ``[N]``; equal on all steps."""
    return (v - v_ref).square().flatten(1).mean(1)


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per sample, so that its noise depends on its own seed alone.

    A diffusers pipeline called with ``generator=generators(seeds)`` starts from the same latents.
    """
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def noise(
    sources: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Standard normal ``[len(sources), *shape]`` float32, drawn on the CPU, moved to ``device``."""
    return torch.stack([torch.randn(shape, generator=source) for source in sources]).to(device)
