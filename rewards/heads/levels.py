"""Ratings in words: how a language model that was asked for a level of quality is read.

Q-Align (Wu et al. 2023, https://arxiv.org/abs/2312.17090, section 3.2): of the logits of the next
word only those of five levels count; the rating is what the levels are worth, weighted by softmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewards.base import Scores

LEVELS = ("excellent", "good", "fair", "poor", "bad")


def rate(logits: Tensor, worth: Sequence[float]) -> Scores:
    """Read ratings from the logits of the five levels.

    Args:
        logits: Logits ``[N, 5]``, in the order of ``LEVELS``, any precision and device.
        worth: What each level is worth.

    Returns:
        The ratings, ``[N]`` float32 on the CPU, with the probability of each level in a column
        named after it.
    """
    # In half precision a probability near 1 has steps of 5e-4, the rating of 2e-3.
    probabilities = logits.detach().float().softmax(dim=1).cpu()  # [N, 5]
    return Scores(
        values=probabilities @ torch.tensor(worth, dtype=torch.float32),
        extra=dict(zip(LEVELS, probabilities.T.tolist(), strict=True)),
    )
