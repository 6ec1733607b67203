"""APEX: adaptive priorities P^3 (https://arxiv.org/abs/2601.06574), reconstructed.

The published description names three terms, learning *potential*, *conflict* penalty and progress
*need*; its equations were not available. What stands here is a reconstruction from that
description, with ``Rbar_k`` the running level of reward k, ``s_k`` the RMS group std and ``sbar_k``
its EMA::

    L_k = v_k / max_j v_j,    v_k = max(0, Rbar_k(e) - Rbar_k(e - H)) / (H sbar_k)        in [0, 1]
    C_k = sum_{j != k} max(0, -cos(g_j, g_k)) / (K - 1)                                    in [0, 1]
    N_k = 1 - (Rbar_k - base_k) / (target_k - base_k)          1 at the start, 0 at the target
    q = softmax((a_L L - a_C C + a_N N) / tau),   w <- EMA of (1 - K f) q + f

Deviations, all ours: targets need not be chosen. Unless given, ``base_k`` is the mean of the first
rollouts and ``target_k = base_k + step * s_k(start)``: one within-group standard deviation in
whatever unit. ``s_k``, the unit of ``apex_progress`` too, is the population's deviation, which in
groups of n is ``sqrt((n - 1) / n)`` of the unbiased one, the unit of ``eval_gain``. The need is not
clipped: an objective that has *fallen* below its base counts more than one that has not moved, and
one far beyond its target less than one that has just reached it. So the need alone is a soft
minimum of the progress, and nothing else here knows which of several normalised rewards is being
lost. ``Rbar`` compares prompts with themselves (``running_level.py``), so it does not move because
a rollout happened to draw easy prompts. It does move with the decisions that have noise: at the
same policy, a rollout in a late window of denoising steps scores unlike one in an early window.
``cos`` is the exact cosine of the objectives' LoRA gradients, or the correlation of their
advantages, which costs nothing.

An importance of one's own is ours as well. ``p_k``, over the mean of all, scales the need to
``p_k N_k``, or beyond the target, where it is negative, to ``N_k / p_k``. So a larger importance
never gives a smaller weight; an objective of twice the importance is wanted as much when half as
far from its target; and equal ones change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from moa_diffusion.objectives.base import Weighting, by_name
from moa_diffusion.objectives.normalize import update_ema
from moa_diffusion.objectives.running_level import MEMORY, WARMUP, RunningLevel
from moa_diffusion.statistics.groups import rms_group_std
from moa_diffusion.types import ObjectiveStats

Conflict = Literal["gradients", "advantages", "off"]
CONFLICTS = get_args(Conflict)


class Apex(Weighting):
    """Weights that follow each objective's potential, conflicts and need.

    Args:
        objectives: Names of the K objectives.
        weights: K positive finite numbers, the importance of each objective; equal by default.
        potential: Weight ``a_L`` of the learning potential, at least 0; 0 switches the term off.
        conflict: What conflicts are measured on: ``gradients`` (needs the Gramian),
            ``advantages``, or ``off``.
        penalty: Weight ``a_C`` of the conflict, at least 0.
        need: Weight ``a_N`` of the need, at least 0; 0 switches the term off.
        temperature: Temperature ``tau`` of the softmax, positive; the higher, the more alike the
            weights.
        floor: Least weight ``f`` of an objective, in [0, 1/K].
        horizon: Number ``H`` of rollouts over which learning is measured, at least 1.
        warmup: Number of rollouts with equal weights, at least 1; ``base`` is their mean.
        memory: Number of prompts, the last ones seen, over which ``Rbar`` is taken, at least 1.
        spread_decay: Decay of the moving average of spreads, in [0, 1).
        decay: Decay of the moving average of weights, in [0, 1).
        step: Distance of automatic targets from the base, in within-group standard deviations;
            positive.
        base: Mean reward before training, by name, any number; measured on the first rollouts if
            absent.
        targets: Reward to reach, by name, any number above the base; automatic if absent.
    """

    spread: Tensor
    base: Tensor
    unit: Tensor
    history: Tensor
    weights: Tensor
    seen: Tensor

    def __init__(
        self,
        objectives: Sequence[str],
        *,
        weights: Sequence[float] | None = None,
        potential: float = 0.5,
        conflict: Conflict = "advantages",
        penalty: float = 1.0,
        need: float = 2.0,
        temperature: float = 1.0,
        floor: float = 0.05,
        horizon: int = 10,
        warmup: int = WARMUP,
        memory: int = MEMORY,
        spread_decay: float = 0.9,
        decay: float = 0.8,
        step: float = 1.0,
        base: Mapping[str, float] | None = None,
        targets: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(objectives)
        count = len(self.objectives)
        if conflict not in CONFLICTS:
            raise ValueError(
                f"Parameter `conflict` should be one of {CONFLICTS}. Found {conflict!r}."
            )
        for name, value in (("potential", potential), ("penalty", penalty), ("need", need)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Parameter `{name}` should be at least 0. Found {value}.")
        for name, value in (("temperature", temperature), ("step", step)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"Parameter `{name}` should be positive. Found {value}.")
        for name, value in (("spread_decay", spread_decay), ("decay", decay)):
            if not 0 <= value < 1:
                raise ValueError(f"Parameter `{name}` should be in [0, 1). Found {value}.")
        for name, rollouts in (("horizon", horizon), ("warmup", warmup), ("memory", memory)):
            if rollouts < 1:
                raise ValueError(f"Parameter `{name}` should be at least 1. Found {rollouts}.")
        if not 0 <= floor <= 1 / count:
            raise ValueError(
                f"Parameter `floor` should be in [0, 1 / K = {1 / count:.3g}]. Found {floor}."
            )
        self.importance = self._importance(weights, need)  # [K], 1 on average
        self.needs_gramian = conflict == "gradients"
        self.potential, self.penalty, self.need = potential, penalty, need
        self.conflict, self.temperature, self.floor = conflict, temperature, floor
        self.horizon, self.warmup = horizon, warmup
        self.spread_decay, self.decay, self.step = spread_decay, decay, step
        self.given_base = by_name("base", base, self.objectives)
        self.given_target = by_name("targets", targets, self.objectives)
        below = self.given_target <= self.given_base  # False where either is NaN
        if below.any():
            k = int(below.nonzero()[0])
            raise ValueError(
                f"Parameter `targets` should lie above the base level {float(self.given_base[k])} "
                f"of {self.objectives[k]!r}. Found {float(self.given_target[k])}."
            )
        unknown = torch.full((count,), torch.nan, dtype=torch.float64)  # NaN: not measured yet
        self.register_buffer("spread", unknown.clone())  # sbar
        self.register_buffer("base", unknown.clone())
        self.target = unknown.clone()
        self.register_buffer("unit", unknown.clone())  # within-group std at the start
        self.register_buffer("history", unknown.repeat(horizon + 1, 1))  # Rbar, oldest first
        self.register_buffer("weights", torch.full_like(unknown, 1 / count))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # rollouts
        self.running_level = RunningLevel(count, warmup=warmup, memory=memory)
        self._report: dict[str, float] = {}

    @torch.no_grad()
    def forward(self, stats: ObjectiveStats) -> Tensor:
        """Return ``w = softmax`` of learning, conflict and need, with a floor: ``[K]``."""
        applies = ~torch.isnan(stats.rewards.values)
        self.seen = self.seen + 1
        self.spread = update_ema(self.spread, rms_group_std(stats.rewards), self.spread_decay)
        mean = self.running_level(stats.rewards)
        self.history = torch.cat([self.history[1:], mean[None]])
        self._set_targets(mean)

        learning, need = self._learning(mean), self._need(mean)
        conflicts = {"advantages": opposition(correlation(stats.advantages, applies))}
        if stats.gramian is not None:
            conflicts["gradients"] = opposition(cosine(stats.gramian))
        if self.conflict == "gradients" and stats.gramian is None:
            raise ValueError("Parameter `stats` should have a `gramian`. Found None.")
        conflict = conflicts.get(self.conflict, torch.zeros_like(need))  # zeros for "off"
        if self.seen > self.warmup:
            wanted = torch.where(need > 0, need * self.importance, need / self.importance)
            priority = self.potential * learning - self.penalty * conflict + self.need * wanted
            q = torch.softmax(priority / self.temperature, 0)
            q = (1 - len(q) * self.floor) * q + self.floor
            self.weights = self.decay * self.weights + (1 - self.decay) * q
        columns = {"apex_potential": learning, "apex_need": need, "apex_target": self.target}
        columns |= {f"conflict_{kind}": values for kind, values in conflicts.items()}
        columns["apex_progress"] = (mean - self.base) / self.unit
        self._report = {
            f"{group}/{name}": float(values[k])
            for group, values in columns.items()
            for k, name in enumerate(self.objectives)
        }
        return self.weights.clone()

    def report(self) -> dict[str, float]:
        """Return the terms of the last call, for each objective that was measured."""
        return self._report

    # ------------------------------------------------------------------ parts

    def _importance(self, weights: Sequence[float] | None, need: float) -> Tensor:
        """Return the importance of each objective, over the mean of all."""
        values = [1.0] * len(self.objectives) if weights is None else list(weights)
        if len(values) != len(self.objectives) or not all(0 < one < math.inf for one in values):
            raise ValueError(
                "Parameter `weights` should have a positive finite entry per objective "
                f"{self.objectives}. Found {values}."
            )
        if need == 0 and len(set(values)) > 1:
            raise ValueError(
                "Parameter `weights` should have equal entries where `need` is 0, since they scale "
                f"the need. Found {values}."
            )
        importance = torch.tensor(values, dtype=torch.float64)
        return importance / importance.mean()

    def _set_targets(self, mean: Tensor) -> None:
        """Set base, unit and target at the start, or when an objective first has a spread."""
        late = self.base.isnan() | ~(self.unit > 0)
        fresh = late if self.seen > self.warmup else torch.ones_like(late)
        self.base = torch.where(fresh, mean, self.base)
        self.unit = torch.where(fresh, self.spread, self.unit)
        given, fixed = ~self.given_base.isnan(), ~self.given_target.isnan()
        self.base = torch.where(given, self.given_base, self.base)
        automatic = self.base + self.step * self.unit
        self.target = torch.where(fixed, self.given_target, automatic)
        below = fixed & (self.target <= self.base)
        if self.seen >= self.warmup and below.any():
            k = int(below.nonzero()[0])
            raise ValueError(
                f"Parameter `targets` should lie above the base level {float(self.base[k]):.4g} of "
                f"{self.objectives[k]!r}, measured on the first rollouts. "
                f"Found {float(self.target[k]):.4g}."
            )

    def _learning(self, mean: Tensor) -> Tensor:
        """Return ``L``, the speed of the last H rollouts (or all so far), relative to the best."""
        past = self.history[:-1]
        known = ~past.isnan()
        # The oldest known row of each objective: H rollouts ago, or fewer at the start.
        oldest = known.to(torch.int64).argmax(0, keepdim=True)  # [1, K]
        rollouts = len(past) - oldest[0]
        gain = (mean - past.gather(0, oldest)[0]).clamp(min=0)
        speed = (gain / (rollouts * self.spread)).nan_to_num(nan=0.0, posinf=0.0)
        return speed / (speed.max() + 1e-8)

    def _need(self, mean: Tensor) -> Tensor:
        """Return ``N``; 0 for an objective that is unknown or never varies."""
        gap = self.target - self.base
        need = 1 - (mean - self.base) / torch.where(gap > 0, gap, torch.nan)
        return need.nan_to_num(nan=0.0)


def correlation(advantages: Tensor, applies: Tensor) -> Tensor:
    """Return the Pearson correlation of the objectives' advantages where both apply: ``[K, K]``.

    Args:
        advantages: Advantages ``[K, N]``, centred in their groups, 0 where they do not apply.
        applies: Whether the objective applies to the sample: ``[K, N]`` bool.
    """
    weight = applies.to(advantages.dtype)
    product = advantages @ advantages.T
    square = advantages.square() @ weight.T  # [k, j]: of k, over the samples that j applies to
    scale = (square * square.T).sqrt()
    return product / torch.where(scale > 0, scale, 1.0)


def cosine(gramian: Tensor) -> Tensor:
    """Return cosines of K gradients, from their Gramian ``[K, K]``; 0 beside a zero gradient."""
    norm = gramian.diagonal().clamp(min=0).sqrt()
    scale = norm[:, None] * norm
    return gramian / torch.where(scale > 0, scale, 1.0)


def opposition(cosines: Tensor) -> Tensor:
    """Return ``C``, each objective's mean opposition to the others, in [0, 1]: ``[K]``.

    Args:
        cosines: Cosines of the objectives' gradients or advantages, ``[K, K]`` in [-1, 1].
    """
    against = (-cosines).clamp(0, 1)
    against = against - torch.diag(against.diagonal())
    return against.sum(1) / max(len(cosines) - 1, 1)
