"""Costs of operations, on tensors small enough to count by hand."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moa_diffusion.planning.counting import Counts


def test_a_product_is_counted_by_its_operations_and_its_bytes() -> None:
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with Counts([a, b]) as counts:
        product = a @ b
    assert counts.flops == 2 * 3 * 4 * 5
    assert counts.moved == a.nbytes + b.nbytes + product.nbytes
    assert counts.live == counts.peak == counts.largest == product.nbytes


def test_what_is_let_go_lives_no_longer_and_was_at_the_peak() -> None:
    a = torch.ones(8)
    with Counts([a]) as counts:
        b = a + 1
        c = b + 1
        del b
        d = c + 1
    assert counts.live == c.nbytes + d.nbytes
    assert counts.peak == 2 * a.nbytes


def test_views_move_nothing_and_changes_in_place_do() -> None:
    a = torch.ones(4, 4)
    with Counts([a]) as counts:
        a.view(16)[3:7].unsqueeze(0)
        assert counts.live == counts.moved == 0
        a.add_(1)
    assert counts.live == 0
    assert counts.moved == 2 * a.nbytes


def test_a_graph_keeps_what_its_hooks_are_told_of() -> None:
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x, w = torch.randn(6, 7), torch.randn(7, 7, requires_grad=True)
    with Counts([x, w]) as counts, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = (torch.tanh(x @ w) @ w).square().sum()
    known = {x.untyped_storage().data_ptr(), w.untyped_storage().data_ptr()}
    saved = sum(size for pointer, size in kept.items() if pointer not in known)
    assert counts.live == saved + y.nbytes


def test_tensors_without_data_cost_the_same() -> None:
    def run() -> Counts:
        layer, x = torch.nn.Linear(32, 48), torch.ones(5, 32)
        with Counts([x, *layer.parameters()]) as counts:
            layer(x).relu().sum().backward()
        return counts

    real = run()
    with FakeTensorMode():
        fake = run()
    for name in ("flops", "moved", "live", "peak", "largest"):
        assert getattr(real, name) == getattr(fake, name), name
