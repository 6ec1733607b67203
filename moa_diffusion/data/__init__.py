"""Which samples are drawn at which step: prompts, preferences, groups and seeds."""

from moa_diffusion.data.preference_files import read_pairs, read_preferences
from moa_diffusion.data.preferences import Preferences
from moa_diffusion.data.prompt_files import Prompt, read_prompts
from moa_diffusion.data.sampling import GroupSampler, Mixture, PromptSet
from moa_diffusion.data.seeds import derive_seed, generator

__all__ = [
    "GroupSampler",
    "Mixture",
    "Preferences",
    "Prompt",
    "PromptSet",
    "derive_seed",
    "generator",
    "read_pairs",
    "read_preferences",
    "read_prompts",
]
