"""The few collective operations that training needs, with one process and with many.

Gradients are summed here, once per optimizer step, rather than by DistributedDataParallel: only
LoRA gradients travel (megabytes), every loss is already divided by the *global* number of
decisions, and a step may run any number of backward passes. So one process with eight samples and
two with four each end in the same parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

S = TypeVar("S", Tensor, tuple[Any, ...])


class Comm(Protocol):
    """Collectives over the processes of a run. Samples are laid out in rank order."""

    rank: int
    world_size: int

    def gather(self, local: Tensor) -> Tensor:
        """``[n, ...]`` on every rank (same shape) to ``[N, ...]`` in rank order, on all ranks."""
        ...

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over the ranks, in place."""
        ...

    def broadcast_(self, tensor: Tensor) -> None:
        """Replace the tensor by rank 0's, in place."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...

    def close(self) -> None:
        """Leave; nothing can be exchanged afterwards."""
        ...


def local_slice(values: S, comm: Comm) -> S:
    """This rank's contiguous share of a global tensor or tuple of length N.

    Raises:
        ValueError: if N is no multiple of the number of processes.
    """
    total = len(values)
    if total % comm.world_size:
        raise ValueError(
            f"The number of samples should be a multiple of the {comm.world_size} processes. "
            f"Found {total} samples."
        )
    share = total // comm.world_size
    return values[comm.rank * share : (comm.rank + 1) * share]


def in_turn(values: S, comm: Comm) -> S:
    """This rank's share of M items dealt out in turn; ``gather_in_turn`` is the way back."""
    return values[comm.rank :: comm.world_size]


def gather_in_turn(mine: Tensor, rows: int, comm: Comm) -> Tensor:
    """The first ``rows`` rows of every rank in the order they were dealt: ``[world rows, ...]``.

    Args:
        mine: ``[m, ...]``, this rank's; rows that a rank lacks are zero, and come last.
        rows: of the rank with most.
        comm: collectives over the processes.
    """
    padded = mine.new_zeros(rows, *mine.shape[1:])
    padded[: min(rows, len(mine))] = mine[:rows]
    return comm.gather(padded).unflatten(0, (-1, rows)).transpose(0, 1).flatten(0, 1)


class LocalComm:
    """One process: every collective is the identity."""

    rank = 0
    world_size = 1

    def gather(self, local: Tensor) -> Tensor:
        return local

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        pass

    def broadcast_(self, tensor: Tensor) -> None:
        pass

    def any(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass


class AccelerateComm:
    """The processes that ``accelerate launch`` or ``torchrun`` started.

    Args:
        accelerator: supplies rank, world size and the device whose backend carries the traffic.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank = accelerator.process_index
        self.world_size = accelerator.num_processes
        self._accelerator = accelerator
        self._device = accelerator.device

    def gather(self, local: Tensor) -> Tensor:
        if self.world_size == 1:
            return local
        gathered: Tensor = self._accelerator.gather(local.to(self._device).contiguous())
        return gathered.to(local.device)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(self._device)
        dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def broadcast_(self, tensor: Tensor) -> None:
        if self.world_size == 1:
            return
        carrier = tensor.to(self._device).contiguous()
        dist.broadcast(carrier, src=0)
        tensor.copy_(carrier)

    def any(self, flag: bool) -> bool:
        count = torch.tensor([int(flag)], device=self._device)
        return bool(self.gather(count).any())

    def barrier(self) -> None:
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Let the trackers finish writing and leave the process group."""
        self._accelerator.end_training()
