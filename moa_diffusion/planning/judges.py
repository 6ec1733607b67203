"""What the reward heads take of a GPU: their weights, and what scoring an image costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moa_diffusion.planning.counting import Counts
from moa_diffusion.planning.shapes import made_in, published
from moa_diffusion.scoring import RewardHead
from rewards.heads.aesthetic import Aesthetic
from rewards.heads.clip import ClipHead
from rewards.heads.deqa.head import DeqaHead
from rewards.pretrained.base import ModelHead
from rewards.pretrained.locate import find_weights
from rewards.serving.remote import RemoteHead

_ON_CPU = "runs on the CPU, whose time is not counted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """What a reward head takes of a GPU, or that it is not known."""

    name: str
    model: str = ""  # path and precision; equal for heads that share a module
    weights: int = 0  # bytes
    flops: float = 0.0  # per image
    moved: float = 0.0  # bytes that are read and written for an image, in full batches
    peak: float = 0.0  # bytes, at most, beside the weights
    dtype: str = "float32"
    note: str = ""  # what is not counted, and why; empty if all is
    partial: bool = False  # whether it takes more of a GPU than is counted here


def judge(head: RewardHead, *, on_cpu: bool = False) -> Judge:
    """Return what a head takes.

    Weights and operations are counted on the head's model without data, where its configuration is
    at hand: in a folder, or published. Heads of this project without a model run on the CPU.

    Args:
        head: The head.
        on_cpu: Whether its model runs on the CPU.
    """
    if not isinstance(head, ModelHead):
        if type(head).__module__.startswith("rewards.heads."):
            return Judge(name=head.name, note=_ON_CPU)
        if isinstance(head, RemoteHead):
            return Judge(name=head.name, note="asks a reward server, which is not counted")
        note = "unknown, not counted: it says nothing of its size"
        return Judge(name=head.name, note=note, partial=True)
    label = f"{head.model} in {str(head.dtype).removeprefix('torch.')}"
    if on_cpu:
        return Judge(name=head.name, note=_ON_CPU)
    size = published()["parameters"].get(head.model, 0) * head.dtype.itemsize
    if size:
        note = (
            "its weights are counted from their published size, its time and working memory are not"
        )
        return Judge(name=head.name, model=label, weights=size, note=note, partial=True)
    sizes = _sizes(head)
    clip = isinstance(head, ClipHead) or (
        isinstance(head, Aesthetic) and head.backbone == "transformers"
    )
    if sizes is None or not (clip or isinstance(head, DeqaHead)):
        note = f"unknown, not counted: no configuration of {label}"
        return Judge(name=head.name, note=note, partial=True)
    weights, counts = _counted(head, sizes)
    return Judge(
        name=head.name,
        model=label,
        weights=weights,
        flops=counts.flops / head.batch_size,
        moved=counts.moved / head.batch_size,
        peak=counts.peak,
        dtype=str(head.dtype).removeprefix("torch."),
    )


def _sizes(head: ModelHead) -> Mapping[str, Any] | None:
    """Return the configuration of the head's model, if it is published or a folder has it."""
    if head.model in published()["judges"]:
        sizes: Mapping[str, Any] = published()["judges"][head.model]
        return sizes
    if not Path(head.model).is_dir() and not head.model.startswith("package://"):
        return None
    folder = find_weights(head.model).folder
    read: Mapping[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return read


def _counted(head: ModelHead, sizes: Mapping[str, Any]) -> tuple[int, Counts]:
    """Return the bytes of a head's model, and the costs of a full batch."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import CLIPConfig, CLIPModel

    from rewards.heads.deqa.config import DeqaConfig
    from rewards.heads.deqa.model import Deqa

    with FakeTensorMode(), torch.no_grad():
        with made_in(head.dtype):
            if isinstance(head, DeqaHead):
                module: Any = Deqa(DeqaConfig.from_dict(sizes))
                _cast(module, head.dtype)
                side, read = module.config.vision.image_size, module
            else:
                module = CLIPModel(CLIPConfig(**sizes))
                side, read = module.config.vision_config.image_size, module.get_image_features
        state = [*module.parameters(), *module.buffers()]
        counts = Counts(state)
        with counts:
            read(torch.empty(head.batch_size, 3, side, side, dtype=head.dtype))
        return sum(tensor.nbytes for tensor in state), counts


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is made in another dtype than the default; ``to`` cannot replace fake tensors."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.detach().to(dtype)))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.to(dtype))
