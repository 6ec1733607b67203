"""What ``accelerate launch`` passes on: what is used, what is not, and what cannot work here.

Only the frozen model's LoRA is trained, and ``distributed.py`` sums its gradients; so there is no
optimizer or gradient that an engine could split over processes. The frozen model can be split
without one (``sharding.py``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, patch_environment

from moa_diffusion.types import ConfigError

# Each takes over the model, the optimizer or both, and promises memory that is not saved here.
_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
_PARALLEL = {  # axes of a parallelism configuration that would split the model
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "dp_shard_size",
    "PARALLELISM_CONFIG_TP_SIZE": "tp_size",
    "PARALLELISM_CONFIG_CP_SIZE": "cp_size",
    "PARALLELISM_CONFIG_SP_SIZE": "sp_size",
}
_PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "no": None}
# What Accelerator would act upon, with the value that has it do nothing.
_NEUTRAL = {
    **dict.fromkeys(_ENGINES, "false"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": "false",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_DYNAMO_BACKEND": "no",
}


def make_accelerator(tracker: str | None = None, folder: Path | None = None) -> Accelerator:
    """Set up the process group and device: every Accelerator of the project is made here.

    Of the launcher's other settings see ``check_launcher`` and ``unused``.

    Args:
        tracker: Name of the one that this Accelerator starts; none by default.
        folder: For a tracker that writes files.
    """
    # Sums of products in half precision stay float32: with the other reduction, what a matrix
    # product rounds to depends on how cuBLAS splits it, and so on the batch.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    present = {name: value for name, value in _NEUTRAL.items() if name in os.environ}
    with patch_environment(**present):
        return Accelerator(
            mixed_precision="no",
            log_with=tracker,
            project_config=ProjectConfiguration(
                logging_dir=None if folder is None else str(folder)
            ),
        )


def check_launcher(accelerator: Accelerator, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse what the launcher asks for and this program cannot do.

    Raises:
        ConfigError: Naming it, and how to start without it.
    """
    engines = [name for key, name in _ENGINES.items() if _is_true(environment, key)]
    if _is_true(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        engines += [
            f"{name} {environment[key]}"
            for key, name in _PARALLEL.items()
            if environment.get(key, "1") not in ("1", "")
        ]
    if accelerator.distributed_type == DistributedType.XLA:
        engines.append("TPU")
    started = int(environment.get("WORLD_SIZE", "1"))
    if started > 1 and accelerator.num_processes == 1:
        raise ConfigError(
            f"launcher: should start processes that find each other. Found {started} of which each "
            "takes itself for the only one. Without a GPU set ACCELERATE_USE_CPU=true, "
            "or start with `accelerate launch --cpu`; with GPUs start with `accelerate launch` or "
            "torchrun, which number the processes of a node (LOCAL_RANK)."
        )
    if engines:
        count = accelerator.num_processes
        raise ConfigError(
            f"launcher: should start plain processes. Found {', '.join(engines)} in the "
            "configuration of `accelerate launch`: only LoRA weights are trained here, whose "
            "gradients each process sums itself; `policy.shard: true` splits the frozen model over "
            "plain processes. Start with `accelerate launch --multi_gpu` and the "
            f"same options, or with `torchrun --nproc_per_node {count}`."
        )


def unused(dtype: str, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return what the launcher asks for that is not used, each with the setting that rules instead.

    Args:
        dtype: ``policy.dtype`` of the run.
        environment: The environment of this process.
    """
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    clipping = environment.get("ACCELERATE_GRADIENT_CLIPPING", "none").lower()
    messages = []
    if _PRECISIONS.get(precision, precision) not in (None, dtype):
        messages.append(f"mixed_precision {precision}: policy.dtype rules, which is {dtype}")
    if backend != "no":
        messages.append(f"dynamo_backend {backend}: nothing is compiled")
    if steps != "1":
        messages.append(
            f"gradient_accumulation_steps {steps}: trainer.updates and trainer.micro_batch rule"
        )
    if clipping != "none":
        messages.append(f"gradient_clipping {clipping}: optimizer.max_grad_norm rules")
    return messages


def _is_true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes")
