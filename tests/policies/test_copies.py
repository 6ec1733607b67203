"""Copies of the adapter: how they follow it, and that they stand in for it without a trace."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from moa_diffusion.config.presets import PRESETS, CopyRules
from moa_diffusion.policies.copies import AdapterCopy


def parameters() -> dict[str, nn.Parameter]:
    source = torch.Generator().manual_seed(0)
    shapes = {"a": (2, 3), "b": (4,)}
    return {name: nn.Parameter(torch.randn(*s, generator=source)) for name, s in shapes.items()}


def moved(values: dict[str, nn.Parameter], number: int) -> None:
    with torch.no_grad():
        for parameter in values.values():
            parameter.fill_(number)


@pytest.mark.parametrize(
    ("rules", "shares"),
    [
        # DiffusionNFT's `return_decay` of types 0, 1 and 2 after so many optimizer steps.
        (CopyRules(), {0: 0.0, 1: 0.0, 9999: 0.0}),
        (PRESETS["nft"].old, {0: 0.0, 100: 0.1, 500: 0.5, 9999: 0.5}),
        (
            CopyRules(decay_rate=0.0075, decay_limit=0.999, decay_after=75),
            {0: 0.0, 74: 0.0, 75: 0.0, 95: 0.15, 208: 0.9975, 209: 0.999, 9999: 0.999},
        ),
        # AWM's moving average.
        (PRESETS["awm"].average, {0: 0.0, 100: 0.1, 300: 0.3, 9999: 0.3}),
    ],
)
def test_the_share_that_stays_grows_as_published(
    rules: CopyRules, shares: dict[int, float]
) -> None:
    copy = AdapterCopy(parameters(), rules)
    for updates, share in shares.items():
        assert math.isclose(copy.share(updates), share, abs_tol=1e-12), updates


def test_a_copy_follows_by_what_does_not_stay() -> None:
    values = parameters()
    moved(values, 0)
    copy = AdapterCopy(values, CopyRules(decay_rate=0.25, decay_limit=0.5))
    moved(values, 8)
    assert not copy.values["a"].any()  # until it follows
    for updates, expected in ((1, 6.0), (2, 7.0), (3, 7.5)):  # a quarter, a half, no more
        copy.follow(updates)
        assert all((tensor == expected).all() for tensor in copy.values.values())
    assert (values["a"] == 8).all()


def test_without_a_rate_it_is_the_adapter_as_a_rollout_began() -> None:
    values = parameters()
    copy = AdapterCopy(values, CopyRules())
    with torch.no_grad():
        values["a"].mul_(1 / 3)
    copy.follow(7)
    assert all(torch.equal(copy.values[name], p) for name, p in values.items())


def test_a_restart_begins_with_the_parameters_as_they_are() -> None:
    """What an adapter is given after it was made, say."""
    values = parameters()
    copy = AdapterCopy(values, CopyRules(decay_rate=1.0))
    moved(values, 3)
    copy.restart()
    assert all((tensor == 3).all() for tensor in copy.values.values())
    moved(values, 4)
    assert (copy.values["b"] == 3).all()


def test_it_stands_in_within_a_block_and_leaves_no_trace() -> None:
    """To the bit, also where the block fails; and what kept the parameters' version notices."""
    values = parameters()
    copy = AdapterCopy(values, CopyRules(decay_rate=1.0))
    behind = {name: tensor.clone() for name, tensor in copy.values.items()}
    with torch.no_grad():
        for parameter in values.values():
            parameter.mul_(math.pi)
    trained = {name: p.detach().clone() for name, p in values.items()}
    version = values["a"]._version
    with pytest.raises(RuntimeError, match="within"), copy.applied():
        assert all(torch.equal(p, behind[name]) for name, p in values.items())
        assert values["a"]._version > version
        raise RuntimeError("within")
    assert all(torch.equal(p, trained[name]) for name, p in values.items())
    assert all(torch.equal(tensor, behind[name]) for name, tensor in copy.values.items())


def test_a_saved_copy_goes_on_in_another_run() -> None:
    values = parameters()
    copy = AdapterCopy(values, CopyRules(decay_rate=0.25))
    moved(values, 8)
    copy.follow(2)
    state = {name: tensor.clone() for name, tensor in copy.state_dict().items()}
    moved(values, 1)
    other = AdapterCopy(values, CopyRules(decay_rate=0.25))
    other.load_state_dict(state)
    for one in (copy, other):
        one.follow(2)
    assert all(torch.equal(other.values[name], copy.values[name]) for name in values)
    assert not torch.equal(other.values["a"], state["a"])  # which is left alone
