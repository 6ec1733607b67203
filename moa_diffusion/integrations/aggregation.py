"""K rewards to one advantage outside of our trainer, where there is neither gradient nor reference.

The steps are those of ``Trainer.step`` between its scores and its update, but for the clip of
advantages. What is not carried is refused when the object is made: weights from gradients,
samples of the reference, a KL weight that moves, and advantages whose mean in a group is not 0,
which a trainer that takes that mean off would change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moa_diffusion.objectives.base import Normalizer, Weighting, combine
from moa_diffusion.objectives.metrics import reward_metrics
from moa_diffusion.objectives.noon import Noon
from moa_diffusion.objectives.normalize import PromptHistory
from moa_diffusion.statistics.groups import group_moments
from moa_diffusion.types import ObjectiveStats, RewardMatrix

UNCENTRED = (Noon, PromptHistory)  # by design, the mean of a group is not 0
ROUNDING = 1e-6  # relative to the largest advantage: a mean below it is 0


class Aggregation:
    """A normalizer and a weighting, with all that they remember.

    Args:
        normalizer: The normalizer of K objectives.
        weighting: The weighting of the same objectives, in the same order.

    Raises:
        ValueError: If they are of different objectives, or one of them is not carried.
    """

    def __init__(self, normalizer: Normalizer, weighting: Weighting) -> None:
        if normalizer.objectives != weighting.objectives:
            raise ValueError(
                f"Parameter `weighting` should have the normalizer's objectives "
                f"{normalizer.objectives}. Found {weighting.objectives}."
            )
        if isinstance(normalizer, UNCENTRED):
            raise _uncentred(normalizer)
        moves_kl = type(weighting).kl_scale is not Weighting.kl_scale
        for part, refused, does in (
            (normalizer, normalizer.reference_samples, "compares with samples of the reference"),
            (weighting, weighting.needs_gramian, "looks at the objectives' gradients"),
            (weighting, moves_kl, "moves the weight of the KL"),
        ):
            if refused:
                raise ValueError(
                    f"{type(part).__name__} {does}: it works in moa_diffusion's own trainer only."
                )
        self.normalizer, self.weighting = normalizer, weighting
        self.completed = 0  # rollouts
        self.metrics: dict[str, float] = {}  # those of the last rollout

    def __call__(self, prompts: Sequence[str], values: Tensor, group_size: int) -> Tensor:
        """Return the advantages ``[N]`` of one rollout, on every process.

        Their mean in a group is 0.

        Args:
            prompts: Prompts of the N samples.
            values: Raw rewards ``[K, N]`` float64, NaN where an objective does not apply.
            group_size: Number G of samples per prompt; each G neighbours are a group, and have one
                prompt.

        Raises:
            ValueError: If a group is not whole, or the mean of one is not 0.
        """
        from accelerate.utils import broadcast_object_list

        rewards = RewardMatrix(
            names=self.normalizer.objectives,
            values=values,
            groups=_neighbours(prompts, group_size),
            prompts=tuple(prompts),
        )
        advantages = self.normalizer.per_objective(rewards)  # [K, N]
        stats = ObjectiveStats(step=self.completed, rewards=rewards, advantages=advantages)
        # The first process's answer counts for all.
        weights: Tensor = broadcast_object_list([self.weighting(stats).clone()])[0]
        combined = combine(advantages, weights, ~torch.isnan(rewards.values))  # [N]
        advantage = self.normalizer.combined(combined, rewards)
        means, _, _ = group_moments(advantage[None], rewards.groups)
        if means.abs().max() > ROUNDING * advantage.abs().max():
            raise _uncentred(self.normalizer)
        self.metrics = reward_metrics(rewards, advantages, weights) | self.weighting.report()
        self.completed += 1
        return advantage

    def state(self) -> str:
        """Return all that a resumed run needs, as JSON.

        Numbers come back exactly and in their order.
        """
        return json.dumps(
            {
                "completed": self.completed,
                "parts": [type(part).__name__ for part in self._parts()],
                "objectives": self.normalizer.objectives,
                "states": [part.state_dict() for part in self._parts()],
            },
            default=Tensor.tolist,
        )

    def restore(self, state: str) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: If it is of other objectives, another method or other settings.
        """
        saved, mine = json.loads(state), json.loads(self.state())
        for name in ("parts", "objectives"):
            if saved[name] != mine[name]:
                raise ValueError(
                    f"The checkpoint should have the {name} {mine[name]}. Found {saved[name]}."
                )
        for part, values in zip(self._parts(), saved["states"], strict=True):
            try:
                part.load_state_dict(_as_tensors(values, part.state_dict()))
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    f"{type(part).__name__} has other settings than the checkpoint: {error}"
                ) from error
        self.completed = saved["completed"]

    def _parts(self) -> tuple[nn.Module, nn.Module]:
        return self.normalizer, self.weighting


def _neighbours(prompts: Sequence[str], group_size: int) -> Tensor:
    """Return the group of each of N samples: ``[N]`` int64."""
    for start in range(0, len(prompts), group_size):
        group = prompts[start : start + group_size]
        if len(group) < group_size or len(set(group)) > 1:
            raise ValueError(
                f"Each prompt should have {group_size} completions, side by side. Found "
                f"{len(group)} with {len(set(group))} prompts from number {start} on, the first "
                f"of which is {group[0]!r}."
            )
    return torch.arange(len(prompts)) // group_size


def _as_tensors(values: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Turn lists into tensors where ``like`` has a tensor; leave all other values as they are."""
    return {
        name: torch.tensor(value, dtype=like[name].dtype)
        if isinstance(like.get(name), Tensor)
        else value
        for name, value in values.items()
    }


def _uncentred(normalizer: Normalizer) -> ValueError:
    return ValueError(
        "Parameter `normalizer` should give advantages of mean 0 in every group, since that mean "
        f"is taken off. Found {type(normalizer).__name__}; Raw, GDPO and DualStage do."
    )
