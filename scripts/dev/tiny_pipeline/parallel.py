"""Data-parallel training on the cores of one machine: one thread per process, gradients over gloo.

The matrices of a tiny model are too small to share among threads; two processes of one thread each
are nearly twice as fast as one process, where one process of two threads is not.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def context() -> multiprocessing.context.BaseContext:
    """Return the context that processes are started from.

    They are forks of one process that has imported the libraries once for all.
    """
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(
        [
            "torch",
            "diffusers.models.autoencoders.autoencoder_kl",
            "diffusers.models.transformers.transformer_sd3",
            "transformers.modeling_utils",
        ]
    )
    return made


def run(work: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Call ``work(rank, world, *arguments)`` in ``processes`` processes and wait for all of them.

    Args:
        work: A function of a module (it is pickled by name).
        processes: World size. With 1 there is still a fresh process, so results do not depend on
            what the caller did to torch.
        arguments: Passed on; they have to be picklable.
    """
    start_processes(
        _enter,
        (processes, _free_port(), work, arguments),
        nprocs=processes,
        start_method=context().get_start_method(),
    )


def _enter(
    rank: int, world: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        work(rank, world, *arguments)
        dist.barrier()  # nobody leaves while another still needs the store
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one message."""
    if dist.get_world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
