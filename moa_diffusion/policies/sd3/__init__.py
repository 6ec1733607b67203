"""Stable Diffusion 3 and 3.5 as a policy: the pipeline, its transformer, and rollouts of it."""

from moa_diffusion.policies.sd3.pipeline import (
    DTYPES,
    check_fit,
    check_pipeline,
    latent_shape,
    load_pipeline,
)
from moa_diffusion.policies.sd3.policy import SD3Policy

__all__ = [
    "DTYPES",
    "SD3Policy",
    "check_fit",
    "check_pipeline",
    "latent_shape",
    "load_pipeline",
]
