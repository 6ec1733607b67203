"""A GPU that is not there: tensors that have shapes, types and a device, and no data.

An operation on two devices or two types raises as it would on a GPU, at the sizes that users have.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CARD, CPU = torch.device("cuda", 0), torch.device("cpu")
OWN = ("/moa_diffusion/", "/rewards/")
aten = torch.ops.aten


class HostReads(TorchDispatchMode):
    """Answers what the host asks of numbers that are not there, and keeps where it asked a card."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            self._asked(args[0])
            return True if args[0].dtype == torch.bool else 1
        if func is aten._to_copy.default and kwargs.get("device") == CPU:
            self._asked(args[0])
        return func(*args, **kwargs)

    def _asked(self, tensor: Tensor) -> None:
        if tensor.device.type == CARD.type:
            places = [f for f in traceback.extract_stack() if any(own in f.filename for own in OWN)]
            last = places[-1] if places else traceback.extract_stack()[0]
            self.waits.append(f"{last.filename.rpartition('/')[2]}: {last.line}")


@contextmanager
def pretended_card(*, real_inputs: bool = False) -> Iterator[HostReads]:
    """All tensors that are made within the block have no data.

    Args:
        real_inputs: Whether tensors with data may go into operations, and lose it there.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "_apply", moved)
        # Autocast and the loss scale ask whether there is a card.
        for module in (torch.amp.autocast_mode, torch.amp.grad_scaler, torch.cuda.amp.common):
            patch.setattr(module, "amp_definitely_not_available", lambda: False, raising=False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *given: True)
        with FakeTensorMode(allow_non_fake_inputs=real_inputs), HostReads() as reads:
            yield reads


class NumberedScheduler:
    """Noise levels as numbers: those of the library's scheduler are tensors with data."""

    config = FrozenDict({"num_train_timesteps": 1000})

    def set_timesteps(self, steps: int, **options: Any) -> None:
        times = np.linspace(1, 1 / steps, steps)
        self.sigmas = np.append(3 * times / (1 + 2 * times), 0.0)


def moved(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """``nn.Module._apply``, which cannot replace parameters without data in place."""
    for child in module.children():
        moved(child, fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            new = fn(parameter.detach())
            module._parameters[name] = nn.Parameter(new, requires_grad=parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module
