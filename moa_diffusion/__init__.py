"""Align text-to-image diffusion models with several rewards at once."""

__version__ = "0.1.0"
