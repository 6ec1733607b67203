"""LoRA weights as updates of linear layers: read diffusers folders, put them into a policy.

An adapter adds ``s B A`` to a layer's weight. Here s is multiplied into B, so that adapters of any
rank and scale are alike, and one policy of the largest rank can carry each in turn: rows of A and
columns of B that are zero change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moa_diffusion.evaluation.files import file_digest
from moa_diffusion.types import ConfigError

WEIGHTS = "pytorch_lora_weights.safetensors"
_NAME = "read"  # of the adapter while diffusers interprets the file
_PREFIX = "transformer"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """Updates ``B A`` by the name of the linear layer in the model."""

    layers: Mapping[str, tuple[Tensor, Tensor]]  # A [rank, in] and B [out, rank], float32, CPU
    digest: str  # SHA-256 of what is read, or of what a soup is made of

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(len(a) for a, _ in self.layers.values())


def skeleton(path: str, *, revision: str | None = None) -> Any:
    """The transformer of a pipeline without its weights.

    Args:
        path: folder or hub id of a pipeline.
        revision: of a hub id.
    """
    from diffusers import SD3Transformer2DModel

    config = SD3Transformer2DModel.load_config(path, subfolder="transformer", revision=revision)
    with torch.device("meta"):
        return SD3Transformer2DModel.from_config(config)


def read_adapter(folder: Path, transformer: Any) -> Adapter:
    """Read a folder of LoRA weights as ``StableDiffusion3Pipeline.load_lora_weights`` would.

    Args:
        folder: holds ``pytorch_lora_weights.safetensors``.
        transformer: a ``skeleton`` of the base model, which diffusers fits the weights to; as it
            was afterwards.

    Raises:
        ConfigError: if the file is missing or damaged, or does not fit the base model.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    path = folder / WEIGHTS
    state, metadata = read_tensors(path, f"{_PREFIX}.", of=_PREFIX)
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "null"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"LoRA weights `{path}` have damaged metadata: {error}") from error
    if not any(".lora_A." in name for name in state):
        state = convert_unet_state_dict_to_peft(state)
    try:
        transformer.load_lora_adapter(
            {f"{_PREFIX}.{name}": tensor.to("meta") for name, tensor in state.items()},
            prefix=_PREFIX,
            adapter_name=_NAME,
            metadata=config,
            low_cpu_mem_usage=True,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f"LoRA weights `{path}` do not fit the base model: {error}") from error
    layers = fitted(path, state, transformer, _NAME)
    transformer.delete_adapters(_NAME)
    return Adapter(layers=layers, digest=file_digest(path))


def read_tensors(path: Path, prefix: str, *, of: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An adapter's tensors by name without the prefix, and the file's metadata.

    Args:
        path: a safetensors file.
        prefix: that all names in it have.
        of: what has such names, for messages.

    Raises:
        ConfigError: if the file is missing or damaged, or is no adapter of one model.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ConfigError(f"LoRA weights `{path}` do not exist.")
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"LoRA weights `{path}` are damaged: {error}") from error
    others = [name for name in state if not name.startswith(prefix)]
    if others or not state:
        raise ConfigError(
            f"LoRA weights `{path}` should be of the {of} alone, `{prefix} ...`. "
            f"Found {f'`{others[0]}`' if others else 'no tensors'}."
        )
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise ConfigError(f"LoRA weights `{path}` should be finite. Found NaN in `{name}`.")
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}, metadata


def fitted(
    path: Path, state: Mapping[str, Tensor], model: Any, name: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """The layers of an ``Adapter``, whose scales are those of the adapted model.

    Args:
        path: of the weights, for messages.
        state: all tensors of the adapter.
        model: carries the adapter, with any values.
        name: of the adapter.

    Raises:
        ConfigError: if a layer lacks its tensors, their shapes do not fit, or more is left.
    """
    layers = {}
    for place, layer in _adapted(model).items():
        a, b = (state.get(f"{place}.lora_{part}.weight") for part in "AB")
        shape = (layer.out_features, layer.in_features)
        if a is None or b is None or (len(b), a.shape[1]) != shape or len(a) != b.shape[1]:
            raise ConfigError(
                f"LoRA weights `{path}` do not fit the base model: layer {place} is {shape}. "
                f"Found B {_shape(b)} and A {_shape(a)}."
            )
        layers[place] = (a.float(), b.float() * layer.scaling[name])
    known = {f"{place}.lora_{part}.weight" for place in layers for part in "AB"}
    if unknown := sorted(state.keys() - known):
        raise ConfigError(
            f"LoRA weights `{path}` should be updates of the base model's linear layers. "
            f"Found `{unknown[0]}`{f' and {len(unknown) - 1} more' if unknown[1:] else ''}."
        )
    return layers


def _adapted(transformer: Any) -> dict[str, Any]:
    """The adapted layers by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = transformer.named_modules()
    return {name: module for name, module in modules if isinstance(module, BaseTunerLayer)}


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def carrier(adapters: Sequence[Adapter]) -> tuple[int, list[str]]:
    """Rank and layers of a LoRA that can carry each of these in turn."""
    names = dict.fromkeys(name for adapter in adapters for name in adapter.layers)
    return max((adapter.rank for adapter in adapters), default=1), list(names)


@torch.no_grad()
def install(trainable: Mapping[str, nn.Parameter], adapter: Adapter) -> None:
    """Put an adapter into a policy's LoRA, in place.

    Args:
        trainable: parameters of the LoRA "default", of at least the adapter's rank, with scale 1,
            on at least its layers.
        adapter: what it is to be.
    """
    for parameter in trainable.values():
        parameter.zero_()
    for name, (a, b) in adapter.layers.items():
        trainable[f"{name}.lora_A.default.weight"][: len(a)] = a
        trainable[f"{name}.lora_B.default.weight"][:, : len(a)] = b


def padded(adapter: Adapter) -> dict[str, Tensor]:
    """Its tensors by the names that peft gives them, all of the largest rank of its layers."""
    rank, state = adapter.rank, {}
    for name, (a, b) in adapter.layers.items():
        more = rank - len(a)
        state[f"{name}.lora_A.weight"] = torch.cat([a, a.new_zeros(more, a.shape[1])])
        state[f"{name}.lora_B.weight"] = torch.cat([b, b.new_zeros(len(b), more)], dim=1)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write ``pytorch_lora_weights.safetensors``, of one rank, with alpha equal to it.

    So every loader draws the same picture, also one that ignores the file's metadata.
    """
    from diffusers import StableDiffusion3Pipeline

    rank = adapter.rank
    metadata = {"r": rank, "lora_alpha": rank, "target_modules": sorted(adapter.layers)}
    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=padded(adapter),
        transformer_lora_adapter_metadata=metadata,
    )
