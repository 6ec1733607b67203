"""The attention of SD3's blocks, with less work than diffusers does, and a choice of backend."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


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


def attend(transformer: nn.Module, attention: str) -> None:
    """Have every attention layer attend as ``JointAttention`` does.

    It is called directly: diffusers inspects a processor's signature in each call, to drop
    arguments that it does not know. There are none here, and that costs 3 % of a small model's
    forward pass.

    Raises:
        ValueError: If a layer has another processor than Stable Diffusion 3's own, or diffusers no
            such backend.
    """
    from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

    processor = JointAttention(attention)
    for module in transformer.modules():
        if isinstance(module, Attention):
            if type(module.processor) is not JointAttnProcessor2_0:
                raise ValueError(
                    "Parameter `pipeline` should have attention layers with a "
                    f"JointAttnProcessor2_0. Found {type(module.processor).__name__}."
                )
            module.forward = partial(processor, module)


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
