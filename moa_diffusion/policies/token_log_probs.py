"""Log-probabilities of given tokens, without a float32 copy of the logits.

``log softmax`` over a vocabulary of 150,000 tokens costs several tensors of the logits' size. Only
one number per position is wanted: ``z_token - log sum_v exp z_v``, ``z = logits / temperature``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**24  # numbers in a float32 temporary


class _TokenLogProbs(torch.autograd.Function):
    """Float32 in chunks of positions; kept for the backward pass: what the caller holds anyway."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
        chosen, normalizers = [], []
        for part, index in _chunks(logits, ids):
            z = part.float() / temperature  # [rows, V]
            normalizers.append(z.logsumexp(1))
            chosen.append(z.gather(1, index[:, None])[:, 0] - normalizers[-1])
        ctx.save_for_backward(logits, ids, torch.cat(normalizers))
        ctx.temperature = temperature
        return torch.cat(chosen).view(ids.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, normalizers = ctx.saved_tensors
        result = torch.empty_like(logits)
        start = 0
        for part, index in _chunks(logits, ids):
            rows = slice(start, start := start + len(part))
            scaled = gradient.flatten()[rows, None] / ctx.temperature  # [rows, 1]
            softmax = (part.float() / ctx.temperature - normalizers[rows, None]).exp_()
            row = softmax.mul_(-scaled).scatter_add_(1, index[:, None], scaled)
            result.flatten(0, 1)[rows] = row.to(result.dtype)
        return result, None, None


def _chunks(logits: Tensor, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    step = max(1, CHUNK // logits.shape[-1])
    parts = zip(logits.flatten(0, 1).split(step), ids.flatten().split(step), strict=True)
    return list(parts)


def token_log_probs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Return ``log softmax(logits / temperature)`` at ``ids``, differentiable once by the logits.

    Args:
        logits: Logits ``[n, t, V]`` of any floating dtype; its gradient has the same.
        ids: Token ids ``[n, t]`` int64.
        temperature: Temperature that divides the logits; positive.

    Returns:
        ``[n, t]`` float32.
    """
    result: Tensor = _TokenLogProbs.apply(logits.contiguous(), ids, temperature)
    return result
