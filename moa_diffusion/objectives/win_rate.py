"""Win rates against a frozen pool, the scores of MOPO (arXiv 2505.10892) for rewards with values.

Sample i of prompt x plays against M outputs ``ref_km`` of the reference model for the same prompt,
drawn once and never again::

    S_ki = mean_m sigmoid((r_ki - ref_km) / scale_kx),   scale_kx = std_m ref_km / 2
    z_ki = S_ki - mean_group S_k
    A_i  = (s_i - mean_group s) / (std_B s + eps),   s_i the weighted mean of z_ki

The weight of the KL is divided by ``std_B s + eps`` as well, so that it stays what it is beside the
mean win rate: ``loss.kl_weight`` is in win rates per unit of KL, whatever a batch's spread.

``S`` is between 0 and 1 whatever the reward's unit, and 1/2 means "no better than the reference".
It can be averaged over a batch and held to a bound, which the win rate inside a group cannot: that
averages 1/2 for every policy.

Deviations: all of this is ours; MOPO is offline and reads win rates off labelled pairs. The std is
one per batch, not per group or per set of objectives that apply, so that the mean that is improved
is the mean that the bound is on. Of a sample to which an objective does not apply, the others'
weights are scaled to the sum of 1, so that it counts more for them than the Lagrangian has it.
A pool without spread (less than a tenth of the usual) says nothing about the reward's unit; its
prompt takes the objective's mean std over the pools that have a spread, of the prompts known until
then and those told in the same call. It is frozen then, so later prompts change no score. Where no
pool has a spread, more than the reference is 1, less is 0, equal is 1/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moa_diffusion.objectives.base import Normalizer
from moa_diffusion.objectives.normalize import batch_spread, whiten
from moa_diffusion.statistics.groups import RESIDUE, group_centred
from moa_diffusion.types import RewardMatrix

# Relative to the objective's mean pool std: a pool with a smaller one has no unit of its own.
USUAL = 0.1


class WinRate(Normalizer):
    """Centred win rates against rewards of reference outputs, which ``remember`` keeps.

    Args:
        objectives: Names of the K objectives.
        pool_size: Number M of reference outputs per prompt, at least 2.
        eps: Number that is added to the batch's spread, in win rates; positive.
    """

    def __init__(
        self, objectives: Sequence[str], *, pool_size: int = 16, eps: float = 1e-4
    ) -> None:
        super().__init__(objectives)
        if pool_size < 2:
            raise ValueError(f"Parameter `pool_size` should be at least 2. Found {pool_size}.")
        if not eps > 0:
            raise ValueError(f"Parameter `eps` should be positive. Found {eps}.")
        self.reference_samples, self.eps = pool_size, eps
        self._divisor = 1.0  # what the last `combined` divided by
        self.rows: dict[str, int] = {}  # prompt to its row in pool and scale
        self.pool = torch.empty(0, len(self.objectives), pool_size).double()  # [P, K, M]
        self.scale = torch.empty(0, len(self.objectives)).double()  # [P, K]; 0: nothing has spread

    def unknown(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts without a pool, each once."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.rows]

    def remember(self, prompts: Sequence[str], rewards: Tensor) -> None:
        """Keep a pool ``[K, M]`` of each new prompt for good, and a unit for its win rates."""
        expected = (len(prompts), *self.pool.shape[1:])
        if rewards.shape != expected:
            raise ValueError(
                f"Parameter `rewards` should have shape [P, K, M] = {expected}. "
                f"Found {tuple(rewards.shape)}."
            )
        if rewards.isinf().any():
            raise ValueError("Parameter `rewards` should be finite or NaN. Found an infinity.")
        if len(self.unknown(prompts)) < len(prompts):
            known = [prompt for prompt in prompts if prompt in self.rows]
            raise ValueError(
                "Parameter `prompts` should be distinct and new, since pools are frozen. "
                f"Found {known[0] if known else 'a repetition'!r}."
            )
        self.rows |= {prompt: len(self.rows) + i for i, prompt in enumerate(prompts)}
        self.pool = torch.cat([self.pool, rewards.double()])  # [P, K, M]
        std = pool_std(self.pool)  # [P, K]
        usual = torch.where(std > 0, std, torch.nan).nanmean(0).nan_to_num(nan=0.0)  # [K]
        scale = torch.where(std < USUAL * usual, usual, std) / 2
        self.scale = torch.cat([self.scale, scale[len(self.scale) :]])

    def win_rates(self, rewards: RewardMatrix) -> Tensor:
        """Return each sample's win rate against its prompt's pool: ``[K, N]`` float64 in [0, 1].

        NaN where the objective does not apply to the sample, or to none of its pool.

        Raises:
            RuntimeError: For a prompt without a pool.
        """
        if unknown := self.unknown(rewards.prompts):
            raise RuntimeError(
                f"WinRate has no reference rewards of the prompt {unknown[0]!r} "
                f"({len(unknown)} such prompts). `remember` has to be told them first."
            )
        sample = torch.tensor([self.rows[p] for p in rewards.prompts], dtype=torch.int64)  # [N]
        objective = [self.objectives.index(name) for name in rewards.names]
        ref = self.pool[sample][:, objective].transpose(0, 1)  # [K, N, M]
        scale = self.scale[sample][:, objective].T[:, :, None]  # [K, N, 1]
        r = rewards.values[:, :, None]  # [K, N, 1]

        wins = torch.sigmoid((r - ref) / torch.where(scale == 0, 1.0, scale))  # [K, N, M]
        equal = (r - ref).abs() <= RESIDUE * torch.maximum(r.abs(), ref.abs())
        steps = torch.where(equal, 0.5, (r > ref).double())
        steps = torch.where((r - ref).isnan(), torch.nan, steps)
        return torch.where(scale == 0, steps, wins).nanmean(2)

    def per_objective(self, rewards: RewardMatrix) -> Tensor:
        """Return win rates less their group's mean; 0 where rewards have no spread."""
        centred, _ = group_centred(replace(rewards, values=self.win_rates(rewards)))
        _, std = group_centred(rewards)
        return torch.where(std > 0, centred, 0.0)

    def combined(self, advantage: Tensor, rewards: RewardMatrix) -> Tensor:
        """Whiten the weighted mean over the batch, and keep what it was divided by."""
        spread = float(batch_spread(advantage, rewards))
        self._divisor = spread + self.eps if spread > 0 else 1.0  # else there is only the KL
        return whiten(advantage, rewards, self.eps)

    def kl_scale(self) -> float:
        """Return one over what the last ``combined`` divided by."""
        return 1 / self._divisor

    def get_extra_state(self) -> dict[str, Any]:
        """Return the pools and units with their prompts."""
        return {"prompts": list(self.rows), "pool": self.pool, "scale": self.scale}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over pools of the same number of objectives and samples."""
        if state["pool"].shape[1:] != self.pool.shape[1:]:
            raise ValueError(
                f"Parameter `pool_size` should be that of the saved pool, {state['pool'].shape[2]}."
                f" Found {self.reference_samples}."
            )
        self.rows = {prompt: i for i, prompt in enumerate(state["prompts"])}
        self.pool, self.scale = state["pool"], state["scale"]


def pool_std(pool: Tensor) -> Tensor:
    """Return the population standard deviation over the last axis, ignoring NaN.

    It is exactly 0 where values differ by rounding alone.

    Args:
        pool: Rewards ``[..., M]`` of the reference's outputs.

    Returns:
        ``[...]``; NaN where nothing is known.
    """
    centred = pool - pool.nanmean(-1, keepdim=True)
    std = centred.square().nanmean(-1).sqrt()
    largest = pool.nan_to_num(nan=0.0).abs().amax(-1)
    return torch.where(std <= RESIDUE * largest, 0.0, std)
