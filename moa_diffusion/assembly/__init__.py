"""Configuration to objects: the only modules that know names and classes."""

from moa_diffusion.assembly.batches import solve_geometry, unequal_batches
from moa_diffusion.assembly.defaults import changes, flat, with_defaults
from moa_diffusion.assembly.methods import METHODS, is_fused, method_of, objectives
from moa_diffusion.assembly.models import causal_lm, model_path, policy
from moa_diffusion.assembly.prompts import heldout_prompts, heldout_requests, train_prompts
from moa_diffusion.assembly.run_folder import write_config
from moa_diffusion.assembly.scorers import all_options, check_requirements, heads
from moa_diffusion.assembly.trainers import (
    check_trackers,
    preferences,
    text_trainer,
    trainer,
)

__all__ = [
    "METHODS",
    "all_options",
    "causal_lm",
    "changes",
    "check_requirements",
    "check_trackers",
    "flat",
    "heads",
    "heldout_prompts",
    "heldout_requests",
    "is_fused",
    "method_of",
    "model_path",
    "objectives",
    "policy",
    "preferences",
    "solve_geometry",
    "text_trainer",
    "train_prompts",
    "trainer",
    "unequal_batches",
    "with_defaults",
    "write_config",
]
