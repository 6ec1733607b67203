"""A checkpoint as a folder that others load."""

from moa_diffusion.export.card import model_card
from moa_diffusion.export.export import export

__all__ = [
    "export",
    "model_card",
]
