"""LoRA weights as evaluation and export carry, mix and write them; ``policies`` reads them."""

from moa_diffusion.adapters.diffusers import carrier, install, write_adapter
from moa_diffusion.adapters.soup import mix, mixtures

__all__ = [
    "carrier",
    "install",
    "mix",
    "mixtures",
    "write_adapter",
]
