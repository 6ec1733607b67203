"""Heads on another machine: what asks, what answers, what travels."""

from rewards.serving.server import Limits, build_app, listen, run

__all__ = ["Limits", "build_app", "listen", "run"]
