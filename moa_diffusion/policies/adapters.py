"""LoRA weights as updates of linear layers, read as diffusers and peft read them.

An adapter adds ``s B A`` to a layer's weight. Here s is multiplied into B, so that adapters of any
rank and scale are alike.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moa_diffusion.digests import file_digest, json_digest
from moa_diffusion.policies.language_model import read_config
from moa_diffusion.policies.lora_files import CONFIG, LoraFile, read_lora_file
from moa_diffusion.types import ConfigError

logger = logging.getLogger(__name__)

_NAME = "read"  # of the adapter while diffusers or peft interprets the file
_PREFIX = "transformer"  # of diffusers
_PEFT_PREFIX = "base_model.model."
# Starts of A and B that leave the base model's weights as they are; the others change them.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# Options that make more of a layer, or of the model, than ``W + s B A``.
_FURTHER = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "target_parameters"),
    *("trainable_token_indices", "layer_replication", "alora_invocation_tokens"),
    *("arrow_config", "monteclora_config", "velora_config", "kasa_config"),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """Updates ``B A`` by the name of the linear layer in the model."""

    layers: Mapping[str, tuple[Tensor, Tensor]]  # A [rank, in] and B [out, rank], float32, CPU
    digest: str  # SHA-256 of what is read, or of what a soup is made of

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(len(a) for a, _ in self.layers.values())


def sd3_skeleton(path: str, *, revision: str | None = None, config: Any = None) -> Any:
    """The transformer of a pipeline without its weights.

    Args:
        path: folder or hub id of a pipeline.
        revision: of a hub id.
        config: of the transformer, if it need not be read.
    """
    from diffusers import SD3Transformer2DModel

    if config is None:
        config = SD3Transformer2DModel.load_config(path, subfolder="transformer", revision=revision)
    with torch.device("meta"):
        return SD3Transformer2DModel.from_config(config)


def text_skeleton(path: str, *, revision: str | None = None) -> Any:
    """A causal language model without its weights.

    Args:
        path: folder or hub id.
        revision: of a hub id.

    Raises:
        ConfigError: if there is none.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(read_config(path, revision=revision))


def read_sd3_adapter(place: Path, transformer: Any) -> Adapter:
    """Read LoRA weights as ``StableDiffusion3Pipeline.load_lora_weights`` or peft would.

    Args:
        place: folder or file of LoRA weights; see ``lora_files``.
        transformer: an ``sd3_skeleton`` of the base model, which the weights are fitted to; as it
            was afterwards.

    Raises:
        ConfigError: if the file is missing, damaged or foreign, or does not fit the base model.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    file = read_lora_file(place, (f"{_PREFIX}.", _PEFT_PREFIX), of=_PREFIX)
    if file.config is not None:
        return _fit_peft(file, peft_config(file.config), transformer)
    path, state = file.path, dict(file.state)
    try:
        config = json.loads(file.metadata.get("lora_adapter_metadata", "null"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"LoRA weights `{path}` have damaged metadata: {error}") from error
    if not any(".lora_A." in name for name in state):
        state = convert_unet_state_dict_to_peft(state)
    _check_shapes(path, state, transformer)
    try:
        transformer.load_lora_adapter(
            {f"{_PREFIX}.{name}": tensor.to("meta") for name, tensor in state.items()},
            prefix=_PREFIX,
            adapter_name=_NAME,
            metadata=config,
            low_cpu_mem_usage=True,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        vars(transformer).pop("peft_config", None)  # diffusers leaves it, and peft would warn of it
        raise ConfigError(f"LoRA weights `{path}` do not fit the base model: {error}") from error
    try:
        layers = fitted(path, state, transformer, _NAME)
    finally:
        transformer.delete_adapters(_NAME)
    return Adapter(layers=layers, digest=file_digest(path))


def read_text_adapter(place: Path, model: Any, base: str | None = None) -> Adapter:
    """Read LoRA weights of a language model as ``PeftModel.from_pretrained`` would.

    That it belongs to another base model is noticed by shapes and, where the folder names one, by
    the last part of the name.

    Args:
        place: folder of ``adapter_config.json`` and ``adapter_model.safetensors``, or that file.
        model: a ``text_skeleton`` of the base model, which peft fits the weights to; as it was
            afterwards.
        base: folder or hub id of the base model; None for no comparison of names.

    Raises:
        ConfigError: if a file is missing, damaged or foreign, is no plain LoRA, or does not fit
            the base model.
    """
    folder = place.parent if place.is_file() else place
    if (folder / CONFIG).is_file():
        config = peft_config(folder / CONFIG)
        named = config.base_model_name_or_path
        if base is not None and named and Path(named).name != Path(base).name:
            raise ConfigError(
                f"LoRA weights `{folder}` should be of the base model {base!r}. Found those of "
                f"{named!r} ({CONFIG}); where that is another name of the same model, take it out."
            )
    file = read_lora_file(place, (_PEFT_PREFIX,), of="model")
    if file.config is None:
        raise ConfigError(
            f"LoRA weights `{file.path}` should be of a language model, as peft writes them. Found "
            f"`{next(iter(file.state))}` and no {CONFIG} beside it."
        )
    return _fit_peft(file, peft_config(file.config), model)


def _fit_peft(file: LoraFile, config: Any, model: Any) -> Adapter:
    from peft import LoraModel

    zero = config.init_lora_weights is not False  # the B of a layer that the file leaves out
    config.init_lora_weights = False  # reading it draws nothing
    try:
        with torch.device("meta"):
            tuner = LoraModel(model, {_NAME: config}, _NAME)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"LoRA weights `{file.path}` do not fit the base model: {error}"
        ) from error
    try:
        layers = fitted(file.path, file.state, model, _NAME, whole=not zero)
        scales = {name: model.get_submodule(name).scaling[_NAME] for name in layers}
    finally:
        tuner.unload()
    return Adapter(layers=layers, digest=json_digest([file_digest(file.path), scales]))


def peft_config(path: Path) -> Any:
    """peft's settings of a plain LoRA.

    Args:
        path: of ``adapter_config.json``.

    Raises:
        ConfigError: if it is missing or damaged, or of more than a plain LoRA.
    """
    from peft import LoraConfig, PeftConfig

    if not path.is_file():
        raise ConfigError(
            f"`{path.parent}` should be a folder that peft wrote. Found no {CONFIG} in it."
        )
    try:
        config = PeftConfig.from_pretrained(str(path.parent))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"`{path}` is damaged ({type(error).__name__}: {error}).") from error
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"`{path}` should be of a LoRA. Found peft_type {config.peft_type}.")
    further = [name for name in _FURTHER if vars(config).get(name)]
    if config.bias != "none":
        further.append("bias")
    if config.init_lora_weights not in _STARTS:
        further.append(f"init_lora_weights {config.init_lora_weights!r}")
    if further:
        raise ConfigError(
            f"`{path}` should be of a plain LoRA, which adds B A to linear layers alone. Found "
            f"{', '.join(further)}."
        )
    return config


def fitted(
    path: Path, state: Mapping[str, Tensor], model: Any, name: str, *, whole: bool = True
) -> dict[str, tuple[Tensor, Tensor]]:
    """The layers of an ``Adapter``, whose scales are those of the adapted model.

    Args:
        path: of the weights, for messages.
        state: all tensors of the adapter.
        model: carries the adapter, with any values.
        name: of the adapter.
        whole: whether every adapted layer should have tensors; else those without are left out, as
            their B is zero.

    Raises:
        ConfigError: if a layer lacks its tensors, their shapes do not fit, or more is left.
    """
    layers, left_out = {}, []
    for place, layer in _adapted(model).items():
        a, b = (state.get(f"{place}.lora_{part}.weight") for part in "AB")
        if a is None and b is None and not whole:
            left_out.append(place)
            continue
        shape = (layer.out_features, layer.in_features)
        if a is None or b is None or (len(b), a.shape[1]) != shape or len(a) != b.shape[1]:
            raise _misfit(path, place, shape, a, b)
        layers[place] = (a.float(), b.float() * layer.scaling[name])
    known = {f"{place}.lora_{part}.weight" for place in layers for part in "AB"}
    if unknown := sorted(state.keys() - known):
        raise ConfigError(
            f"LoRA weights `{path}` should be updates of the base model's linear layers. "
            f"Found `{unknown[0]}`{f' and {len(unknown) - 1} more' if unknown[1:] else ''}."
        )
    if left_out:
        logger.warning(
            "LoRA weights `%s` have none for %d of the %d layers that their configuration names, "
            "first %s: these stay as in the base model.",
            *(path, len(left_out), len(left_out) + len(layers), left_out[0]),
        )
    return layers


def _check_shapes(path: Path, state: Mapping[str, Tensor], model: nn.Module) -> None:
    """What diffusers would say at greater length."""
    modules = dict(model.named_modules())
    for name, b in state.items():
        place, part, _ = name.rpartition(".lora_B.")
        layer = modules.get(place)
        if not part or not isinstance(layer, nn.Linear):
            continue
        a, shape = state.get(f"{place}.lora_A.weight"), (layer.out_features, layer.in_features)
        if a is None or (len(b), a.shape[1]) != shape:
            raise _misfit(path, place, shape, a, b)


def _misfit(
    path: Path, place: str, shape: tuple[int, int], a: Tensor | None, b: Tensor | None
) -> ConfigError:
    other = ""
    if a is not None and b is not None and a.ndim == b.ndim == 2 and len(a) == b.shape[1]:
        other = f", of another base model, where it is {(len(b), a.shape[1])}"
    return ConfigError(
        f"LoRA weights `{path}` do not fit the base model: layer {place} is {shape}. "
        f"Found B {_shape(b)} and A {_shape(a)}{other}."
    )


def _adapted(model: Any) -> dict[str, Any]:
    """The adapted layers by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, BaseTunerLayer)}


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)
