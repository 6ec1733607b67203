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
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moa_diffusion.data.preferences import Preferences
from moa_diffusion.data.seeds import generator
from moa_diffusion.distributed import Comm, agreed, gather_shards, shard
from moa_diffusion.monitoring.heldout import HeldOut
from moa_diffusion.monitoring.progress import Progress
from moa_diffusion.objectives.mopo import checked_bounds
from moa_diffusion.objectives.mopo_offline import OfflineMopo, OfflineSettings, effective_samples
from moa_diffusion.objectives.reachable import check_bounds
from moa_diffusion.policies.base import Policy
from moa_diffusion.training.gradient_sum import GradientSum
from moa_diffusion.training.stepper import Stepper, TrainingError
from moa_diffusion.types import ConfigError
from rewards.suggestions import did_you_mean


class TeachablePolicy(Policy, Protocol):
    """A policy that can say how likely a given response is."""

    def tokens_of(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """Return responses as token ids, without a forward pass; ValueError if one does not fit."""
        ...

    def log_probs_of(self, prompts: Sequence[str], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Return log-probabilities ``[n]`` of whole responses ``tokens``, with gradient."""
        ...


class Cloning:
    """Takes the optimizer steps of weighted behaviour cloning.

    All responses are kept as token ids on the CPU, four bytes a token.

    Args:
        policy: The policy that is taught.
        stepper: Takes one optimizer step on summed gradients.
        data: The preferences; the R rows are their responses, prompt by prompt.
        comm: The collectives over the processes.
        micro_batch: Rows per forward and backward pass.

    Raises:
        ValueError: If ``micro_batch`` is not positive.
    """

    def __init__(
        self,
        *,
        policy: TeachablePolicy,
        stepper: Stepper,
        data: Preferences,
        comm: Comm,
        micro_batch: int,
    ) -> None:
        if micro_batch < 1:
            raise ValueError(f"Parameter `micro_batch` should be at least 1. Found {micro_batch}.")
        self.policy, self.stepper, self.data = policy, stepper, data
        self.comm, self.micro_batch = comm, micro_batch
        self._places = data.rows().tolist()  # R pairs of prompt and position
        self._tokens: list[array[int]] = []  # R token ids, once `read` was called

    def read(self) -> None:
        """Tokenise all responses, once.

        Raises:
            TrainingError: On every process alike, for a response that the policy cannot take.
        """
        if self._tokens:
            return
        texts = [self.data.responses[prompt][position] for prompt, position in self._places]
        try:
            tokens = self.policy.tokens_of(texts)
        except ValueError as error:
            raise TrainingError(f"A response cannot be learned: {error}") from error
        self._tokens = [array("i", ids) for ids in tokens]

    def __call__(self, rows: Sequence[int], row_weights: Tensor) -> dict[str, float]:
        """Take one optimizer step on ``-mean(weight log pi(y|x))``; return its metrics.

        Args:
            rows: Indices of the B rows, of all processes together.
            row_weights: Weight of each row, ``[B]``, constant.
        """
        self.read()
        device, scaler = self.stepper.device, self.stepper.scaler
        parts = [torch.zeros(2, device=device)]  # weighted and plain log-probs, by micro-batch
        gradients = GradientSum(self.stepper.parameters)
        for part in self._batches(len(rows)):
            log_pi = self._log_pi([rows[i] for i in part])  # [m]
            weighted = (row_weights[part].to(log_pi.dtype).to(device) * log_pi).sum()
            torch.autograd.backward(scaler.scale(-weighted / len(rows)))
            gradients.take()
            parts.append(torch.stack([weighted, log_pi.sum()]).detach().float())
        sums = torch.stack(parts).cpu().double().sum(0)
        self.comm.sum_([sums])
        gradients.write(self.comm)
        norm = self.stepper.optimizer_step()
        return {
            "offline/loss": float(-sums[0]) / len(rows),
            "offline/log_prob": float(sums[1]) / len(rows),
            "offline/tokens": sum(len(self._tokens[row]) for row in rows) / len(rows),
            **self.stepper.step_metrics([norm]),
        }

    @torch.no_grad()
    def log_probs(self, rows: Sequence[int], before_batch: Callable[[], None]) -> Tensor:
        """Return ``log pi(y|x)`` of some rows as the policy is: ``[rows]`` float64, on all ranks.

        ``before_batch`` is called on all processes before each batch.
        """
        self.read()
        batches, parts = self._batches(len(rows)), [torch.zeros(0)]
        most = math.ceil(math.ceil(len(rows) / self.micro_batch) / self.comm.world_size)
        for number in range(most):
            before_batch()
            own = batches[number : number + 1]  # none, if other processes have more
            parts += [self._log_pi([rows[i] for i in part]).float().cpu() for part in own]
        shards = shard(len(rows), self.micro_batch, self.comm)
        return gather_shards(torch.cat(parts).double(), shards, self.comm)

    def table(self, values: Tensor) -> Tensor:
        """Put the numbers of the rows ``[R]`` into their places ``[P, Y]``, with 0 for padding."""
        table = torch.zeros(self.data.log_data.shape, dtype=torch.float64)
        prompt, position = torch.tensor(self._places).T
        table[prompt, position] = values
        return table

    def _batches(self, total: int) -> list[list[int]]:
        """Return this process's share of ``total`` items, in micro-batches."""
        own = shard(total, self.micro_batch, self.comm)[self.comm.rank]
        size = self.micro_batch
        return [own[start : start + size] for start in range(0, len(own), size)]

    def _log_pi(self, rows: Sequence[int]) -> Tensor:
        """Return log-probabilities of the responses at these rows, ``[m]``."""
        prompts = [self.data.prompts[self._places[row][0]] for row in rows]
        return self.policy.log_probs_of(prompts, [self._tokens[row] for row in rows])


class OfflineTrainer:
    """Improves one objective under bounds on the others, from preferences: a ``Learner``.

    Log-probs of responses are computed only where they are needed. A reference needs those of the
    prompts whose responses are trained on while it holds: the order of the rows is known ahead, so
    they are computed while the policy is what will be the next reference. Levels are over these
    prompts then. So a new reference costs, for each row that is trained on in ``settings.lag``
    steps, a forward pass of its prompt's Y responses (and the first time one of each for ``mu``),
    at most all R; while the reference is the data's, nothing. An evaluation costs a pass over the
    responses of ``level_prompts`` prompts, the same ones each time. An alarm that raises the KL's
    weight raises ``tau``.

    The first reference is the policy as it starts, which without ``log_probs`` in the data is taken
    for the one that wrote them: the base model, or with ``policy.adapter`` the model with that
    LoRA. Log-probs of the base model can be computed at any time; a start from an adapter is gone
    once it has been trained, so those of all R responses are computed before.

    Args:
        cloning: Takes the optimizer steps.
        mopo: The target distribution over the responses, and its multipliers: ``constrained``.
        progress: How far the run is; a round is an optimizer step.
        seed: Decides the order of the rows.
        batch: Rows per optimizer step, over all processes.
        level_prompts: The number of prompts over whose responses evaluations take the win rates; 0
            for all.
        from_adapter: Whether the policy starts from trained weights instead of the base model.

    Raises:
        ValueError: If ``batch`` or ``level_prompts`` is too small.
    """

    title = "steps"

    def __init__(
        self,
        *,
        cloning: Cloning,
        mopo: OfflineMopo,
        progress: Progress,
        seed: int,
        batch: int,
        level_prompts: int = 512,
        from_adapter: bool = False,
    ) -> None:
        for name, value, least in (("batch", batch, 1), ("level_prompts", level_prompts, 0)):
            if value < least:
                raise ValueError(f"Parameter `{name}` should be at least {least}. Found {value}.")
        self.cloning, self.mopo, self.data = cloning, mopo, cloning.data
        self.policy, self.stepper = cloning.policy, cloning.stepper
        self.objectives = (mopo.primary, *mopo.secondary)
        self.progress, self.seed, self.batch = progress, seed, batch
        self.from_adapter = from_adapter
        # [R], of the policy that wrote the responses; NaN where it has not been asked for yet.
        self._log_mu: Tensor | None = None
        self._where = self.data.rows().T  # [2, R]
        shuffled = torch.randperm(len(self.data.prompts), generator=generator(seed, "levels"))
        self._level_prompts = shuffled[: level_prompts or None]

    def step(self, *, kl_scale: float = 1.0) -> dict[str, float]:
        """Take one dual step and one optimizer step; return the step's metrics.

        Args:
            kl_scale: A factor of ``tau``.
        """
        self.refer()
        target = self.mopo(kl_scale)  # [P, Y], NaN where the reference is not known
        rows = self.rows()
        where = self._where
        row_weights = target[where[0], where[1]] * where.shape[1] / len(target)  # [R]
        if row_weights[rows].isnan().any():
            raise TrainingError(
                "The reference was not asked for all rows of this step: `preferences.batch` and "
                "`objectives.weighting.lag` should be those of the run that saved the checkpoint."
            )
        with self.progress.timed("update"):
            update = self.cloning(rows, row_weights[rows])
        known = target[~target.isnan().any(1)]
        samples = {"offline/effective_sample_size": effective_samples(known)}
        return self.mopo.report() | samples | update

    def rows(self, steps: range | None = None) -> list[int]:
        """Return the rows of these steps, by default of this one; equal everywhere.

        They are part of one shuffled epoch, or of several.
        """
        now = self.progress.completed
        chosen = range(now, now + 1) if steps is None else steps
        total, first = self._where.shape[1], chosen.start * self.batch
        rows: list[int] = []
        while (left := len(chosen) * self.batch - len(rows)) > 0:
            epoch, position = divmod(first + len(rows), total)
            order = torch.randperm(total, generator=generator(self.seed, "rows", epoch))
            rows += order[position : position + left].tolist()
        return rows

    def refer(self) -> None:
        """Take the next reference if it is time. Cut short, it changes nothing."""
        lag, now = self.mopo.settings.lag, self.progress.completed
        if self._log_mu is None:
            everything = torch.arange(self._where.shape[1])
            if self.data.log_probs is None:  # the reference is what wrote them
                if self.from_adapter:
                    self._log_mu = self._log_probs(everything)
                else:  # the base model, when it is needed
                    self._log_mu = torch.full(everything.shape, math.nan, dtype=torch.float64)
                return
            wrote = self.data.log_probs[self._where[0], self._where[1]]
            # The policy as it starts is the reference of the first `lag` steps and of the next.
            rows = self._rows_of(self._prompts_of(range(2 * lag))) if lag else everything
            self.mopo.begin(self._ratio(rows, self._log_probs(rows) - wrote[rows]))
            try:
                check_bounds(self.mopo)
            except ValueError as error:
                raise ConfigError(f"objectives.weighting: {error}") from error
            self._log_mu = wrote
        elif lag and now and now % lag == 0:
            # From here on it is the reference of a `lag` ago; this policy is the one after it.
            self.mopo.refer(self._log_ratio(self._prompts_of(range(now + lag, now + 2 * lag))))

    def evaluate(self) -> dict[str, float]:
        """Return win rates of the averaged weights over the responses: ``eval_level/<name>``."""
        with self.stepper.ema.applied():
            levels = self.mopo.levels_of(self._log_ratio(self._level_prompts))
        return {f"eval_level/{name}": level for name, level in levels.items()}

    # ------------------------------------------------------------------ what the run asks for

    def prepare(self, heldout: HeldOut | None) -> Mapping[str, Any]:
        """Tokenise all responses and load the heads: what does not fit is known at the start."""
        prompts = [request.prompt for request in heldout.requests] if heldout else []
        with agreed(self.progress.comm):
            self.policy.prepare([*self.data.prompts, *prompts])
            self.cloning.read()
        heads: Mapping[str, Any] = {}
        if heldout:
            heads = heldout.scorer.load(prompts)
            heldout.try_rewards()
        if self._log_mu is None:
            self.refer()
        return heads

    def snapshot(self) -> tuple[dict[str, Any], int]:
        """Return MOPO's state, and the number of optimizer steps that it belongs to."""
        # No copies: a step puts new tensors in the place of these.
        return self.mopo.state_dict(), self.stepper.updates

    def undo(self, snapshot: tuple[dict[str, Any], int]) -> bool:
        """Go back to the snapshot unless the policy has taken an optimizer step since then."""
        before, updates = snapshot
        if self.stepper.updates != updates:  # the policy has learned what the state does not count
            return False
        self.mopo.load_state_dict(before)
        return True

    def headline(self, metrics: Mapping[str, float]) -> str:
        """Return level and multiplier of every bound in a few words."""
        return self.mopo.headline()

    def facts(self) -> dict[str, Any]:
        """Return the method's class and the digest of the preferences."""
        return {"method": [type(self.mopo).__name__], "preferences": self.data.digest()}

    def state_dict(self) -> dict[str, Any]:
        """Return optimizer, multipliers, and log-probs under the reference."""
        return {
            "updater": self.stepper.state_dict(),
            "mopo": self.mopo.state_dict(),
            "log_mu": self._log_mu,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state, reference included."""
        self.stepper.load_state_dict(state["updater"])
        self.mopo.load_state_dict(state["mopo"])
        self._log_mu = state["log_mu"]

    def finish(self) -> None:
        """Do nothing: each step said what there was to say."""

    def close(self) -> None:
        """Do nothing: the heads are the evaluation's."""

    def _prompts_of(self, steps: range) -> Tensor:
        """Return the prompts whose responses are trained on in these steps."""
        return self._where[0][self.rows(steps)].unique()

    def _rows_of(self, prompts: Tensor) -> Tensor:
        """Return all rows of these prompts, in order."""
        return torch.isin(self._where[0], prompts).nonzero()[:, 0]

    def _log_ratio(self, prompts: Tensor) -> Tensor:
        """Return ``log pi - log mu`` of these prompts' responses, ``[P, Y]``, NaN of the others."""
        assert self._log_mu is not None
        rows = self._rows_of(prompts)
        if len(new := rows[self._log_mu[rows].isnan()]):
            with self.policy.reference():
                self._log_mu[new] = self._log_probs(new)
        return self._ratio(rows, self._log_probs(rows) - self._log_mu[rows])

    def _ratio(self, rows: Tensor, values: Tensor) -> Tensor:
        """Return these rows' numbers in their places ``[P, Y]``, NaN of all others."""
        by_row = torch.full((self._where.shape[1],), math.nan, dtype=torch.float64)
        by_row[rows] = values
        return self.cloning.table(by_row)

    def _log_probs(self, rows: Tensor) -> Tensor:
        with self.progress.timed("survey"):
            return self.cloning.log_probs(rows.tolist(), self.progress.leave_if_stopped)


def constrained(
    data: Preferences, primary: str, bounds: Mapping[str, float] | float, settings: OfflineSettings
) -> OfflineMopo:
    """Return MOPO's state for these preferences.

    Args:
        data: The responses with their win rates.
        primary: The objective that is maximised.
        bounds: The bound of each other objective by name, or one for all of them.
        settings: What ``objectives.weighting`` sets beside the primary objective and the bounds.

    Raises:
        ValueError: For a primary objective or a bound that the preferences do not have, or for
            bounds that no multipliers reach.
    """
    if primary not in data.objectives:
        hint = did_you_mean(primary, data.objectives)
        expectation = f"Parameter `primary` should be one of {data.objectives}."
        raise ValueError(f"{expectation} Found {primary!r}.{hint}")
    secondary = [name for name in data.objectives if name != primary]
    chosen = checked_bounds(bounds, primary, secondary, "win_rate")
    index = [data.objectives.index(name) for name in secondary]
    mopo = OfflineMopo(
        primary=primary,
        secondary=secondary,
        pbar=data.win_rates[data.objectives.index(primary)],
        qbar=data.win_rates[index],
        log_data=data.log_data,
        bounds=[chosen[name] for name in secondary],
        settings=settings,
    )
    # With `log_probs`, the reference is not known before the model has been asked.
    check_bounds(mopo, reference_known=data.log_probs is None)
    return mopo
