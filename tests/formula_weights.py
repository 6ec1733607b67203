"""Weights that are not stored: each is a formula of its name, so that others can make the same."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def formula_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return float32 tensors by name: uniform, about of the size that keeps activations' size.

    The generator is numpy's `RandomState`, whose numbers are frozen, seeded by the name's CRC-32.
    """
    return {name: _weight(name, shape) for name, shape in shapes.items()}


def _weight(name: str, shape: tuple[int, ...]) -> Tensor:
    drawn = np.random.RandomState(zlib.crc32(name.encode())).uniform(-1, 1, shape)
    if name.endswith("num_batches_tracked"):
        return torch.tensor(1)
    if len(shape) >= 2:
        drawn = drawn * (3 / np.prod(shape[1:])) ** 0.5
    elif name.endswith(("weight", "running_var")):  # of a norm: about 1
        drawn = 1 + drawn / 4
    elif name == "logit_scale":
        drawn = np.array(3.0)
    else:
        drawn = drawn / 4
    return torch.from_numpy(np.asarray(drawn)).float()
