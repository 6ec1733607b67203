"""What is trained: policies sample, and give log-probabilities with gradient."""

from moa_diffusion.policies.base import Policy
from moa_diffusion.policies.causal_lm import CausalLMPolicy
from moa_diffusion.policies.language_model import load_model
from moa_diffusion.policies.sd3 import SD3Policy, load_pipeline
from moa_diffusion.policies.toy import ToyPolicy

__all__ = [
    "CausalLMPolicy",
    "Policy",
    "SD3Policy",
    "ToyPolicy",
    "load_model",
    "load_pipeline",
]
