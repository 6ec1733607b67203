"""Splitting a frozen model over the processes of a run (FSDP2), so that each keeps a part of it.

What is trained, the LoRA, stays whole on every process: its gradients are summed as without a
split, and optimizer, checkpoints and averages know nothing of it. Every forward pass of the model
is then a collective operation, and so is every backward pass: all processes have to make as many.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def shard_frozen(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Split the parameters that need no gradient over the processes; the others stay whole.

    Block by block, the split parts move to the device, and a forward or backward pass gathers one
    block at a time. What lies outside the blocks is gathered at the first pass and kept.

    Args:
        model: Changed in place. It should be on the CPU: the whole of it need never be on the
            device.
        blocks: The submodules that are gathered one by one; they make up most of the model.
        device: Where this process computes.

    Raises:
        RuntimeError: If the processes do not form a group, as without a launcher.
    """
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise RuntimeError("A model can be split over the processes of a group only. Found none.")
    mesh = _mesh(device)
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh, ignored_params=trained)
    model.to(device)  # what is trained, and buffers


def _mesh(device: torch.device, environment: Mapping[str, str] = os.environ) -> DeviceMesh:
    """Return the processes that share a model: those of a node, whose links are the fast ones.

    Nodes with one process each share it among them all.
    """
    world = dist.get_world_size()
    local = int(environment.get("LOCAL_WORLD_SIZE", world))
    if local in (1, world) or world % local:
        return init_device_mesh(device.type, (world,))
    names = ("nodes", "shards")
    return init_device_mesh(device.type, (world // local, local), mesh_dim_names=names)
