"""The few collective operations that training needs, with one process and with many.

Gradients are summed here, once per optimizer step, rather than by DistributedDataParallel: only
LoRA gradients travel (megabytes), every loss is already divided by the *global* number of
decisions, and a step may run any number of backward passes. So one process with eight samples and
two with four each end in the same parameters.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
        """Gather ``[n, ...]``, of one shape on all ranks, to ``[N, ...]`` in rank order, on all."""
        ...

    def gather_objects(self, local: Sequence[Any]) -> list[Any]:
        """Return what every rank holds, any number each and JSON-like, in rank order."""
        ...

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over the ranks, in place."""
        ...

    def broadcast_(self, tensor: Tensor) -> None:
        """Replace the tensor by rank 0's, in place."""
        ...

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on at least one rank."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...

    def close(self) -> None:
        """Leave; nothing can be exchanged afterwards."""
        ...


def local_slice(values: S, comm: Comm) -> S:
    """Return this rank's contiguous share of a global tensor or tuple of length N.

    Raises:
        ValueError: If N is no multiple of the number of processes.
    """
    total = len(values)
    if total % comm.world_size:
        raise ValueError(
            f"The number of samples should be a multiple of the {comm.world_size} processes. "
            f"Found {total} samples."
        )
    share = total // comm.world_size
    return values[comm.rank * share : (comm.rank + 1) * share]


def shard(total: int, batch: int, comm: Comm) -> list[list[int]]:
    """Return which of ``total`` items each rank takes: whole batches, in turn.

    The same items share a batch whatever the number of ranks, and so the same rounding.

    Args:
        total: Number of items.
        batch: Items in a batch; the last one may be smaller.
        comm: The collectives over the processes.
    """
    starts = range(0, total, batch)
    return [
        [
            i
            for start in starts[rank :: comm.world_size]
            for i in range(total)[start : start + batch]
        ]
        for rank in range(comm.world_size)
    ]


def gather_shards(mine: Tensor, shards: Sequence[Sequence[int]], comm: Comm) -> Tensor:
    """Return rows of all ranks in the order of the items: ``[total, ...]`` on every rank.

    Args:
        mine: The rows ``[m, ...]`` of this rank's shard in its order; what follows is left out.
        shards: The items of every rank, together 0 .. total - 1.
        comm: The collectives over the processes.
    """
    share = max(len(items) for items in shards)
    padded = mine.new_zeros(share, *mine.shape[1:])
    count = len(shards[comm.rank])
    padded[:count] = mine[:count]
    gathered = comm.gather(padded)
    place = {
        item: rank * share + i for rank, items in enumerate(shards) for i, item in enumerate(items)
    }
    return gathered[[place[item] for item in range(len(place))]]


def gather_shard_objects(
    mine: Sequence[Any], shards: Sequence[Sequence[int]], comm: Comm
) -> list[Any]:
    """Do as ``gather_shards``, for Python objects.

    Args:
        mine: The objects of this rank's shard in its order; what follows is left out.
        shards: The items of every rank, together 0 .. total - 1.
        comm: The collectives over the processes.
    """
    gathered = comm.gather_objects(mine[: len(shards[comm.rank])])
    by_item = dict(zip([item for items in shards for item in items], gathered, strict=True))
    return [by_item[item] for item in range(len(by_item))]


class ProcessError(RuntimeError):
    """What made one process fail, raised on all of them.

    Args:
        message: Says which process failed, and why.
        kind: Class of the error that it failed with.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


@contextmanager
def agreed(comm: Comm, *, as_one: bool = False) -> Iterator[Callable[[], None]]:
    """Let what fails in the block on one process fail on all; none waits for one that is gone.

    Args:
        comm: Collectives over the processes, which all have to enter the block. Inside there is
            no other collective that a failure could leave out, but other such blocks and what this
            one is given: a function with which all processes find out half-way whether one has
            failed.
        as_one: Whether a process that failed raises ``ProcessError`` too, from its own error,
            so that whoever catches it knows that the others have it as well.

    Raises:
        ProcessError: On the processes that did not fail; on the others their own error.
    """
    try:
        yield lambda: _exchange(comm, None, as_one)
    except Exception as error:
        if _KNOWN in vars(error):  # from a block inside this one: all have left it with an error
            raise
        _exchange(comm, error, as_one)
    else:
        _exchange(comm, None, as_one)


def _exchange(comm: Comm, failure: Exception | None, as_one: bool) -> None:
    if not comm.any(failure is not None):
        return
    mine = None if failure is None else [type(failure).__name__, str(failure)]
    everyone = comm.gather_objects([[socket.gethostname(), mine]])
    rank, host, kind, text = next(
        (rank, host, *one) for rank, (host, one) in enumerate(everyone) if one is not None
    )
    elsewhere = f"Process {rank} (on {host}) ended with: {text or kind}"
    error = failure or ProcessError(elsewhere, kind)
    if failure is not None and as_one:
        error = ProcessError(str(failure), type(failure).__name__)
        error.__cause__ = failure
    messages = [(host, elsewhere if one is None else one[1] or one[0]) for host, one in everyone]
    vars(error)[_KNOWN] = _tells(messages, comm.rank)
    raise error


# Attribute of an error that all processes have met: whether this one is to tell of it.
_KNOWN = "_moa_diffusion_tells"


def share_telling(comm: Comm, error: BaseException) -> None:
    """Settle which processes tell of an error; all have to call this, with their own.

    Of one node the first that has the error tells of it, and only the first of all processes if
    it is the same everywhere.
    """
    everyone = comm.gather_objects([[socket.gethostname(), str(error) or type(error).__name__]])
    vars(error)[_KNOWN] = _tells([(host, text) for host, text in everyone], comm.rank)


def tells(error: BaseException) -> bool:
    """Return whether this process should report an error that others may not know of."""
    return bool(vars(error).get(_KNOWN, True))


def _tells(everyone: Sequence[tuple[str, str]], rank: int) -> bool:
    """Return whether no other process tells the same.

    Args:
        everyone: Host of each process, and its error's message.
        rank: The rank of the process in question.
    """
    host, mine = everyone[rank]
    if len({text for _, text in everyone}) == 1:
        return rank == 0
    near = [(other, text) for other, (there, text) in enumerate(everyone) if there == host]
    return not any(
        (text == mine and other < rank) or mine.endswith(f" ended with: {text}")
        for other, text in near
    )


class LocalComm:
    """One process: every collective is the identity."""

    rank = 0
    world_size = 1

    def gather(self, local: Tensor) -> Tensor:
        """Return the tensor as it is: no other process has rows."""
        return local

    def gather_objects(self, local: Sequence[Any]) -> list[Any]:
        """Return the objects of the only process as a list."""
        return list(local)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Leave the tensors as they are: a sum over one process."""

    def broadcast_(self, tensor: Tensor) -> None:
        """Leave the tensor as it is: it comes from this process."""

    def any(self, flag: bool) -> bool:
        """Return the flag of the only process."""
        return flag

    def barrier(self) -> None:
        """Go on at once: nobody else has to come."""

    def close(self) -> None:
        """Do nothing: no group of processes was opened."""


class AccelerateComm:
    """The processes that ``accelerate launch`` or ``torchrun`` started.

    Args:
        accelerator: Supplies rank, world size and the device whose backend carries the traffic.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank = accelerator.process_index
        self.world_size = accelerator.num_processes
        self._accelerator = accelerator
        self._device = accelerator.device

    def gather(self, local: Tensor) -> Tensor:
        """Gather on the accelerator; the result lies where ``local`` does."""
        if self.world_size == 1:
            return local
        gathered: Tensor = self._accelerator.gather(local.to(self._device).contiguous())
        return gathered.to(local.device)

    def gather_objects(self, local: Sequence[Any]) -> list[Any]:
        """Gather pickled objects, in the order of ranks."""
        if self.world_size == 1:
            return list(local)
        from accelerate.utils import gather_object

        gathered: list[Any] = gather_object(list(local))
        return gathered

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum several tensors in one collective, as one flat buffer."""
        if self.world_size == 1 or not tensors:
            return
        first = tensors[0]
        if len(tensors) == 1 and first.is_contiguous() and first.device == self._device:
            dist.all_reduce(first)  # a large buffer, perhaps: without a copy
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(self._device)
        dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def broadcast_(self, tensor: Tensor) -> None:
        """Send the tensor of rank 0 by way of the accelerator."""
        if self.world_size == 1:
            return
        carrier = tensor.to(self._device).contiguous()
        dist.broadcast(carrier, src=0)
        tensor.copy_(carrier)

    def any(self, flag: bool) -> bool:
        """Gather the flags as integers, and return whether any is set."""
        if self.world_size == 1:
            return flag
        count = torch.tensor([int(flag)], device=self._device)
        return bool(self.gather(count).any())

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Let the trackers finish writing and leave the process group."""
        self._accelerator.end_training()
