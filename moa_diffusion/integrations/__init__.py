"""The objectives inside other people's trainers."""

from moa_diffusion.integrations.aggregation import Aggregation

__all__ = [
    "Aggregation",
]
