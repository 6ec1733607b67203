"""LoRA weights of any origin, as evaluation and export need them."""

from moa_diffusion.adapters.diffusers import carrier, install, write_adapter
from moa_diffusion.adapters.soup import mix, mixtures

__all__ = [
    "carrier",
    "install",
    "mix",
    "mixtures",
    "write_adapter",
]
