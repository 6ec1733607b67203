"""The sum of micro-batches' gradients, the same to the last bit in any order.

One process adds eight micro-batches one after the other; four processes add two each, and the
collective adds the four sums in an order of its own. In float32 these sums differ by rounding, and
training multiplies the difference. So float32 gradients are added in float64: of numbers with 24
bits, hundreds add up exactly in 53 bits as long as the largest is no more than some 10^6 times the
smallest that counts, and beyond that the sum differs in its 16th digit, of which rounding back to
float32 almost never leaves anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from moa_diffusion.distributed import Comm
from moa_diffusion.processes.devices import widest


class GradientSum:
    """Adds up what micro-batches leave in ``.grad``, over micro-batches and processes.

    Args:
        parameters: At least one, all on one device; with P numbers in all.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        if not parameters:
            raise ValueError("Parameter `parameters` should not be empty.")
        self._parameters = list(parameters)
        device = self._parameters[0].device
        sizes = [parameter.numel() for parameter in self._parameters]
        self._flat = torch.zeros(sum(sizes), dtype=widest(device), device=device)  # [numbers]
        self._parts = [
            part.view_as(parameter)
            for part, parameter in zip(self._flat.split(sizes), self._parameters, strict=True)
        ]

    @torch.no_grad()
    def take(self) -> None:
        """Add every ``.grad`` to the sum, and leave None in its place."""
        for part, parameter in zip(self._parts, self._parameters, strict=True):
            if parameter.grad is not None:
                part += parameter.grad
                parameter.grad = None

    @torch.no_grad()
    def write(self, comm: Comm) -> None:
        """Leave the sum over all processes in ``.grad``, and start anew.

        A parameter that no micro-batch reached gets a gradient of 0.
        """
        comm.sum_([self._flat])
        for part, parameter in zip(self._parts, self._parameters, strict=True):
            parameter.grad = part.to(parameter.dtype, copy=True)
        self._flat.zero_()
