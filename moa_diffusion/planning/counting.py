"""What a computation costs, counted operation by operation while it runs on tensors without data.

Sizes follow from shapes, so that nothing has to be computed: tensors of ``FakeTensorMode`` have
shapes, dtypes and storages, and no memory behind them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Counts(TorchDispatchMode):
    """Counts floating-point operations, bytes moved, and bytes of living tensors.

    Operations are those of ``torch.utils.flop_counter``, a product and a sum each. Every other
    operation is counted by the bytes that it reads and writes, as a kernel of its own would: so
    runs PyTorch without a compiler. Of tensors that share a storage, the storage is counted.

    Args:
        known: Tensors that were there before; their memory is not counted.

    Attributes:
        flops: Floating-point operations.
        moved: Bytes that were read and written.
        live: Bytes of the tensors that were made and are still held, by a graph for example.
        peak: The largest value of ``live`` so far.
        largest: Bytes of the largest tensor that was made.
        made: Number of the storages that were made.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.flops = self.moved = self.live = self.peak = self.largest = self.made = 0
        # Storages by their address, which is not given to another one while they live.
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.prim.device.default:  # fake tensors are asked all the time
            return args[0].fake_device
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        packet = function._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        before = self.made
        for tensor in made:
            self._add(tensor)
        if self.made > before or function._schema.is_mutable:
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.moved += sum(tensor.nbytes for tensor in [*made, *read])
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:  # a view, or changed in place
            return
        self._sizes[storage._cdata] = size = storage.nbytes()
        self.made, self.live = self.made + 1, self.live + size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, address: int) -> None:
        self.live -= self._sizes.pop(address, 0)
