"""Alarms: training rewards go up while what nobody trains on goes down.

A reward that is optimised stops measuring what it was meant to measure (Gao et al. 2023, "Scaling
laws for reward model overoptimization", arXiv 2210.10760). Rewards that never give gradients say
when. Every evaluation draws the same prompts and seeds, so differences are paired: since a held-out
reward was at its best,

    fall = mean over images of (now - best),   rise_k = mean of (now - best) of objective k

each with a standard error over prompts. It counts as hacking while ``fall`` lies ``z`` errors below
0 and some ``rise_k`` as many above: with several objectives, the loudest may rise alone. The alarm
goes off when that has held for ``patience`` evaluations in a row.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moa_diffusion.config.schema import AlarmConfig
from moa_diffusion.monitoring.heldout import Evaluation
from moa_diffusion.statistics.groups import mean_and_error

logger = logging.getLogger(__name__)

VELOCITY = "velocity_norm"  # a statistic that only policies of images know
NORM_DRIFT = 0.05 / 3  # share of it that counts as one standard deviation


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One line of ``alarms.jsonl``."""

    step: int  # rollouts finished
    kind: str  # reward_hack, drift or rollout_gap
    name: str  # which held-out reward, statistic or objective set it off
    message: str
    action: str  # warn, stop, raise_kl or rollback
    to_step: int | None = None  # rollouts, of the checkpoint that a rollback goes to
    best_step: int | None = None  # rollouts, when the held-out reward was at its best
    fall: float | None = None  # how far the held-out reward fell since then, in its unit
    fall_error: float | None = None  # its standard error
    risen: str | None = None  # the objective that rose most since then
    rise: float | None = None  # by so many standard deviations of both evaluations' images

    def row(self) -> dict[str, Any]:
        """Return the alarm as a mapping for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Suspect:
    """A held-out reward against its best evaluation."""

    name: str
    count: int  # evaluations in a row that looked like hacking
    best_step: int
    fall: float
    error: float
    risen: str
    rise: float


class Watch:
    """Looks at one evaluation after the other, and remembers the best of each held-out reward.

    Args:
        objectives: Rewards that are trained on.
        heldout: Rewards that are not; they may be none.
        rules: When an alarm goes off, and what happens then: the section ``alarm``.
    """

    def __init__(
        self, objectives: Sequence[str], heldout: Sequence[str], rules: AlarmConfig | None = None
    ) -> None:
        self.objectives, self.heldout = tuple(objectives), tuple(heldout)
        self.rules = rules or AlarmConfig()
        self.kl_scale = 1.0  # factor of the KL's weight that alarms have brought about
        self._acted = 0  # alarms acted upon
        self._streak = dict.fromkeys(self.heldout, 0)  # evaluations in a row, towards an alarm
        self._count = dict.fromkeys(self.heldout, 0)  # the same, as of the last look
        self._best: dict[str, dict[str, Any]] = {}  # by held-out reward: step, values [K, M]
        self._base: dict[str, Any] = {}  # from the first evaluation: std [K], statistics
        self._holding: list[str] = []  # warnings that still hold: each is given once

    @property
    def over(self) -> bool:
        """Whether the run should end: after the first alarm, or one more than the limit."""
        limits = {"warn": math.inf, "stop": 0}
        return self._acted > limits.get(self.rules.action, self.rules.limit)

    @property
    def best_steps(self) -> set[int]:
        """Rollouts at which some held-out reward was at its best so far."""
        return {best["step"] for best in self._best.values()}

    def look(self, evaluation: Evaluation) -> list[Alarm]:
        """Compare an evaluation with those before; the alarms that it sets off.

        At most one of them is to be acted upon: the first that is more than a warning.
        """
        values = dict(zip(evaluation.names, evaluation.values, strict=True))  # [M] each
        if not self._base:
            self._base = {
                "std": {name: _spread(values[name]) for name in self.objectives},
                "statistics": {
                    name: (mean := float(row.mean()), _drift_unit(name, row, mean))
                    for name, row in evaluation.statistics.items()
                },
            }
            self._warn_of_silence(evaluation, values)
        suspects = [self._suspect(evaluation, name, values) for name in self.heldout]
        ripe = [one for one in suspects if one is not None and one.count >= self.rules.patience]
        # One is acted upon, the clearest; going back twice at once means nothing.
        ripe.sort(key=lambda one: one.fall / one.error if one.error > 0 else -math.inf)
        alarms = [self._alarm(evaluation, one, first=i == 0) for i, one in enumerate(ripe)]
        if any(alarm.action == "rollback" for alarm in alarms):
            # The weights are no longer those that were just evaluated, nor those before.
            self._streak = dict.fromkeys(self.heldout, 0)
        else:
            for name in self.heldout:
                self._remember(evaluation, name, values)
        return alarms + self._drifted(evaluation) + self._apart(evaluation)

    def forget(self, steps: Collection[int]) -> None:
        """Have evaluations after these rollouts count no longer as anybody's best."""
        self._best = {n: best for n, best in self._best.items() if best["step"] not in steps}

    def report(self) -> dict[str, float]:
        """Return ``alarm/<held-out reward>``: evaluations in a row that looked like hacking."""
        return {f"alarm/{name}": float(count) for name, count in self._count.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next evaluation is compared with."""
        return {
            "kl_scale": self.kl_scale,
            "acted": self._acted,
            "streak": dict(self._streak),
            "best": self._best,
            "base": self._base,
            "said": list(self._holding),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state; held-out rewards that it does not know start anew."""
        self.kl_scale, self._acted = state["kl_scale"], state["acted"]
        self._best, self._base = state["best"], state["base"]
        self._streak = {name: state["streak"].get(name, 0) for name in self.heldout}
        self._holding = list(state["said"])

    # ------------------------------------------------------------------ the rules

    def _suspect(
        self, evaluation: Evaluation, name: str, values: Mapping[str, Tensor]
    ) -> _Suspect | None:
        """Return how a held-out reward stands against its best evaluation; None if it has none."""
        best = self._best.get(name)
        if best is None:
            return None
        fall, error = _paired(values[name], best["values"][name], evaluation)
        risen, rise = self._rise(values, best["values"], evaluation)
        hacking = bool(risen) and fall < -self.rules.z * error
        self._count[name] = self._streak[name] + 1 if hacking else 0
        self._streak[name] = self._count[name] % self.rules.patience  # at the limit from 0 again
        return _Suspect(
            name=name,
            count=self._count[name],
            best_step=best["step"],
            fall=fall,
            error=error,
            risen=risen,
            rise=rise,
        )

    def _alarm(self, evaluation: Evaluation, one: _Suspect, *, first: bool) -> Alarm:
        action, to_step = self._act(one.best_step) if first else ("warn", None)
        done = {
            "warn": "",
            "stop": "",
            "raise_kl": f" The KL's weight is now {self.kl_scale:g} times that of the settings.",
            "rollback": f" The weights go back to those after {one.best_step} rollouts.",
        }[action]
        if first and self.over:
            done += " The run ends."
        return Alarm(
            step=evaluation.step,
            kind="reward_hack",
            name=one.name,
            message=f"Held-out reward {one.name} has fallen by {-one.fall:.3g} (standard error "
            f"{one.error:.2g}) since rollout {one.best_step}, while the training reward "
            f"{one.risen} rose by {one.rise:.2g} standard deviations.{done}",
            action=action,
            to_step=to_step,
            best_step=one.best_step,
            fall=one.fall,
            fall_error=one.error,
            risen=one.risen,
            rise=one.rise,
        )

    def _remember(self, evaluation: Evaluation, name: str, values: Mapping[str, Tensor]) -> None:
        """Take the evaluation for a held-out reward's best, if it is that."""
        if values[name].isnan().all():
            return
        best = self._best.get(name)
        change = (
            math.inf if best is None else _paired(values[name], best["values"][name], evaluation)[0]
        )
        if not change <= 0:  # also if the two have no image in common
            self._best[name] = {"step": evaluation.step, "values": values}

    def _warn_of_silence(self, evaluation: Evaluation, values: Mapping[str, Tensor]) -> None:
        for name in self.heldout:
            prompts = evaluation.prompts[~values[name].isnan()].unique()
            if len(prompts) < 2:
                logger.warning(
                    "Held-out reward %s applies to %d prompts; with less than 2 a fall has no "
                    "standard error, and its alarm cannot go off.",
                    name,
                    len(prompts),
                )

    def _act(self, best_step: int) -> tuple[str, int | None]:
        """Return what an alarm leads to, given the alarms before it."""
        action = self.rules.action
        if action == "warn":
            return action, None
        self._acted += 1
        if action == "raise_kl" and self._acted > self.rules.limit:
            return "stop", None
        if action != "stop":
            self.kl_scale *= self.rules.kl_factor
        return action, best_step if action == "rollback" else None

    def _rise(
        self, now: Mapping[str, Tensor], then: Mapping[str, Tensor], evaluation: Evaluation
    ) -> tuple[str, float]:
        """Return the objective that rose most, and by how many standard deviations; or none."""
        risen, most = "", 0.0
        for name in self.objectives:
            change, error = _paired(now[name], then[name], evaluation)
            if change > self.rules.z * error:  # false for an objective that does not apply
                rise = change / _spread(torch.cat([now[name], then[name]]))
                risen, most = max((risen, most), (name, rise), key=lambda pair: pair[1])
        return risen, most

    def _drifted(self, evaluation: Evaluation) -> list[Alarm]:
        alarms = []
        for name, (mean, unit) in self._base["statistics"].items():
            if name not in evaluation.statistics:  # of a checkpoint of another version
                continue
            row = evaluation.statistics[name]
            moved = (float(row.mean()) - mean) / unit if unit > 0 else 0.0
            far = f"{moved:+.1f} standard deviations"
            if name == VELOCITY:
                far = f"{float(row.mean()) / mean - 1:+.1%}"
            if self._is_new(f"drift {name}", 0 < self.rules.drift < abs(moved)):
                alarms.append(
                    Alarm(
                        step=evaluation.step,
                        kind="drift",
                        name=name,
                        message=f"The mean {name} of the outputs is {float(row.mean()):.3g}, "
                        f"{far} from {mean:.3g} at the start.",
                        action="warn",
                    )
                )
        return alarms

    def _apart(self, evaluation: Evaluation) -> list[Alarm]:
        alarms = []
        for name, gap in evaluation.gaps.items():
            std = self._base["std"][name]
            apart = gap / std if std > 0 else 0.0
            if self._is_new(f"gap {name}", 0 < self.rules.gap < apart):
                alarms.append(
                    Alarm(
                        step=evaluation.step,
                        kind="rollout_gap",
                        name=name,
                        message=f"Rollouts score {gap:.3g} below deployed outputs of the same "
                        f"prompts and seeds in {name}, {apart:.1f} standard deviations: training "
                        "sees worse outputs than users will. Fewer noisy steps, a smaller "
                        "`sampling.noise_level`, more `sampling.steps` or the `sampling.sampler` "
                        "cps may help.",
                        action="warn",
                    )
                )
        return alarms

    def _is_new(self, what: str, holds: bool) -> bool:
        """Return whether this holds now and did not hold at the last look."""
        holding = what in self._holding
        if holds and not holding:
            self._holding.append(what)
        elif holding and not holds:
            self._holding.remove(what)
        return holds and not holding


def _drift_unit(name: str, row: Tensor, mean: float) -> float:
    """Return what a statistic's drift is counted in: its spread over outputs ``[M]``.

    The norm of velocities differs more between prompts than training may change it: it is counted
    so that the usual bound is 5 %, where NormGuard (arXiv 2606.27771) saw images become worse.
    """
    return abs(mean) * NORM_DRIFT if name == VELOCITY else _spread(row)


def _paired(now: Tensor, then: Tensor, evaluation: Evaluation) -> tuple[float, float]:
    """Return the mean difference of ``[M]`` and its standard error over prompts."""
    return mean_and_error(now - then, evaluation.prompts)


def _spread(values: Tensor) -> float:
    known = values[~values.isnan()]
    return float(known.std(correction=0)) if len(known) else math.nan


def check(rules: AlarmConfig, heldout: Sequence[str], *, kl_weight: float, prompts: int) -> None:
    """Check that these rules can be kept.

    Args:
        rules: The rules to check.
        heldout: Rewards that are not trained on.
        kl_weight: The KL weight of the loss.
        prompts: The number of held-out prompts.

    Raises:
        ValueError: Naming the rule.
    """
    if rules.action != "warn" and not heldout:
        raise ValueError(
            f"Parameter `action` should be warn without held-out rewards (`evaluation.rewards`), "
            f"which set the alarm off. Found {rules.action!r}."
        )
    if rules.action == "raise_kl" and kl_weight == 0:
        raise ValueError(
            "Parameter `action` should be another than raise_kl while `loss.kl_weight` is 0, of "
            "which there is no multiple. Found 'raise_kl'."
        )
    if heldout and prompts < 2:
        raise ValueError(
            "Held-out rewards should have at least 2 held-out prompts, or a fall has no standard "
            f"error. Found {prompts}."
        )
