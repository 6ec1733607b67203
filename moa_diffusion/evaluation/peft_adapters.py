"""LoRA weights of language models: folders that peft reads and writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from moa_diffusion.evaluation.adapters import Adapter, fitted, padded, read_tensors
from moa_diffusion.evaluation.files import file_digest, json_digest
from moa_diffusion.policies.language_model import read_config
from moa_diffusion.types import ConfigError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_NAME = "read"  # of the adapter while peft interprets its configuration
_PREFIX = "base_model.model."
# Starts of A and B that leave the base model's weights as they are; the others change them.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# Options that make more of a layer, or of the model, than ``W + s B A``.
_FURTHER = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "target_parameters"),
    *("trainable_token_indices", "layer_replication", "alora_invocation_tokens"),
    *("arrow_config", "monteclora_config", "velora_config", "kasa_config"),
)


def skeleton(path: str, *, revision: str | None = None) -> Any:
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


def read_adapter(folder: Path, model: Any, base: str | None = None) -> Adapter:
    """Read a folder of LoRA weights as ``PeftModel.from_pretrained`` would.

    That it belongs to another base model is noticed by shapes and, where the folder names one, by
    the last part of the name.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: a ``skeleton`` of the base model, which peft fits the weights to; as it was
            afterwards.
        base: folder or hub id of the base model; None for no comparison of names.

    Raises:
        ConfigError: if a file is missing or damaged, is no plain LoRA, or does not fit the base
            model.
    """
    from peft import LoraModel

    config = _config(folder / CONFIG)
    config.init_lora_weights = False  # reading it draws nothing
    named = config.base_model_name_or_path
    if base is not None and named and Path(named).name != Path(base).name:
        raise ConfigError(
            f"LoRA weights `{folder}` should be of the base model {base!r}. Found those of "
            f"{named!r} ({CONFIG}); where that is another name of the same model, take it out."
        )
    path = folder / WEIGHTS
    state, _ = read_tensors(path, _PREFIX, of="model")
    try:
        with torch.device("meta"):
            tuner = LoraModel(model, {_NAME: config}, _NAME)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f"LoRA weights `{path}` do not fit the base model: {error}") from error
    try:
        layers = fitted(path, state, model, _NAME)
        scales = {name: model.get_submodule(name).scaling[_NAME] for name in layers}
    finally:
        tuner.unload()
    return Adapter(layers=layers, digest=json_digest([file_digest(path), scales]))


def _config(path: Path) -> Any:
    """peft's settings of a plain LoRA."""
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


def copy_adapter(source: Path, folder: Path, *, base: str | None) -> None:
    """Write an adapter that peft wrote once more, naming its base model as given.

    Args:
        source: holds it.
        folder: exists.
        base: hub id of the base model; None if it has none.
    """
    shutil.copy(source / WEIGHTS, folder / WEIGHTS)
    config = _config(source / CONFIG)
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))


def write_adapter(adapter: Adapter, folder: Path, model: Any, *, base: str | None) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, of one rank.

    Args:
        adapter: what is written.
        folder: exists.
        model: a ``skeleton`` of the base model.
        base: hub id of the base model; None if it has none.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers.pytorch_utils import Conv1D

    tensors = {f"{_PREFIX}{name}": tensor for name, tensor in padded(adapter).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.rank,
        target_modules=sorted(adapter.layers),
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(
            isinstance(model.get_submodule(name), Conv1D) for name in adapter.layers
        ),
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(str(folder))
