"""One denoising step of a rectified flow: as an ODE, as an SDE, and its Gaussian log-prob.

A flow model predicts the velocity ``v = noise - data`` at ``x = (1 - s) data + s noise`` (Esser et
al., arXiv 2403.03206). Sampling walks sigma ``s`` from 1 to 0 in steps of length ``s - s_next``.
Every kind of step is linear in ``x`` and ``v``, so a step is four numbers::

    x_next = step.x * x + step.v * v + step.std * noise

How much a step weighs in the policy gradient follows from how fast its log-prob changes with
``v``: for unit noise by ``|step.v| / step.std``, if the log-prob is the density. With ten steps,
shift 3 and noise level 0.7 that is, from the first trained step to the last,

    Flow-SDE         .057  .078  .13  .19  .26  .37  .54  .83  1.5
    CPS              .047  .082  .13  .18  .26  .38  .58  1.1  34
    CPS, unscaled    .068  .11   .15  .18  .21  .22  .20  .13  .004

since ``std`` of a CPS step is a share of ``s_next``, which at the end is nearly 0: the last step
alone would be trained. Flow-CPS's code has no such step, because its log-prob leaves ``1 / (2
std^2)`` out. So does a step that is ``unscaled``, whose rate is ``2 |step.v| step.std``.

All functions are pure; latents and velocities are ``[N, C, H, W]`` in float32 (cast before
calling), sigmas Python floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

KL_KINDS = ("gaussian", "dt_free", "velocity")


@dataclass(frozen=True, slots=True)
class Step:
    """Coefficients of one step; ``std`` is 0 for a deterministic one."""

    x: float
    v: float
    std: float
    length: float  # s - s_next
    unscaled: bool = False  # its log-prob is minus the squared distance, as Flow-CPS has it


@dataclass(frozen=True, slots=True)
class Steps:
    """Coefficients of a batch, each ``[N, 1, 1, 1]`` (or ``[1, 1, 1, 1]``), float32 or bool."""

    x: Tensor
    v: Tensor
    std: Tensor
    length: Tensor
    unscaled: Tensor | None = None  # None: no step is

    @classmethod
    def of(cls, steps: Sequence[Step], device: torch.device) -> Steps:
        """Return one row per step."""
        rows = [[step.x, step.v, step.std, step.length] for step in steps]
        columns = torch.tensor(rows, dtype=torch.float32, device=device).T
        x, v, std, length = columns[:, :, None, None, None]
        if not any(step.unscaled for step in steps):
            return cls(x=x, v=v, std=std, length=length)
        unscaled = torch.tensor([step.unscaled for step in steps], device=device)
        return cls(x=x, v=v, std=std, length=length, unscaled=unscaled[:, None, None, None])

    def __getitem__(self, rows: slice) -> Steps:
        """Return some of them."""
        return self._each(lambda part: part[rows])

    def repeat(self, times: int) -> Steps:
        """Return all of them, one after the other, so many times over."""
        return self._each(lambda part: part.repeat(times, 1, 1, 1))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Steps:
        x, v, std, length = map(change, (self.x, self.v, self.std, self.length))
        unscaled = None if self.unscaled is None else change(self.unscaled)
        return Steps(x=x, v=v, std=std, length=length, unscaled=unscaled)

    def mean(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the mean ``[N, C, H, W]`` of ``x_next`` by latents and guided velocities."""
        return self.x * x + self.v * v

    def log_prob(self, x_next: Tensor, mean: Tensor) -> Tensor:
        """Return the log density of ``x_next [N, C, H, W]``, averaged: ``[N]``, nats/dimension.

        The average, not the sum, is the field's convention (Flow-GRPO), and why clip ranges are
        as small as 1e-4: a ratio of 1.0001 per dimension is a large step for the whole image.

        Of an ``unscaled`` step it is ``-(x_next - mean)^2``, which is ``2 std^2`` times the density
        up to a constant: a clip range that goes with it does not go with the density.
        """
        gap = x_next - mean
        z = gap / self.std
        per_dimension = -0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)
        if self.unscaled is not None:
            per_dimension = torch.where(self.unscaled, -gap.square(), per_dimension)
        return per_dimension.flatten(1).mean(1)

    def even_score(self, v: Tensor, noise: Tensor) -> Tensor:
        """Return what stands for the log density where all steps shall count alike: ``[N]``.

        Differences of it are normalised log ratios. With ``m`` the mean under the policy that
        drew the step's ``noise``, ``m'`` under another, and D the dimensions, the log ratio is ::

            log r = ((m' - m) . noise / std - |m' - m|^2 / (2 std^2)) / D

        Its second term makes it negative on average, by more where ``std`` is small, and its first
        moves by ``|step.v| / std`` times the change of the velocity, some 26 times more at the
        last steps than at the first. GRPO-Guard (arXiv 2510.22319, eq. 8; its code) adds the second
        term back and multiplies by ``std``, and divides the loss by the step's length; we multiply
        by ``std / |step.v|``, which does both to the loss (but for Flow-SDE's constant
        ``1 + noise_level^2 / 2``) and to the clip as well. What is left is linear in the velocity::

            log r std / |step.v| = sign(step.v) (v' - v) . noise / D

        Args:
            v: Velocity ``[N, C, H, W]`` of the policy after guidance.
            noise: Noise ``[N, C, H, W]`` that the step was drawn with.
        """
        return (self.v.sign() * v * noise).flatten(1).mean(1)

    def moved(self, mean: Tensor, x_next: Tensor, noise: Tensor, clip: str) -> Tensor:
        """Return how far a step is from the policy that drew it, as the clip measures it: ``[N]``.

        Args:
            mean: Mean ``[N, C, H, W]`` under the policy as it is.
            x_next: Latents that were drawn.
            noise: Noise that they were drawn with.
            clip: ``divergence``, the KL of the two Gaussians, averaged over CHW, with which
                Flow-DPPO (arXiv 2606.11025) bounds the policy; or ``normalized``, the log ratio
                without its negative mean and of one size for all steps: see ``even_score``.
        """
        shift = mean - (x_next - self.std * noise)
        if clip == "divergence":
            return (shift / self.std).square().flatten(1).mean(1) / 2
        return (shift * noise / self.v.abs()).flatten(1).mean(1)

    def kl(self, v: Tensor, v_ref: Tensor, kind: str) -> Tensor:
        """Return the KL of the policy's step to the reference's, averaged over CHW: ``[N]``, >= 0.

        Args:
            v: Velocity ``[N, C, H, W]`` of the policy.
            v_ref: Velocity ``[N, C, H, W]`` of the reference.
            kind: ``gaussian``, the true KL ``|difference of means|^2 / 2 std^2``; ``dt_free``, what
                Flow-GRPO's and Flow-CPS's code have: ``std`` there is the spread per unit time in
                Flow-SDE, so that the true KL is multiplied by the step's length, and the spread
                itself in CPS, so that it is the true KL; ``velocity``, the mean squared difference
                of the velocities, which weighs all steps alike. The first two divide by ``std^2``:
                with CPS nearly all of them is the last trained step's.

        Raises:
            ValueError: For another kind.
        """
        if kind not in KL_KINDS:
            raise ValueError(f"Parameter `kind` should be one of {KL_KINDS}. Found {kind!r}.")
        gap = (v - v_ref).square().flatten(1).mean(1)  # [N]
        if kind == "velocity":
            return gap
        factor = (self.v / self.std).square() / 2  # [N, 1, 1, 1]
        if kind == "dt_free":
            factor = factor * (
                self.length
                if self.unscaled is None
                else torch.where(self.unscaled, 1.0, self.length)
            )
        return factor.flatten() * gap


def norm(v: Tensor) -> Tensor:
    """Return the root mean square ``[N]`` of velocities ``[N, C, H, W]``."""
    return v.square().flatten(1).mean(1).sqrt()


def ode(s: float, s_next: float) -> Step:
    """Take an Euler step of the probability-flow ODE (what deployment uses)."""
    return Step(1.0, s_next - s, 0.0, s - s_next)


def flow_sde(s: float, s_next: float, *, noise_level: float, s_second: float) -> Step:
    """Take an Euler-Maruyama step of the flow's SDE (Flow-GRPO, arXiv 2505.05470).

    With ``D = s_next - s`` and ``g = noise_level sqrt(s / (1 - s))``: the mean is
    ``x (1 + g^2 D / 2s) + v (1 + g^2 (1 - s) / 2s) D``, the spread ``g sqrt(-D)``.

    Args:
        s: This step's sigma, in (0, 1].
        s_next: The next sigma, in [0, s).
        noise_level: ``a`` in the paper, > 0; 0.7 there.
        s_second: The schedule's second sigma; stands for ``s`` in ``1 - s`` where ``s`` is 1.
    """
    d = s_next - s
    g = noise_level * math.sqrt(s / (1 - (s_second if s >= 1 else s)))
    half = g**2 / (2 * s)
    return Step(1 + half * d, (1 + half * (1 - s)) * d, g * math.sqrt(-d), -d)


def cps(s: float, s_next: float, *, noise_level: float, s_second: float = 1.0) -> Step:
    """Take a coefficients-preserving step (Flow-CPS, arXiv 2509.05952): s_next of noise is left.

    With ``std = s_next sin(noise_level pi/2)``, ``x_next = (1 - s_next) data + sqrt(s_next^2 -
    std^2) old noise + std fresh noise``, where data is ``x - s v`` and old noise ``x + (1 - s) v``.
    The step is ``unscaled``: its log-prob is the published code's, not the density.

    Args:
        s: This step's sigma, in (0, 1].
        s_next: The next sigma, in (0, s).
        noise_level: In (0, 1]; 1 replaces all noise.
        s_second: The schedule's second sigma, which this step does not depend on.
    """
    std = s_next * math.sin(noise_level * math.pi / 2)
    # max(): the difference of two equal numbers may round below zero when noise_level is 1.
    keep = math.sqrt(max(s_next**2 - std**2, 0.0))
    v = keep * (1 - s) - (1 - s_next) * s
    return Step(1 - s_next + keep, v, std, s - s_next, unscaled=True)


class StochasticSampler(Protocol):
    """A kind of stochastic step: a function of two neighbouring sigmas of the schedule."""

    def __call__(self, s: float, s_next: float, *, noise_level: float, s_second: float) -> Step:
        """Return the step from sigma ``s`` to ``s_next``, with a positive ``std``.

        Args:
            s: This step's sigma, in (0, 1].
            s_next: The next sigma, in (0, s).
            noise_level: ``sampling.noise_level``, positive.
            s_second: The schedule's second sigma, for steps that have no value where ``s`` is 1.
        """
        ...


SAMPLERS: dict[str, StochasticSampler] = {"flow_sde": flow_sde, "cps": cps}


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator per sample, so that its noise depends on its own seed alone.

    A diffusers pipeline called with ``generator=generators(seeds)`` starts from the same latents.
    """
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def noise(
    sources: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Draw standard normal ``[len(sources), *shape]`` on the CPU, and move it to ``device``.

    Args:
        sources: One generator per sample, so that a sample's noise does not depend on its batch.
        shape: Shape of one sample's noise.
        device: Where the noise is needed.
    """
    return torch.stack([torch.randn(shape, generator=source) for source in sources]).to(device)
