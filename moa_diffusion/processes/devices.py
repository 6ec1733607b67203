"""What devices differ in."""

from __future__ import annotations

import torch


def float64_device(device: torch.device) -> torch.device:
    """Return the device itself if it is known to have float64, else the CPU: Apple's has none."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def widest(device: torch.device) -> torch.dtype:
    """Return the type that sums are made in on a device.

    It is float64, or float32 where the device has no float64.
    """
    return torch.float64 if float64_device(device) == device else torch.float32
