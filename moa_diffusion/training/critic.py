"""Value heads: one advantage per decision instead of one per sample, for PPO.

A head per objective estimates, before each decision, what the sample's reward will be; generalised
advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16) tells which decisions were
better than expected::

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t),   A_t = sum_l (gamma lambda)^l delta_{t+l}

The reward comes with the last decision, ``V`` after it is 0. PAMA (arXiv 2508.07768) whitens these
estimates per objective over the batch, keeps what is positive ("Noon") and weighs each decision by
the objective that it serves least: with all decisions as one group, that is what the normalizers
and weightings do to samples, so they are given decisions in the samples' place.

Deviations: the heads read the policy's last hidden state as it was when the sample was drawn, and
give no gradient to the policy, so that no weight between value and policy loss is needed. Rewards
hold no KL: PAMA, as PPO in TRL, takes the KL of each token off its reward before advantages are
estimated; here it is a loss of its own (``loss.kl_weight``), which value heads and Noon do not see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moa_diffusion.config.schema import CriticConfig
from moa_diffusion.data.seeds import derive_seed
from moa_diffusion.distributed import Comm
from moa_diffusion.processes.devices import widest
from moa_diffusion.training.gradient_sum import GradientSum
from moa_diffusion.types import RewardMatrix, Rollout

MOMENTUM = 0.95  # what the running scale of rewards keeps at each rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """What advantages are computed from: each sample's reward, or each decision's estimate.

    Without a critic a sample is credited with its reward, and its advantage is what an update
    takes: ``Credit(matrix=rewards)``. A critic assigns credit to the decisions of a sample.
    """

    matrix: RewardMatrix  # [K, D]; D is N, or the number of decisions of all samples
    # [N, T] int64: the column of each decision, -1 where there is no decision; None: D is N, and
    # the decisions of a sample share its advantage.
    columns: Tensor | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)  # what the critic reports

    def placed(self, advantage: Tensor) -> Tensor:
        """Bring advantages of the columns ``[D]`` into the form that an update takes.

        Returns:
            ``[N]`` as it is, or with a critic ``[N, T]``, 0 where there is no decision.
        """
        if self.columns is None:
            return advantage
        return torch.where(self.columns >= 0, advantage[self.columns.clamp(min=0)], 0.0)


class Critic:
    """K value heads on the policy's features, and the advantages that follow from them.

    The heads see rewards in units of their running deviation, so that one learning rate suits all;
    estimates are in the rewards' own units.

    Args:
        objectives: The names of the K objectives.
        settings: The section ``critic``.
        width: The size d of the features ``[n, T, d]`` in a rollout's trace.
        comm: The collectives over the processes.
        device: The heads' device.
        seed: Decides the heads' initial values.
        batch: Samples per pass of the heads, as they were drawn, so that any number of processes
            makes the same passes.
    """

    def __init__(
        self,
        objectives: Sequence[str],
        settings: CriticConfig,
        *,
        width: int,
        comm: Comm,
        device: torch.device,
        seed: int,
        batch: int,
    ) -> None:
        self.objectives, self.settings, self.batch = tuple(objectives), settings, batch
        self.comm, self.device = comm, device
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(seed, "critic") % 2**63)
            last = nn.Linear(settings.hidden, len(objectives))
            self.heads = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, settings.hidden), nn.Tanh(), last
            ).to(device)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        # PPO's usual epsilon: with Adam's own, gradients that are nothing but rounding move
        # parameters as far as any other.
        self.optimizer = torch.optim.Adam(self.heads.parameters(), lr=settings.lr, eps=1e-5)
        # [K] float64: running mean and variance of the rewards.
        self.mean = self.variance = torch.full((len(objectives),), torch.nan, dtype=torch.float64)

    def assign_credit(self, rollout: Rollout, rewards: RewardMatrix) -> Credit:
        """Estimate the advantages of all N samples' decisions, and fit the heads to this rollout.

        All is done on the device, which is waited for once, at the end.

        Args:
            rollout: The n samples of this process, with ``features`` in the trace.
            rewards: The raw rewards of all N samples.

        Returns:
            The estimates of the decisions (or samples) of all processes, as one group.
        """
        scaled, units = self._scaled(rewards)
        estimates, mask, loss = self._estimate(rollout, scaled)
        estimates = estimates * units[:, None, None]  # [K, N, T], in the rewards' own units
        samples = torch.arange(len(mask))[:, None].expand_as(mask)  # [N, T]
        if self.settings.granularity == "sample":
            values = torch.where(mask, estimates, 0.0).sum(2) / mask.sum(1)  # [K, N]
            columns, owners = samples, samples[:, 0]
        else:
            values = estimates[:, mask]  # [K, D]
            columns = (mask.flatten().cumsum(0) - 1).view_as(mask)  # [N, T]
            owners = samples[mask]  # [D]
        matrix = RewardMatrix(
            names=rewards.names,
            values=values,
            groups=torch.zeros(values.shape[1], dtype=torch.int64),
            prompts=tuple(rewards.prompts[i] for i in owners.tolist()),
        )
        return Credit(
            matrix=matrix,
            columns=torch.where(mask, columns, -1),
            metrics={"policy/value_loss": loss / len(self.objectives)},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return heads, optimizer and the scale of the rewards, equal on every process."""
        return {
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mean": self.mean,
            "variance": self.variance,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state, except for the learning rate, which is this run's."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # this run's, not the checkpoint's
        self.mean, self.variance = state["mean"], state["variance"]

    def _scaled(self, rewards: RewardMatrix) -> tuple[Tensor, Tensor]:
        """Return rewards over their running deviation ``[K, N]``, NaN stays; and that ``[K]``."""
        values = rewards.values
        mean = values.nanmean(1)
        variance = (values - mean[:, None]).square().nanmean(1)
        known, now = self.mean.isfinite(), mean.isfinite()
        blend = torch.where(known & now, MOMENTUM, torch.where(known, 1.0, 0.0))
        self.mean = _blend(self.mean, mean, blend)
        self.variance = _blend(self.variance, variance, blend)
        deviation = self.variance.sqrt()
        units = torch.where(deviation > 0, deviation, 1.0)  # NaN > 0 is false as well
        return (values - self.mean.nan_to_num()[:, None]) / units[:, None], units

    def _estimate(self, rollout: Rollout, scaled: Tensor) -> tuple[Tensor, Tensor, float]:
        """Estimate the decisions of this process's samples, fit the heads, and gather.

        Args:
            rollout: The n samples of this process.
            scaled: The rewards of all samples over their running deviation, ``[K, N]``.

        Returns:
            Estimates ``[K, N, T]`` of all processes in units of that deviation, float64; which
            decisions there are, ``[N, T]`` bool; and the heads' loss before they were fitted.
        """
        n, first = len(rollout), self.comm.rank * len(rollout)
        features = rollout.trace["features"].to(self.device, torch.float32)
        mask = rollout.mask.to(self.device)
        dtype = widest(self.device)
        with torch.no_grad():
            parts = [self.heads(part) for part in features.split(self.batch)]
            values = torch.cat(parts).to(dtype).permute(2, 0, 1)  # [K, n, T]
        rewards = scaled[:, first : first + n].to(self.device, dtype)  # [K, n]
        gamma, lam = self.settings.gamma, self.settings.lam
        estimates = gae(values, rewards, mask, gamma=gamma, lam=lam)  # [K, n, T]
        loss = self._fit(features, values + estimates, mask)

        gathered = self.comm.gather(estimates.transpose(0, 1).contiguous())  # [N, K, T]
        masks = self.comm.gather(mask)  # [N, T]
        numbers = torch.cat([part.flatten().to(dtype) for part in (loss, masks, gathered)])
        numbers = numbers.cpu().double()  # waits for the device
        return (
            numbers[1 + masks.numel() :].view(gathered.shape).transpose(0, 1),
            numbers[1 : 1 + masks.numel()].view(masks.shape) > 0,
            float(numbers[0]),
        )

    def _fit(self, features: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        """Regress the heads on the returns ``[K, n, T]``, all processes' decisions alike.

        Returns:
            The loss before the first step ``[1]``, a sum over the objectives, on the device.
        """
        known = mask & ~returns.isnan()  # [K, n, T]
        targets = torch.where(known, returns, 0.0).permute(1, 2, 0).float()  # [n, T, K]
        weight = known.permute(1, 2, 0).float()  # [n, T, K]
        count = weight.sum((0, 1))  # [K]
        self.comm.sum_([count])
        gradients = GradientSum(list(self.heads.parameters()))
        parts = [tensor.split(self.batch) for tensor in (features, targets, weight)]
        first = torch.zeros(1, dtype=widest(self.device), device=self.device)
        for epoch in range(self.settings.epochs):
            self.optimizer.zero_grad()
            for feature, target, share in zip(*parts, strict=True):
                errors = share * (self.heads(feature) - target).square()
                loss = (errors.sum((0, 1)) / count.clamp(min=1)).sum()
                torch.autograd.backward(loss)
                gradients.take()
                if epoch == 0:
                    first += loss.detach()
            gradients.write(self.comm)
            self.optimizer.step()
        self.comm.sum_([first])
        return first


def gae(values: Tensor, rewards: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Return the generalised advantage estimates of K objectives: ``[K, n, T]``.

    Args:
        values: Values ``[K, n, T]``, before each decision.
        rewards: Rewards ``[K, n]``, which come with the last decision; NaN where one does not
            apply.
        mask: Which decisions there are, ``[n, T]`` bool, true up to the last one.
        gamma: Discount per decision.
        lam: 1 is the return minus the value, 0 one step of it.

    Returns:
        0 where there is no decision, NaN where the objective does not apply.
    """
    estimates = torch.zeros_like(values)
    later, value_later = torch.zeros_like(rewards), torch.zeros_like(rewards)  # [K, n]
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))  # [n, T]
    for t in reversed(range(values.shape[2])):
        reward = torch.where(last[:, t], rewards, 0.0)
        delta = reward + gamma * value_later - values[:, :, t]
        now = delta + gamma * lam * later
        later = torch.where(mask[:, t], now, 0.0)
        value_later = torch.where(mask[:, t], values[:, :, t], 0.0)
        estimates[:, :, t] = later
    return estimates


def _blend(old: Tensor, new: Tensor, share: Tensor) -> Tensor:
    """Blend ``share`` of the old and the rest of the new, where NaN counts as nothing."""
    mixed = share * old.nan_to_num() + (1 - share) * new.nan_to_num()
    return torch.where(old.isnan() & new.isnan(), torch.nan, mixed)
