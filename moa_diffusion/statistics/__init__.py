"""Pure functions of numbers."""

from moa_diffusion.statistics.bootstrap import (
    Estimate,
    estimate,
    means_over_prompts,
    prompt_sums,
    resample,
    resampled_means,
)
from moa_diffusion.statistics.groups import (
    group_centred,
    group_moments,
    mean_and_error,
    rms_group_std,
    same_prompt,
    spread_within,
    zero_variance_fraction,
)
from moa_diffusion.statistics.pareto import crowding, hypervolumes, nondominated, thinned

__all__ = [
    "Estimate",
    "crowding",
    "estimate",
    "group_centred",
    "group_moments",
    "hypervolumes",
    "mean_and_error",
    "means_over_prompts",
    "nondominated",
    "prompt_sums",
    "resample",
    "resampled_means",
    "rms_group_std",
    "same_prompt",
    "spread_within",
    "thinned",
    "zero_variance_fraction",
]
