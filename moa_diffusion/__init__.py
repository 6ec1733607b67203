"""Align text-to-image diffusion models with several rewards at once."""

from moa_diffusion.files.neighbours import check_neighbour

__version__ = "0.2.0"

check_neighbour("rewards")
