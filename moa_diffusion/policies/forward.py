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
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

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
        s: float,
        key: Tensor,
        layer: LoraForward | None,
    ) -> Tensor:
        ctx.save_for_backward(x, merged, a, b, key)
        ctx.s, ctx.layer = s, layer
        return functional.linear(x, merged, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, a, b, key = ctx.saved_tensors
        dx = dy @ merged if ctx.needs_input_grad[0] else None
        da, db = _gradients(ctx.layer, key, x, dy, (dy @ b).mul_(ctx.s), x @ a.T)
        return dx, None, None, da, db, None, None, None


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
        a: Tensor,  # these two in the precision of x
        b: Tensor,
        s: float,
        key: Tensor,
        layer: LoraForward | None,
    ) -> Tensor:
        y, low = _add(x, weight, bias, a, b, s)
        ctx.save_for_backward(x, weight, a, b, low, key)
        ctx.s, ctx.layer = s, layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low, key = ctx.saved_tensors
        left = (dy @ b).mul_(ctx.s)  # [..., rank]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            dx.view(-1, dx.shape[-1]).addmm_(left.view(-1, left.shape[-1]), a)
        da, db = _gradients(ctx.layer, key, x, dy, left, low)
        return dx, None, None, da, db, None, None, None, None, None


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
        number = next(_NUMBERS)
        _LAYERS[number] = self
        self.key = torch.tensor(number, device="cpu")  # a graph is then the same for all layers
        self._versions = (-1, -1)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the base layer with the LoRA added to it, or without if it is disabled."""
        base = self.layer.base_layer
        x = x.to(base.weight.dtype)  # as autocast does
        if self.layer.disable_adapters:
            return functional.linear(x, base.weight, base.bias)
        if not torch.compiler.is_compiling():
            self.refresh()
        return self.apply(x, base.weight, base.bias)

    @abstractmethod
    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the adapted layer's output for x, which has the type of the base weight."""

    def refresh(self) -> None:
        """Make anew what is kept of A and B, if they changed in place (optimizer, EMA, loading).

        Every call does so, except in a compiled model, where a version cannot be looked up: there
        it has to be done before the model is called.
        """
        versions = (self.a._version, self.b._version)
        if versions != self._versions:
            self.keep()
            self._versions = versions

    @abstractmethod
    def keep(self) -> None:
        """Keep what ``apply`` takes of A and B."""

    def known(self) -> LoraForward | None:
        """Return the layer, or None in a compiled pass: a graph of it would be of it alone."""
        return None if torch.compiler.is_compiling() else self

    def gradients(
        self, x: Tensor, dy: Tensor, left: Tensor, low: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of A and B, or hand over what they are made of, and return none.

        Args:
            x: The layer's input ``[..., in]``.
            dy: The gradient of its output, ``[..., out]``.
            left: ``s dy B``, ``[..., rank]``.
            low: ``x A^T``, ``[..., rank]``.
        """
        if self.record is not None:
            self.record(self.a, left, x)
            self.record(self.b, dy, low * self.s)
            return None, None
        x, dy, left, low = (t.reshape(-1, t.shape[-1]) for t in (x, dy, left, low))  # [N L, ...]
        return (left.T @ x).float(), (dy.T @ low).float() * self.s  # [rank, in], [out, rank]


_LAYERS: WeakValueDictionary[int, LoraForward] = WeakValueDictionary()
_NUMBERS = count()


@torch.library.custom_op("moa_diffusion::lora_gradients", mutates_args=())
def lora_gradients(
    key: Tensor, x: Tensor, dy: Tensor, left: Tensor, low: Tensor
) -> tuple[Tensor, Tensor]:
    """Call ``LoraForward.gradients`` of a layer, from a compiled backward pass.

    Whether a layer records is decided after its graph was made, which is why the graph holds this
    operator and not what is in it. It returns zeros for gradients that were handed over.
    """
    layer = _LAYERS[int(key)]
    da, db = layer.gradients(x, dy, left, low)
    if da is None or db is None:
        return torch.zeros_like(layer.a), torch.zeros_like(layer.b)
    return da, db


@lora_gradients.register_fake
def _(key: Tensor, x: Tensor, dy: Tensor, left: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    da = x.new_empty(left.shape[-1], x.shape[-1], dtype=torch.float32)
    return da, x.new_empty(dy.shape[-1], left.shape[-1], dtype=torch.float32)


def _gradients(
    layer: LoraForward | None, key: Tensor, x: Tensor, dy: Tensor, left: Tensor, low: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of A and B of a layer; a compiled pass knows its key alone."""
    if layer is not None:
        return layer.gradients(x, dy, left, low)
    found: tuple[Tensor, Tensor] = lora_gradients(key, x, dy, left, low)
    return found


class MergedForward(LoraForward):
    """One product with ``W' = W + s B A``, for float32; it keeps W'."""

    dtypes = (torch.float32,)

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self._merged: Tensor

    @torch.no_grad()
    def keep(self) -> None:
        """Keep W'."""
        self._merged = torch.addmm(self.layer.base_layer.weight, self.b, self.a, alpha=self.s)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x W'^T + bias``."""
        if torch.is_grad_enabled():
            product: Tensor = _Merged.apply(
                x, self._merged, bias, self.a, self.b, self.s, self.key, self.known()
            )
            return product
        return functional.linear(x, self._merged, bias)


class AddedForward(LoraForward):
    """``W x`` with ``s B (A x)`` added in place, for half precision; it keeps A and B in it."""

    dtypes = (torch.float16, torch.bfloat16)

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self._factors: tuple[Tensor, ...] = ()

    def keep(self) -> None:
        """Keep A and B in the type of the base weight."""
        kind = self.layer.base_layer.weight.dtype
        self._factors = self.a.detach().to(kind), self.b.detach().to(kind)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x W^T + bias + s (x A^T) B^T``."""
        a, b = self._factors
        if torch.is_grad_enabled():
            total: Tensor = _Added.apply(
                x, weight, bias, self.a, self.b, a, b, self.s, self.key, self.known()
            )
            return total
        return _add(x, weight, bias, a, b, self.s)[0]
