"""Exact sampling of tokens, each text from its own seed.

With independent ``g_v = -log E_v``, ``E_v`` exponential, ``argmax_v (z_v + g_v)`` is a draw from
``softmax(z)`` (Gumbel 1954; Maddison et al., arXiv 1411.0030). So greedy decoding of perturbed
logits samples, and what it draws does not depend on the batch that a text is in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moa_diffusion.processes.devices import float64_device


class GumbelNoise:
    """A logits processor of ``transformers``: makes greedy decoding sample.

    The draws are made on the model's device, as a number per token of the vocabulary would have to
    be moved there: the same seed gives other texts on another kind of device. They are float64,
    because in float32 the largest of 150,000 draws would come from a grid with steps of 1 %; where
    the device has no float64, they are made on the CPU.

    Args:
        seeds: One per text.
        temperature: The temperature of the softmax, positive.
        device: The device of the logits.
    """

    def __init__(self, seeds: Sequence[int], *, temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        self._device = float64_device(device)
        self.sources = [torch.Generator(self._device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return perturbed logits ``[n, V]`` float32, from ``scores [n, V]``, whatever the ids."""
        draws = torch.empty(scores.shape, dtype=torch.float64, device=self._device)
        for row, source in zip(draws, self.sources, strict=True):
            row.exponential_(generator=source)
        return scores.float() / self.temperature - draws.log_().float().to(scores.device)
