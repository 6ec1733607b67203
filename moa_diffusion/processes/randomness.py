"""The global random generators, which nothing here uses and a user's code may."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_globally(seed: int) -> None:
    """Seed the global random generators of Python, NumPy and torch, on the CPU and on CUDA devices.

    For every kind of device that a machine lacks, ``torch.manual_seed`` notes the seed and the
    stack of calls, which takes longer than a small rollout's update, and keeps most of these notes.

    Args:
        seed: From 0 to 2^32 - 1.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put the global random generators back to where they were."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
