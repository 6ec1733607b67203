"""Compiling a transformer block by block: ``policy.compile: blocks``.

Blocks of a kind share their graphs, so that compiling takes as long for 24 of them as for one.
What a compiled block calls must do without what is known at run time only: see ``LoraForward``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

# Graphs of a block: for each kind of block one with gradients, one without and one without the
# LoRA, each of them again where the number of samples differs. torch stops at 8.
GRAPHS = 64


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Have blocks compiled when they are called, each as a whole.

    ``torch.compiler.set_default_backend`` decides by what; it is inductor, which needs a C++
    compiler on a CPU and Triton on a GPU. Two of torch's settings are changed for the rest of the
    process: backward passes look at them too.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    # Objectives and KL go through a graph one after the other: its buffers stay its own.
    torch._functorch.config.donated_buffer = False
    for block in blocks:
        block.compile(fullgraph=True)
