"""The forward passes of LoRA layers and of SD3's attention, with less work than the libraries do.

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
from functools import partial
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


def backend(name: str) -> Any:
    """Return the attention backend of diffusers of this name, ready to be called.

    A backend of the hub is downloaded.

    Args:
        name: A value of ``diffusers.models.attention_dispatch.AttentionBackendName``.

    Raises:
        ValueError: If there is none that could train, or a package that it needs is missing.
    """
    from diffusers.models import attention_dispatch as dispatch

    usable, why = {}, f"Found {name!r}."
    for kind in dispatch.AttentionBackendName:
        if "sage" in kind.value:  # its kernels have no backward pass
            continue
        try:
            dispatch._check_attention_backend_requirements(kind)
        except RuntimeError as error:
            why = f"Found {name!r}: {error}" if kind.value == name else why
        else:
            usable[kind.value] = kind
    if name not in usable:
        raise ValueError(
            "Parameter `attention` should be a backend of diffusers that can train and is "
            f"installed: {', '.join(sorted(usable))}. {why}"
        )
    with dispatch.attention_backend(usable[name]):
        return usable[name]


class JointAttention:
    """The attention of SD3's blocks, in the place of diffusers' ``JointAttnProcessor2_0``.

    It does the same, to the bit in float32 on a CPU, with three differences. Under autocast the
    input is cast once for queries, keys and values, which then keep one copy of it for the backward
    pass instead of three. Queries and keys are normalised by torch's own function, which rounds
    less and keeps less. And it calls the backend that it is told, which diffusers' own ignores.

    Args:
        attention: The name of the ``backend``.

    Raises:
        ValueError: If there is no such backend.
    """

    def __init__(self, attention: str = "native") -> None:
        from diffusers.models.attention_dispatch import dispatch_attention_fn
        from diffusers.models.normalization import RMSNorm

        self._rms_norm: type[Any] = RMSNorm
        self._attend = partial(dispatch_attention_fn, backend=backend(attention))
        self._name = attention

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from image tokens, and from the text's if there are any, to all of them.

        Args:
            attn: The layer, a ``diffusers.models.attention_processor.Attention``.
            hidden_states: Image tokens ``[n, L, D]``.
            encoder_hidden_states: The text's tokens ``[n, M, D]``; None where a block attends to
                the image alone.

        Returns:
            The outputs for image tokens and, if there are any, for the text's.

        Raises:
            RuntimeError: If the backend's output has no gradient where one is needed.
        """
        tokens = hidden_states.shape[1]
        image = _cast(hidden_states)
        q, k, v = (_heads(attn, f(image)) for f in (attn.to_q, attn.to_k, attn.to_v))
        q, k = self._normed(attn.norm_q, q), self._normed(attn.norm_k, k)
        if encoder_hidden_states is not None:
            text = _cast(encoder_hidden_states)
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_q, text_k, text_v = (_heads(attn, f(text)) for f in projections)
            text_q = self._normed(attn.norm_added_q, text_q)
            text_k = self._normed(attn.norm_added_k, text_k)
            pairs = ((q, text_q), (k, text_k), (v, text_v))
            q, k, v = (torch.cat(pair, dim=1) for pair in pairs)
        found = self._attend(q, k, v)  # [n, L + M, heads, D / heads]
        if q.requires_grad and not found.requires_grad:
            raise RuntimeError(
                f"The attention backend {self._name!r} has no backward pass: choose another for "
                "`policy.attention`."
            )
        found = found.flatten(2).to(q.dtype)
        output: Tensor = attn.to_out[1](attn.to_out[0](found[:, :tokens]))
        if encoder_hidden_states is None:
            return output
        text = found[:, tokens:]
        return output, text if attn.context_pre_only else attn.to_add_out(text)

    def _normed(self, norm: Any, x: Tensor) -> Tensor:
        """Return x, normalised over its last axis if there is a norm."""
        if norm is None:
            return x
        if type(norm) is not self._rms_norm or norm.bias is not None:
            normed: Tensor = norm(x)
            return normed
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return functional.rms_norm(x, tuple(norm.dim), norm.weight, norm.eps)
        with torch.autocast(kind, enabled=False):  # it would cast x; the sums are float32 anyway
            return functional.rms_norm(x, tuple(norm.dim), norm.weight, norm.eps)


def _heads(attn: Any, x: Tensor) -> Tensor:
    """Return ``x [n, L, D]`` as ``[n, L, heads, D / heads]``."""
    return x.unflatten(-1, (attn.heads, -1))


def _cast(x: Tensor) -> Tensor:
    """Return x in the type that autocast computes products in."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
