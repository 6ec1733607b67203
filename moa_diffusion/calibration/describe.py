"""What rewards look like before training: scale, noise, saturation, conflict, and who would win.

Pure statistics of rewards that samples got before training. Within
and between prompts are the components of a one-way random-effects model ``r_gi = m + b_g + e_gi``
with unbiased estimates, so that they do not depend on the number of images per prompt. Training
normalises inside a group, so the spread *within* is what an objective has to say; the spread
*between* is how much prompts differ in difficulty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moa_diffusion.objectives.base import Normalizer, variance_share
from moa_diffusion.objectives.normalize import GDPO, DualStage, Raw
from moa_diffusion.statistics.groups import RESIDUE, group_centred, group_moments, spread_within
from moa_diffusion.storage.calibration_file import Calibration, ObjectiveCalibration
from moa_diffusion.types import RewardMatrix


def calibrate(
    rewards: RewardMatrix,
    *,
    retest: Tensor,
    weights: Sequence[float],
    milliseconds: Sequence[float],
    model: str,
    seed: int,
) -> Calibration:
    """Describe each objective, each pair, and what three recipes would make of them.

    The proposals need no knowledge of a reward's scale, and are our choice: APEX's base is the
    mean, its target the mean plus one standard deviation within groups; MOPO's bound is a win
    rate of 0.5, "no worse than the base model".

    Args:
        rewards: Raw rewards ``[K, N]`` of samples drawn before training.
        retest: Rewards ``[K, N]``, the same samples scored a second time.
        weights: K weights of the weighted sum of raw rewards.
        milliseconds: K durations of scoring one sample.
        model: Folder or hub id, with the adapter that training starts from, if there is one.
        seed: The seed of the samples.

    Raises:
        ValueError: If there is no sample, or a length or shape does not fit ``rewards``.
    """
    if not rewards.values.numel():
        raise ValueError("Parameter `rewards` should hold at least one sample. Found none.")
    if retest.shape != rewards.values.shape:
        raise ValueError(
            f"Parameter `retest` should have the shape {tuple(rewards.values.shape)} of the "
            f"rewards. Found {tuple(retest.shape)}."
        )
    for name, given in (("weights", weights), ("milliseconds", milliseconds)):
        if len(given) != len(rewards.names):
            raise ValueError(
                f"Parameter `{name}` should have one entry per objective {rewards.names}. "
                f"Found {len(given)} entries."
            )
    shares = advantage_shares(rewards, weights)
    objectives = {}
    for k, name in enumerate(rewards.names):
        statistics = describe(rewards.values[k], rewards.groups)
        difference = rewards.values[k] - retest[k].to(rewards.values)
        objectives[name] = ObjectiveCalibration(
            **statistics,
            **{f"share_{recipe}": float(share[k]) for recipe, share in shares.items()},
            retest_std=_std(difference[~difference.isnan()]) / math.sqrt(2),
            milliseconds=float(milliseconds[k]),
            base=statistics["mean"],
            target=statistics["mean"] + statistics["std_within"],
            bound=0.5,
        )
    _, siblings = torch.unique(rewards.groups, return_counts=True)  # [P]
    return Calibration(
        model=model,
        prompts=len(siblings),
        images=int(siblings.max()),
        seed=seed,
        objectives=objectives,
        correlations=tuple(tuple(row) for row in correlations(rewards).tolist()),
    )


def describe(values: Tensor, groups: Tensor) -> dict[str, float]:
    """Return location, spread and saturation of one objective.

    With ``n_g`` samples in each of P groups, ``m_g`` their mean, ``std_within`` from
    ``spread_within``::

        std_between^2 = max(0, var_g(m_g) - std_within^2 mean_g(1 / n_g))

    Args:
        values: Rewards ``[N]`` float64, NaN where the objective does not apply.
        groups: Group ids ``[N]`` int64, any ids.

    Returns:
        The fields ``mean`` to ``zero_variance`` of ``ObjectiveCalibration``.
    """
    known = ~values.isnan()
    all_groups = len(groups.unique())
    values, groups = values[known], groups[known]
    if not len(values):
        names = ("mean", "std_total", "std_within", "std_between", "min", "max")
        unknown = (*names, "at_min", "at_max", "zero_variance")
        return dict.fromkeys(unknown, math.nan) | {"applies": 0.0}
    m, s, n = (moment[0] for moment in group_moments(values[None], groups))  # each [N]
    # A sum over samples of x / n is a sum over groups of x.
    count = float((1 / n).sum())  # P
    within = float(spread_within(values[None], groups))
    grand = (m / n).sum() / count
    variance = float(((m - grand).square() / n).sum() / (count - 1)) if count > 1 else math.nan
    if variance <= (RESIDUE * float(values.abs().max())) ** 2:
        variance = 0.0  # only rounding
    between = variance - within**2 * float((1 / n.square()).sum()) / count
    low, high = values.min(), values.max()
    return {
        "mean": float(values.mean()),
        "std_total": _std(values),
        "std_within": within,
        "std_between": between if math.isnan(between) else math.sqrt(max(0.0, between)),
        "min": float(low),
        "max": float(high),
        "at_min": float((values == low).double().mean()),
        "at_max": float((values == high).double().mean()),
        "applies": count / all_groups,
        "zero_variance": float(((s == 0) / n).sum() / count),
    }


def correlations(rewards: RewardMatrix) -> Tensor:
    """Return the Pearson correlation of the values centred within their group: ``[K, K]``.

    Each pair is centred and compared on the samples to which both apply; NaN if one of the two
    does not vary there.
    """
    size = len(rewards.names)
    matrix = torch.full((size, size), torch.nan, dtype=torch.float64)
    for j in range(size):
        for k in range(j, size):
            pair = rewards.values[[j, k]]
            both = torch.where(pair.isnan().any(0), torch.nan, pair)  # [2, N]
            a, b = group_centred(_matrix(both, rewards))[0]
            scale = (a.square().sum() * b.square().sum()).sqrt()
            if scale > 0:
                matrix[j, k] = matrix[k, j] = ((a * b).sum() / scale).clamp(-1, 1)
    return matrix


def advantage_shares(rewards: RewardMatrix, weights: Sequence[float]) -> dict[str, Tensor]:
    """Return each objective's share ``[K]`` of the variance that decides the gradient, by recipe.

    ``static`` is the weighted sum of raw rewards with ``weights``; ``gdpo`` and ``dual_stage`` have
    equal weights and their default options.
    """
    applies = ~rewards.values.isnan()
    given = torch.tensor(list(weights), dtype=torch.float64)
    equal = torch.ones_like(given)
    recipes: dict[str, tuple[Normalizer, Tensor]] = {
        "static": (Raw(rewards.names), given),
        "gdpo": (GDPO(rewards.names), equal),
        "dual_stage": (DualStage(rewards.names), equal),
    }
    return {
        name: variance_share(normalizer.per_objective(rewards), chosen, applies)
        for name, (normalizer, chosen) in recipes.items()
    }


def _std(values: Tensor) -> float:
    """Return the standard deviation of a sample ``[n]``.

    It is the root of the unbiased variance, and exactly 0 where values differ by rounding alone.
    """
    if len(values) < 2:
        return math.nan
    std = float(values.std())
    return 0.0 if std <= RESIDUE * float(values.abs().max()) else std


def _matrix(values: Tensor, like: RewardMatrix) -> RewardMatrix:
    """Return other values ``[K', N]`` of the same samples."""
    return RewardMatrix(
        names=tuple(str(k) for k in range(len(values))),
        values=values,
        groups=like.groups,
        prompts=like.prompts,
    )
