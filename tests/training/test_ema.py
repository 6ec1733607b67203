"""The moving average: its recursion, what it counts, and that it never leaks into training."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from moa_diffusion.training.ema import EMA


def parameters() -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.zeros(2, 3)), "b": nn.Parameter(torch.ones(1))}


def walk(ema: EMA, steps: range) -> None:
    for step in steps:
        for parameter in ema.parameters.values():
            parameter.data.fill_(float(step))
        ema.update()


def test_recursion_in_numbers():
    ema = EMA(parameters(), decay=0.75, every=1)
    walk(ema, range(1, 3))  # 0 -> 0.25 -> 0.6875, and 1 -> 1 -> 1.25
    # Halves and quarters, which float32 does not round.
    torch.testing.assert_close(ema.average["a"], torch.full((2, 3), 0.6875))
    torch.testing.assert_close(ema.average["b"], torch.tensor([1.25]))


def test_every_counts_optimizer_steps():
    ema = EMA(parameters(), decay=0.5, every=3)
    walk(ema, range(1, 3))
    assert not ema.average["a"].any()
    walk(ema, range(3, 6))
    torch.testing.assert_close(ema.average["a"], torch.full((2, 3), 1.5))  # halves too
    assert ema.count == 5


def test_without_decay_it_follows():
    ema = EMA(parameters(), decay=0.0, every=1)
    walk(ema, range(1, 3))
    assert torch.equal(ema.average["a"], ema.parameters["a"].detach())


def test_starts_at_the_present_values_and_is_a_copy():
    ema = EMA(parameters(), decay=0.9, every=1)
    assert torch.equal(ema.average["b"], torch.ones(1))
    ema.parameters["b"].data.fill_(5.0)
    assert torch.equal(ema.average["b"], torch.ones(1))
    assert not ema.average["b"].requires_grad


def test_applied_gives_the_parameters_back_also_after_an_error():
    ema = EMA(parameters(), decay=0.5, every=1)
    walk(ema, range(1, 2))
    identity = ema.parameters["a"]
    with pytest.raises(KeyboardInterrupt), ema.applied():
        assert torch.equal(identity.detach(), torch.full((2, 3), 0.5))
        raise KeyboardInterrupt
    assert torch.equal(identity.detach(), torch.ones(2, 3))
    assert torch.equal(ema.average["a"], torch.full((2, 3), 0.5))


def test_saved_state_continues_identically():
    straight, before = (EMA(parameters(), decay=0.9, every=2) for _ in range(2))
    walk(straight, range(1, 4))
    walk(before, range(1, 4))
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    resumed = EMA(parameters(), decay=0.9, every=2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    walk(straight, range(4, 7))
    walk(resumed, range(4, 7))
    assert resumed.count == straight.count
    for name, tensor in straight.average.items():
        assert torch.equal(resumed.average[name], tensor)
