"""LoRA weights in a policy, and in a folder that diffusers reads.

One policy of the largest rank can carry adapters of any rank and scale in turn: rows of A and
columns of B that are zero change nothing. ``moa_diffusion.policies.adapters`` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from moa_diffusion.policies.adapters import Adapter


def carrier(adapters: Sequence[Adapter]) -> tuple[int, list[str]]:
    """Return rank and layers of a LoRA that can carry each of these in turn."""
    names = dict.fromkeys(name for adapter in adapters for name in adapter.layers)
    return max((adapter.rank for adapter in adapters), default=1), list(names)


@torch.no_grad()
def install(trainable: Mapping[str, nn.Parameter], adapter: Adapter) -> None:
    """Put an adapter into a policy's LoRA, in place.

    Args:
        trainable: Parameters of the LoRA "default", of at least the adapter's rank, with scale 1,
            on at least its layers.
        adapter: The adapter that it is to become.
    """
    for parameter in trainable.values():
        parameter.zero_()
    for name, (a, b) in adapter.layers.items():
        trainable[f"{name}.lora_A.default.weight"][: len(a)] = a
        trainable[f"{name}.lora_B.default.weight"][:, : len(a)] = b


def padded(adapter: Adapter) -> dict[str, Tensor]:
    """Return its tensors by peft's names, all of the largest rank of its layers."""
    rank, state = adapter.rank, {}
    for name, (a, b) in adapter.layers.items():
        more = rank - len(a)
        state[f"{name}.lora_A.weight"] = torch.cat([a, a.new_zeros(more, a.shape[1])])
        state[f"{name}.lora_B.weight"] = torch.cat([b, b.new_zeros(len(b), more)], dim=1)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write ``pytorch_lora_weights.safetensors``, of one rank, with alpha equal to it.

    So every loader draws the same image, also one that ignores the file's metadata.
    """
    from diffusers import StableDiffusion3Pipeline

    rank = adapter.rank
    metadata = {"r": rank, "lora_alpha": rank, "target_modules": sorted(adapter.layers)}
    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=padded(adapter),
        transformer_lora_adapter_metadata=metadata,
    )
