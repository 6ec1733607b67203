"""Gumbel noise: what it is added to is sampled from the softmax."""

from __future__ import annotations

import torch

from moa_diffusion.policies.gumbel import GumbelNoise

CPU = torch.device("cpu")


def test_perturbed_logits_sample_the_softmax() -> None:
    """Pearson's statistic of 8,000 draws from 12 tokens, 11 degrees of freedom."""
    count, logits = 8_000, torch.linspace(-2, 2, 12)
    noise = GumbelNoise(range(count), temperature=0.7, device=CPU)
    drawn = noise(torch.zeros(count, 1), logits.expand(count, 12)).argmax(1)
    expected = (logits / 0.7).softmax(0) * count
    statistic = ((torch.bincount(drawn, minlength=12) - expected).square() / expected).sum()
    assert statistic < 31.3  # exceeded once in a thousand; the seeds are fixed
