"""Sums of gradients that no order changes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from moa_diffusion.distributed import LocalComm
from moa_diffusion.training.gradient_sum import GradientSum


def summed(parts: list[torch.Tensor]) -> torch.Tensor:
    parameter = nn.Parameter(torch.zeros(parts[0].shape))
    gradients = GradientSum([parameter])
    for part in parts:
        parameter.grad = part.clone()
        gradients.take()
        assert parameter.grad is None
    gradients.write(LocalComm())
    assert parameter.grad is not None
    return parameter.grad


def test_the_order_of_the_parts_leaves_no_trace():
    source = torch.Generator().manual_seed(0)
    size = 10.0 ** torch.randint(-3, 4, (5, 1000), generator=source)  # micro-batches differ
    parts = list(size * torch.randn(5, 1000, generator=source))
    expected = summed(parts)
    plain = []
    for order in itertools.permutations(parts):
        assert torch.equal(summed(list(order)), expected)
        plain.append(sum(order[1:], order[0]))
    assert any(not torch.equal(other, plain[0]) for other in plain), "float32 would have done"
    exact = torch.stack(parts).double().sum(0)
    assert torch.equal(expected, exact.float())


def test_writing_starts_anew_and_covers_every_parameter():
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3, 2))
    gradients = GradientSum([first, second])
    first.grad = torch.ones(2)
    gradients.take()
    gradients.write(LocalComm())
    assert first.grad.tolist() == [1, 1]
    assert torch.equal(second.grad, torch.zeros(3, 2))
    gradients.write(LocalComm())
    assert first.grad.tolist() == [0, 0]


def test_infinities_stay():
    assert summed([torch.tensor([torch.inf, 1.0]), torch.tensor([1.0, torch.nan])])[0] == torch.inf


def test_there_must_be_parameters():
    with pytest.raises(ValueError, match="`parameters` should not be empty"):
        GradientSum([])
