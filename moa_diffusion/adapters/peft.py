"""LoRA weights of language models, written as peft reads them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from moa_diffusion.adapters.diffusers import padded
from moa_diffusion.policies.adapters import Adapter, peft_config
from moa_diffusion.policies.lora_files import CONFIG, PEFT

_PREFIX = "base_model.model."


def copy_adapter(source: Path, folder: Path, *, base: str | None) -> None:
    """Write an adapter that peft wrote once more, naming its base model as given.

    Args:
        source: The model that holds the adapter.
        folder: An existing folder that it is written to.
        base: Hub id of the base model; None if it has none.
    """
    shutil.copy(source / PEFT, folder / PEFT)
    config = peft_config(source / CONFIG)
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))


def write_adapter(adapter: Adapter, folder: Path, model: Any, *, base: str | None) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, of one rank.

    Args:
        adapter: The adapter that is written.
        folder: An existing folder that it is written to.
        model: A ``skeleton`` of the base model.
        base: Hub id of the base model; None if it has none.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers.pytorch_utils import Conv1D

    tensors = {f"{_PREFIX}{name}": tensor for name, tensor in padded(adapter).items()}
    save_file(tensors, folder / PEFT, metadata={"format": "pt"})
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
