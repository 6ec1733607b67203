"""Training on responses that are already there: MOPO, arXiv 2505.10892, by weighted cloning.

``objectives/mopo_offline.py`` says which distribution ``w(y|x)`` over the responses of each prompt
improves the primary objective under bounds on the others. The policy is taught it::

    loss = -1/P sum_x sum_y stopgrad(w(y|x)) log pi(y|x)
         = mean over rows (x, y) of  -stopgrad(w R / P) log pi(y|x)

A step takes some of the R rows, in shuffled epochs; the factor ``R / P`` makes every prompt count
the same however many responses it has. While the reference is the policy that wrote the responses,
and every prompt has equally many, ``w R / P`` is MOPO's ``rho``. ``log pi(y|x)`` is a sum over the
response's tokens, and the loss is divided by rows, not by tokens: a mean over tokens would count
a long response less than ``w`` says, and its minimum would be another policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moa_diffusion.alarm import Watch
from moa_diffusion.data import generator
from moa_diffusion.distributed import Comm, deal, gather_dealt
from moa_diffusion.ema import EMA
from moa_diffusion.gradient_sum import GradientSum
from moa_diffusion.heldout import HeldOut
from moa_diffusion.loop import Loop, Schedule
from moa_diffusion.metrics import RunLog
from moa_diffusion.objectives.mopo import checked_bounds
from moa_diffusion.objectives.mopo_offline import OfflineMopo, OfflineSettings, effective_samples
from moa_diffusion.policies.base import Policy
from moa_diffusion.preferences import Preferences
from moa_diffusion.stepper import Stepper, TrainingError
from moa_diffusion.types import Request, Rollout, concatenate


class TeachablePolicy(Policy, Protocol):
    """A policy that can say how likely a given response is."""

    def rollout_of(self, requests: Sequence[Request], texts: Sequence[str]) -> Rollout:
        """Given responses as if the policy had drawn them; ValueError if one does not fit."""
        ...


class Cloning(Stepper):
    """Takes the optimizer steps of weighted behaviour cloning.

    A response's tokens are kept once it was met, so memory grows with the data.

    Args:
        policy: is taught.
        data: the R rows are its responses, prompt by prompt.
        comm: collectives over the processes.
        optimizer: over ``policy.trainable()``.
        lr: learning rate after so many optimizer steps.
        scaler: loss scaler; disabled except in float16.
        ema: average of the trained parameters.
        micro_batch: rows per forward and backward pass.
        max_grad_norm: the gradient is clipped to this length.
        max_skipped: consecutive updates with non-finite gradients before giving up.
    """

    def __init__(
        self,
        *,
        policy: TeachablePolicy,
        data: Preferences,
        comm: Comm,
        optimizer: torch.optim.Optimizer,
        lr: Callable[[int], float],
        scaler: torch.amp.GradScaler,
        ema: EMA,
        micro_batch: int,
        max_grad_norm: float,
        max_skipped: int = 3,
    ) -> None:
        if micro_batch < 1:
            raise ValueError(f"Parameter `micro_batch` should be at least 1. Found {micro_batch}.")
        super().__init__(
            policy=policy,
            optimizer=optimizer,
            lr=lr,
            scaler=scaler,
            ema=ema,
            max_grad_norm=max_grad_norm,
            max_skipped=max_skipped,
        )
        self.teachable, self.data, self.comm, self.micro_batch = policy, data, comm, micro_batch
        self._places = data.rows().tolist()  # R pairs of prompt and position
        self._met: dict[int, Rollout] = {}  # by row, one sample each

    def __call__(self, rows: Sequence[int], weights: Tensor) -> dict[str, float]:
        """One optimizer step on ``-mean(weight log pi(y|x))``; returns metrics.

        Args:
            rows: B, of all processes together.
            weights: ``[B]``, constant.
        """
        sums = torch.zeros(3, dtype=torch.float64)  # weighted and plain log-probs, tokens
        gradients = GradientSum(self._parameters)
        self.scaler.scale(sums.new_zeros((), device=self._parameters[0].device))  # now it exists
        for part in self._batches(len(rows)):
            rollout = self._given([rows[i] for i in part])
            for steps in self.policy.step_chunks(rollout.log_probs.shape[1]):
                log_pi, tokens = self._log_pi(rollout, steps)  # [m]
                weighted = (weights[part].to(log_pi) * log_pi).sum()
                torch.autograd.backward(self.scaler.scale(-weighted / len(rows)))
                sums += torch.stack([weighted, log_pi.sum(), tokens]).detach().double().cpu()
            gradients.take()
        self.comm.sum_([sums])
        gradients.write(self.comm)
        norm = self.optimizer_step()
        return {
            "offline/loss": float(-sums[0]) / len(rows),
            "offline/log_prob": float(sums[1]) / len(rows),
            "offline/tokens": float(sums[2]) / len(rows),
            "policy/grad_norm": norm,
            "policy/skipped_updates": float(not math.isfinite(norm)),
            "policy/lr": self.optimizer.param_groups[0]["lr"],
        }

    @torch.no_grad()
    def log_probs(self, before_batch: Callable[[], None]) -> Tensor:
        """``log pi(y|x)`` of all rows as the policy is: ``[R]`` float64, on every process.

        ``before_batch`` is called on all processes before each batch.

        Raises:
            TrainingError: on all processes, for a response that the policy cannot take.
        """
        batches, found = self._batches(len(self._places)), []
        problem: ValueError | None = None
        most = math.ceil(math.ceil(len(self._places) / self.micro_batch) / self.comm.world_size)
        for number in range(most):
            before_batch()
            for part in batches[number : number + 1]:
                try:
                    rollout = self._given(part)
                except ValueError as error:
                    problem = error
                    continue
                chunks = self.policy.step_chunks(rollout.log_probs.shape[1])
                sums = [self._log_pi(rollout, steps)[0].double().cpu() for steps in chunks]
                found.append(torch.stack(sums).sum(0))
        if self.comm.any(problem is not None):
            which = str(problem or "another process says which.")
            raise TrainingError(f"A response cannot be learned: {which}") from problem
        dealt = deal(len(self._places), self.micro_batch, self.comm)
        return gather_dealt(torch.cat([*found, torch.zeros(0).double()]), dealt, self.comm)

    def table(self, values: Tensor) -> Tensor:
        """Numbers of the rows ``[R]`` in their places ``[P, Y]``, with 0 for padding."""
        table = torch.zeros(self.data.log_data.shape, dtype=torch.float64)
        prompt, position = torch.tensor(self._places).T
        table[prompt, position] = values
        return table

    def _batches(self, total: int) -> list[list[int]]:
        """This process's share of ``total`` items, in micro-batches."""
        mine = deal(total, self.micro_batch, self.comm)[self.comm.rank]
        size = self.micro_batch
        return [mine[start : start + size] for start in range(0, len(mine), size)]

    def _given(self, rows: Sequence[int]) -> Rollout:
        """The responses at these rows."""
        new = [row for row in dict.fromkeys(rows) if row not in self._met]
        if new:
            requests, texts = [], []
            for prompt, position in (self._places[row] for row in new):
                text, metadata = self.data.prompts[prompt], self.data.metadata[prompt]
                requests.append(Request(prompt=text, metadata=metadata))
                texts.append(self.data.responses[prompt][position])
            made = self.teachable.rollout_of(requests, texts)
            self._met |= {row: made.select(torch.tensor([i])) for i, row in enumerate(new)}
        return concatenate([self._met[row] for row in rows])

    def _log_pi(self, rollout: Rollout, steps: slice) -> tuple[Tensor, Tensor]:
        """Sums over the tokens in ``steps``: log-probabilities ``[m]``, and how many they are."""
        mask = rollout.mask[:, steps]
        new, _ = self.policy.log_probs(rollout, steps)
        return torch.where(mask, new, 0.0).sum(1), mask.sum()


class OfflineTrainer(Loop):
    """Improves one objective under bounds on the others, from preferences.

    A new reference costs a pass over all responses, as does an evaluation: ``settings.lag`` should
    be some epochs where that matters. An alarm that raises the KL's weight raises ``tau``.

    Args:
        cloning: takes the optimizer steps; its policy starts as its own reference.
        primary: the objective that is improved.
        bounds: least win rate of each other objective; one number for all, or one for each.
        settings: of MOPO.
        batch: rows per optimizer step, over all processes.
        schedule: how long, and what happens when; a round is an optimizer step.
        heldout: the evaluation by reward heads; None for none.
        watch: looks at the evaluations for a reward that is being gamed.
        log: metrics.
        folder: of the run.
        seed: of the order of the rows.
        progress: whether this process shows a progress bar.
    """

    title = "steps"

    def __init__(
        self,
        *,
        cloning: Cloning,
        primary: str,
        bounds: Mapping[str, float] | float,
        settings: OfflineSettings,
        batch: int,
        schedule: Schedule,
        heldout: HeldOut | None,
        watch: Watch,
        log: RunLog,
        folder: Path,
        seed: int,
        progress: bool = True,
    ) -> None:
        if batch < 1:
            raise ValueError(f"Parameter `batch` should be at least 1. Found {batch}.")
        self.mopo = constrained(cloning.data, primary, bounds, settings)
        super().__init__(
            policy=cloning.policy,
            stepper=cloning,
            objectives=(self.mopo.primary, *self.mopo.secondary),
            comm=cloning.comm,
            schedule=schedule,
            heldout=heldout,
            watch=watch,
            log=log,
            folder=folder,
            seed=seed,
            progress=progress,
        )
        self.cloning, self.data, self.batch = cloning, cloning.data, batch
        self._log_mu: Tensor | None = None  # [R], of the policy that wrote the responses
        self._where = self.data.rows().T  # [2, R]

    def step(self) -> dict[str, float]:
        """One dual step and one optimizer step; returns the step's metrics."""
        self.refer()
        target = self.mopo(self.watch.kl_scale)  # [P, Y]
        rows = self.rows()
        weights = target[self._where[0], self._where[1]] * self._where.shape[1] / len(target)  # [R]
        with self._timed("update"):
            update = self.cloning(rows, weights[rows])
        self.completed += 1
        samples = {"offline/effective_sample_size": effective_samples(target)}
        return self.mopo.report() | samples | update

    def rows(self) -> list[int]:
        """The rows of this step, a part of a shuffled epoch or of several; equal everywhere."""
        total = self._where.shape[1]
        found: list[int] = []
        while len(found) < self.batch:
            epoch, position = divmod(self.completed * self.batch + len(found), total)
            order = torch.randperm(total, generator=generator(self.seed, "rows", epoch))
            found += order[position : position + self.batch - len(found)].tolist()
        return found

    def refer(self) -> None:
        """Take the next reference if it is time. Cut short, it changes nothing."""
        lag = self.mopo.settings.lag
        if self._log_mu is None:
            with self.policy.reference():
                base = self._survey()
            if self.data.log_probs is None:
                self._log_mu = base
            else:
                self._log_mu = self.data.log_probs[self._where[0], self._where[1]]
                self.mopo.begin(self.cloning.table(base - self._log_mu))
        elif lag and self.completed and self.completed % lag == 0:
            self.mopo.refer(self.cloning.table(self._survey() - self._log_mu))

    def evaluate(self) -> dict[str, float]:
        """Win rates of the averaged weights over the responses, and held-out rewards."""
        assert self._log_mu is not None
        with self.cloning.ema.applied():
            levels = self.mopo.levels_of(self.cloning.table(self._survey() - self._log_mu))
        found = {f"eval_level/{name}": level for name, level in levels.items()}
        return found | super().evaluate()

    # ------------------------------------------------------------------ what the loop asks

    def prepare(self) -> None:
        """Load the heads, and read all responses once: what does not fit is known at the start."""
        if self.heldout:
            self.log.write_heads(self.completed, self.heldout.scorer.load())
        asked = self.heldout.requests if self.heldout else ()
        self.policy.prepare([*self.data.prompts, *(request.prompt for request in asked)])
        if self._log_mu is None:
            self.refer()

    def headline(self, metrics: Mapping[str, float]) -> str:
        return self.mopo.headline()

    def facts(self) -> dict[str, Any]:
        return {"method": [type(self.mopo).__name__], "preferences": self.data.digest()}

    def changing_state(self) -> dict[str, Any]:
        return {
            "updater": self.cloning.state_dict(),
            "mopo": self.mopo.state_dict(),
            "log_mu": self._log_mu,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.cloning.load_state_dict(state["updater"])
        self.mopo.load_state_dict(state["mopo"])
        self._log_mu = state["log_mu"]

    def _survey(self) -> Tensor:
        with self._timed("survey"):
            return self.cloning.log_probs(self._leave_if_stopped)


def constrained(
    data: Preferences, primary: str, bounds: Mapping[str, float] | float, settings: OfflineSettings
) -> OfflineMopo:
    """MOPO's state for these preferences.

    Raises:
        ValueError: for a primary objective or a bound that the preferences do not have.
    """
    if primary not in data.objectives:
        near = get_close_matches(primary, data.objectives, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        expectation = f"Parameter `primary` should be one of {data.objectives}."
        raise ValueError(f"{expectation} Found {primary!r}.{hint}")
    secondary = [name for name in data.objectives if name != primary]
    chosen = checked_bounds(bounds, primary, secondary, "win_rate")
    index = [data.objectives.index(name) for name in secondary]
    return OfflineMopo(
        primary=primary,
        secondary=secondary,
        pbar=data.win_rates[data.objectives.index(primary)],
        qbar=data.win_rates[index],
        log_data=data.log_data,
        bounds=[chosen[name] for name in secondary],
        settings=settings,
    )
