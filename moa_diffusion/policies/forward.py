"""The forward pass of a LoRA layer as one matrix product, exact, for float32 weights.

peft computes ``W x + s B (A x)`` with three products, which on a small model costs a fifth of a
forward pass. Here the product is with ``W' = W + s B A``, made once per update of A and B, and the
backward pass returns the gradients of A and B themselves, or hands over what they are made of
(``moa_diffusion.training.gradients``). In half precision the update would drown in its rounding:
such layers keep peft's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Record = Callable[[Tensor, Tensor, Tensor], None]  # see moa_diffusion.training.gradients.Layer


class _Product(torch.autograd.Function):
    """``x W'^T + bias`` whose gradient goes to x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        merged: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        layer: MergedForward,
    ) -> Tensor:
        ctx.save_for_backward(x, merged, a, b)
        ctx.layer = layer
        return functional.linear(x, merged, bias)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        x, merged, a, b = ctx.saved_tensors
        layer: MergedForward = ctx.layer
        dx = dy @ merged if ctx.needs_input_grad[0] else None
        if layer.record is not None:
            layer.record(layer.a, dy @ b * layer.s, x)
            layer.record(layer.b, dy, x @ a.T * layer.s)
            return dx, None, None, None, None, None
        rows_x, rows_dy = x.flatten(0, -2), dy.flatten(0, -2)  # [N L, in], [N L, out]
        da = (rows_dy @ b).T @ rows_x * layer.s  # [rank, in]
        db = rows_dy.T @ (rows_x @ a.T) * layer.s  # [out, rank]
        return dx, None, None, da, db, None


class MergedForward:
    """Replaces the ``forward`` of a peft LoRA layer over an ``nn.Linear``.

    While ``record`` is set, a backward pass that is asked for ``leaves`` calls it for each of
    ``weights``, and gives them no gradient.

    Args:
        layer: The layer, with one adapter named "default", without dropout.

    Raises:
        ValueError: If the base weight is not float32.
    """

    def __init__(self, layer: Any) -> None:
        if layer.base_layer.weight.dtype != torch.float32:
            raise ValueError(
                "Parameter `layer` should have a float32 base weight. "
                f"Found {layer.base_layer.weight.dtype}."
            )
        self.layer = layer
        self.a: Tensor = layer.lora_A["default"].weight
        self.b: Tensor = layer.lora_B["default"].weight
        self.s: float = layer.scaling["default"]
        self.weights = self.leaves = (self.a, self.b)
        self.record: Record | None = None
        self._merged: Tensor | None = None
        self._versions = (-1, -1)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the base layer with the LoRA added to its weight, or without if it is disabled."""
        base = self.layer.base_layer
        if self.layer.disable_adapters:
            return functional.linear(x, base.weight, base.bias)
        if torch.is_grad_enabled():
            product: Tensor = _Product.apply(x, self._weight(), base.bias, self.a, self.b, self)
            return product
        return functional.linear(x, self._weight(), base.bias)

    @torch.no_grad()
    def _weight(self) -> Tensor:
        """Return ``W'``, made anew after in-place changes of A or B (optimizer, EMA, loading)."""
        versions = (self.a._version, self.b._version)
        if self._merged is None or versions != self._versions:
            base = self.layer.base_layer.weight
            self._merged = torch.addmm(base, self.b, self.a, alpha=self.s)
            self._versions = versions
        return self._merged
