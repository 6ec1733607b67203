"""Improve one objective under bounds on the others: MOPO (arXiv 2505.10892) on fresh samples.

The multipliers of the bounds ``b`` (in win rates, ``S`` of ``win_rate.py``) are the weights::

    w_0 = 1 / (1 + L),   w_k = lambda_k / (1 + L),   L = sum_k lambda_k
    Gbar_k   <- EMA of the batch mean of S_k
    I_k      <- clip(I_k + integral (b_k - Gbar_k), 0, maximum)
    lambda_k  = clip(I_k + proportional (b_k - Gbar_k), 0, maximum)       "lagrangian"
    lambda_k  = min(sigma / (Gbar_k - b_k), maximum)                      "barrier", MOPO-LB

and the KL's weight is divided by ``1 + L`` too. Together with ``WinRate``, which divides the
weighted mean and the KL's weight ``beta`` by the batch's spread ``sigma_B``, what is climbed is
``(E S_0 + sum_k lambda_k E S_k - beta KL) / ((1 + L) sigma_B)``: the Lagrangian, up to one positive
number.

Deviations: the online form is ours; the paper learns from a fixed set of preferences
(``mopo_offline.py`` has its closed form). The proportional term damps the ripple of plain dual
ascent (``proportional = 0``); ``b_k`` does not follow the level that was reached.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from moa_diffusion.objectives.base import Weighting
from moa_diffusion.objectives.mopo_offline import Variant, barrier, dual_step
from moa_diffusion.objectives.normalize import update_ema
from moa_diffusion.objectives.running_level import MEMORY, WARMUP, RunningLevel
from moa_diffusion.statistics.groups import rms_group_std
from moa_diffusion.types import ObjectiveStats
from rewards.suggestions import did_you_mean

logger = logging.getLogger(__name__)

Units = Literal["win_rate", "reward"]


class Mopo(Weighting):
    """Weights ``[K]`` from how far each secondary objective is below its bound.

    An objective that applied to nothing in a rollout keeps its multiplier. With K = 1 there is
    nothing to bound: the weight is 1, the update that of the single reward.

    Gains: with the defaults a win rate 0.05 below its bound weighs as much as the primary objective
    at once (``20 x 0.05 = 1``), which short runs need, and the integral adds a tenth of that in ten
    rollouts. On the bandit of the tests this settles within 0.003 of the bounds. A gain of 0.02 and
    1 is still 0.07 to 0.2 below one of them after 45 rollouts; 1 and 0, plain dual ascent, passes
    them by up to 0.18 and swings on.

    Args:
        objectives: Names of the K objectives.
        primary: Name of the objective that is improved; by default the first.
        bounds: Least level of each secondary objective; one number for all, or a number for each.
            Win rates are in [0, 1], and 0.5 means "no worse than the reference model"; a reward may
            be any number.
        units: Unit of the bounds: ``win_rate``, or ``reward`` for bounds on the mean raw reward, of
            prompts that are compared with themselves. There four times the within-group spread (RMS
            std) of the first rollout that has any stands for a win rate of 1, about as steep as a
            win rate is; before that the multiplier is 0.
        variant: How multipliers follow the levels: ``lagrangian`` or ``barrier``.
        integral: Gain of the integral of the violation, per rollout; at least 0.
        proportional: Gain of the momentary violation, at least 0.
        maximum: Largest multiplier; positive.
        decay: Decay of the level's moving average, in [0, 1).
        sigma: Strength of the barrier, positive; the primary objective may lose about this much per
            bound.
        patience: Number of rollouts in a row at the largest multiplier and below the bound after
            which a warning says, once, that the bound may be out of reach; at least 1.
    """

    level: Tensor  # [K] Gbar; NaN: not measured yet
    unit: Tensor  # [K] what a violation is divided by; NaN: not measured yet
    integrated: Tensor  # [K] I
    multipliers: Tensor  # [K] lambda; always 0 for the primary objective
    capped: Tensor  # [K] rollouts in a row at the maximum and below the bound
    warned: Tensor  # [K] bool
    bounds: Tensor  # [K]; NaN for the primary objective, whose violation then is NaN as well

    def __init__(
        self,
        objectives: Sequence[str],
        *,
        primary: str | None = None,
        bounds: Mapping[str, float] | float = 0.5,
        units: Units = "win_rate",
        variant: Variant = "lagrangian",
        integral: float = 0.2,
        proportional: float = 20.0,
        maximum: float = 10.0,
        decay: float = 0.9,
        sigma: float = 0.01,
        patience: int = 10,
    ) -> None:
        super().__init__(objectives)
        for name, choice, known in (
            ("units", units, get_args(Units)),
            ("variant", variant, get_args(Variant)),
        ):
            if choice not in known:
                raise ValueError(f"Parameter `{name}` should be one of {known}. Found {choice!r}.")
        for name, value, good, wanted in (
            ("integral", integral, 0 <= integral < math.inf, "finite and not negative"),
            ("proportional", proportional, 0 <= proportional < math.inf, "finite and not negative"),
            ("maximum", maximum, 0 < maximum < math.inf, "finite and positive"),
            ("decay", decay, 0 <= decay < 1, "in [0, 1)"),
            ("sigma", sigma, 0 < sigma < math.inf, "finite and positive"),
            ("patience", patience, patience >= 1, "at least 1"),
        ):
            if not good:
                raise ValueError(f"Parameter `{name}` should be {wanted}. Found {value}.")
        self.primary = self.objectives[0] if primary is None else primary
        if self.primary not in self.objectives:
            raise ValueError(
                f"Parameter `primary` should be one of {self.objectives}. "
                f"Found {primary!r}.{did_you_mean(self.primary, self.objectives)}"
            )
        self.units, self.variant, self.patience = units, variant, patience
        self.integral, self.proportional = integral, proportional
        self.maximum, self.decay, self.sigma = maximum, decay, sigma

        # Not persistent: a resumed run keeps to the bounds of its own configuration.
        secondary = tuple(name for name in self.objectives if name != self.primary)
        chosen = checked_bounds(bounds, self.primary, secondary, units)
        values = [chosen.get(name, math.nan) for name in self.objectives]
        self.register_buffer("bounds", torch.tensor(values, dtype=torch.float64), persistent=False)
        zeros = torch.zeros(len(self.objectives)).double()
        self.running_level = RunningLevel(len(self.objectives), warmup=WARMUP, memory=MEMORY)
        self.register_buffer("level", torch.full_like(zeros, torch.nan))
        unknown = 1.0 if units == "win_rate" else torch.nan
        self.register_buffer("unit", torch.full_like(zeros, unknown))
        self.register_buffer("integrated", zeros.clone())
        self.register_buffer("multipliers", zeros.clone())
        self.register_buffer("capped", zeros.long())
        self.register_buffer("warned", zeros.bool())

    def forward(self, stats: ObjectiveStats) -> Tensor:
        """Return 1 for the primary objective and the others' multipliers, normalized: ``[K]``."""
        measured = self._measure(stats)  # [K]
        self.level = update_ema(self.level, measured, self.decay)
        level, b = self.level / self.unit, self.bounds / self.unit  # [K]
        known = ~(level + b + measured).isnan()

        if self.variant == "lagrangian":
            integrated = dual_step(self.integrated, level, b, self.integral, self.maximum)
            multipliers = dual_step(integrated, level, b, self.proportional, self.maximum)
            self.integrated = torch.where(known, integrated, self.integrated)
        else:
            multipliers = barrier(level, b, self.sigma, self.maximum)
        self.multipliers = torch.where(known, multipliers, self.multipliers)
        self._watch(known, level < b)
        weights = self.multipliers.clone()  # [K]
        weights[self.objectives.index(self.primary)] = 1.0
        return weights * self.kl_scale()

    def kl_scale(self) -> float:
        """Return ``1 / (1 + sum lambda)``, by which the weights were divided as well."""
        return 1 / (1 + float(self.multipliers.sum()))

    def report(self) -> dict[str, float]:
        """Return multiplier, violation and level of each bound that was measured."""
        metrics = {}
        for k, name in enumerate(self.objectives):
            if name != self.primary and not self.level[k].isnan():
                metrics[f"mopo_lambda/{name}"] = float(self.multipliers[k])
                metrics[f"mopo_violation/{name}"] = float(self.bounds[k] - self.level[k])
                metrics[f"mopo_level/{name}"] = float(self.level[k])
        return metrics

    def headline(self) -> str:
        """Return the worst violation, or that every bound is kept."""
        violation = self.bounds - self.level  # [K], in the bounds' units
        known = (violation / self.unit).nan_to_num(nan=-math.inf)
        worst = int(known.argmax())
        if known[worst] > 0:
            return f"{self.objectives[worst]} {float(violation[worst]):.3g} below its bound"
        return "bounds kept" if known[worst] > -math.inf else ""

    def get_extra_state(self) -> dict[str, str]:
        """Return what the saved levels are about."""
        return {"primary": self.primary, "units": self.units}

    def set_extra_state(self, state: dict[str, str]) -> None:
        """Refuse levels of another primary objective or in other units."""
        for name, mine in self.get_extra_state().items():
            if state[name] != mine:
                raise ValueError(
                    f"Parameter `{name}` should be {state[name]!r} as before. Found {mine!r}."
                )

    def _measure(self, stats: ObjectiveStats) -> Tensor:
        """Return the mean of what the bounds are on: ``[K]``, NaN if nothing applies."""
        if self.units == "reward":
            spread = rms_group_std(stats.rewards)
            self.unit = torch.where(self.unit.isnan() & (spread > 0), 4 * spread, self.unit)
            level = self.running_level(stats.rewards)
            return torch.where(stats.rewards.values.isnan().all(1), torch.nan, level)
        if stats.win_rates is None:
            raise RuntimeError(
                "Mopo's bounds are on win rates, and this rollout has none: use the normalizer "
                "WinRate, or `units='reward'` with bounds in each reward's own unit."
            )
        return stats.win_rates.nanmean(1)

    def _watch(self, known: Tensor, violated: Tensor) -> None:
        """Warn once of a bound that the largest multiplier does not reach."""
        stuck = violated & (self.multipliers >= self.maximum)
        self.capped = torch.where(known, (self.capped + 1) * stuck, self.capped)
        fresh = (self.capped >= self.patience) & ~self.warned
        for k in fresh.nonzero().flatten().tolist():
            logger.warning(
                "Bound %g on `%s` may be out of reach: the level is %.4g after %d rollouts with "
                "the largest multiplier.",
                float(self.bounds[k]),
                self.objectives[k],
                float(self.level[k]),
                self.patience,
            )
        self.warned = self.warned | fresh


def checked_bounds(
    bounds: Mapping[str, float] | float, primary: str, secondary: Sequence[str], units: str
) -> dict[str, float]:
    """Return one finite bound for each secondary objective; in [0, 1] if they are win rates.

    Args:
        bounds: The bound of each secondary objective by name, or one for all of them.
        primary: The objective that is maximised, and has no bound.
        secondary: Names of the other objectives.
        units: ``win_rate``, or ``reward`` if bounds are in the rewards' own units.
    """
    if isinstance(bounds, Mapping):
        chosen = dict(bounds)
    elif units == "reward" and secondary:
        raise ValueError(
            "Parameter `bounds` should name each objective's bound where `units` is 'reward'. "
            f"Found {bounds}."
        )
    else:
        chosen = dict.fromkeys(secondary, bounds)
    for name, bound in chosen.items():
        if name == primary:
            raise ValueError(
                "Parameter `bounds` should leave out the primary objective. "
                f"Found {bound} for `{primary}`."
            )
        if name not in secondary:
            raise ValueError(
                f"Parameter `bounds` should be about {tuple(secondary)}. "
                f"Found {name!r}.{did_you_mean(name, secondary)}"
            )
        if not math.isfinite(bound) or (units == "win_rate" and not 0 <= bound <= 1):
            wanted = "in [0, 1]" if units == "win_rate" else "finite"
            raise ValueError(f"Parameter `bounds` should be {wanted}. Found {bound} for `{name}`.")
    if missing := [name for name in secondary if name not in chosen]:
        raise ValueError(
            "Parameter `bounds` should cover every objective but the primary. "
            f"Found none for `{missing[0]}`."
        )
    return chosen
