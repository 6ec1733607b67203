"""The forward passes of LoRA layers, with less work than peft does.

peft computes ``W x + s B (A x)`` with three products, two additions of the result's size and, in
half precision, casts of A, B and x in every call. Here a float32 layer is one product, with
``W' = W + s B A`` made once per update of A and B. In half precision the update would drown in the
rounding of W': there A and B are cast once per update, and the last product adds to the result in
place. Both backward passes return the gradients of A and B themselves, or hand over what they are
made of (``moa_diffusion.training.gradients``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Record = Callable[[Tensor, Tensor, Tensor], None]  # see moa_diffusion.training.gradients.Layer


class _Merged(torch.autograd.Function):
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


class _Added(torch.autograd.Function):
    """``x W^T + bias + s (x A^T) B^T`` whose gradient goes to x, A and B.

    It is computed with A and B in the precision of x; their gradients are float32, rounded once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        _a: Tensor,
        _b: Tensor,
        factors: tuple[Tensor, Tensor],
        layer: AddedForward,
    ) -> Tensor:
        y, low = _add(x, weight, bias, *factors, layer.s)
        ctx.save_for_backward(x, weight, *factors, low)
        ctx.layer = layer
        return y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None, None]:
        x, weight, a, b, low = ctx.saved_tensors
        layer: AddedForward = ctx.layer
        dlow = (dy @ b).mul_(layer.s)  # [..., rank]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            dx.view(-1, dx.shape[-1]).addmm_(dlow.view(-1, dlow.shape[-1]), a)
        if layer.record is not None:
            layer.record(layer.a, dlow, x)
            layer.record(layer.b, dy, low * layer.s)
            return dx, None, None, None, None, None, None
        rows = [t.reshape(-1, t.shape[-1]) for t in (x, dy, dlow, low)]  # [N L, ...]
        da = (rows[2].T @ rows[0]).float()  # [rank, in]
        db = (rows[1].T @ rows[3]).float() * layer.s  # [out, rank]
        return dx, None, None, da, db, None, None


def _add(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float
) -> tuple[Tensor, Tensor]:
    """Return ``y = x W^T + bias + s (x A^T) B^T``, made in place, and ``x A^T``."""
    y, low = functional.linear(x, weight, bias), functional.linear(x, a)
    y.view(-1, y.shape[-1]).addmm_(low.view(-1, low.shape[-1]), b.T, alpha=s)
    return y, low


class LoraForward(ABC):
    """Replaces the ``forward`` of a peft LoRA layer over an ``nn.Linear``.

    While ``record`` is set, a backward pass that is asked for ``leaves`` calls it for each of
    ``weights``, and gives them no gradient.

    Args:
        layer: The layer, with one adapter named "default", without dropout.

    Raises:
        ValueError: If the base weight is of another type than ``dtypes``.
    """

    dtypes: tuple[torch.dtype, ...]

    def __init__(self, layer: Any) -> None:
        if layer.base_layer.weight.dtype not in self.dtypes:
            raise ValueError(
                "Parameter `layer` should have a base weight of type "
                f"{' or '.join(map(str, self.dtypes))}. Found {layer.base_layer.weight.dtype}."
            )
        self.layer = layer
        self.a: Tensor = layer.lora_A["default"].weight
        self.b: Tensor = layer.lora_B["default"].weight
        self.s: float = layer.scaling["default"]
        self.weights = self.leaves = (self.a, self.b)
        self.record: Record | None = None
        self._versions = (-1, -1)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the base layer with the LoRA added to it, or without if it is disabled."""
        base = self.layer.base_layer
        x = x.to(base.weight.dtype)  # as autocast does
        if self.layer.disable_adapters:
            return functional.linear(x, base.weight, base.bias)
        return self.apply(x, base.weight, base.bias)

    @abstractmethod
    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the adapted layer's output for x, which has the type of the base weight."""

    def _changed(self) -> bool:
        """Return whether A or B changed in place since the last call (optimizer, EMA, loading)."""
        versions = (self.a._version, self.b._version)
        before, self._versions = self._versions, versions
        return versions != before


class MergedForward(LoraForward):
    """One product with ``W' = W + s B A``, for float32; it keeps W'."""

    dtypes = (torch.float32,)

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self._merged: Tensor | None = None

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x W'^T + bias``."""
        if self._changed() or self._merged is None:
            with torch.no_grad():
                self._merged = torch.addmm(weight, self.b, self.a, alpha=self.s)
        if torch.is_grad_enabled():
            product: Tensor = _Merged.apply(x, self._merged, bias, self.a, self.b, self)
            return product
        return functional.linear(x, self._merged, bias)


class AddedForward(LoraForward):
    """``W x`` with ``s B (A x)`` added in place, for half precision; it keeps A and B in it."""

    dtypes = (torch.float16, torch.bfloat16)

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self._factors: tuple[Tensor, Tensor] | None = None

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x W^T + bias + s (x A^T) B^T``."""
        if self._changed() or self._factors is None:
            self._factors = self.a.detach().to(x.dtype), self.b.detach().to(x.dtype)
        if torch.is_grad_enabled():
            inputs = (x, weight, bias, self.a, self.b, self._factors, self)
            total: Tensor = _Added.apply(*inputs)
            return total
        return _add(x, weight, bias, *self._factors, self.s)[0]
