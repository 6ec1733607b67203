"""CLIP models of open_clip: found by the name of their architecture, built without drawing numbers.

Files of open_clip do not tell the architecture, so a head names it. Which activation it has is part
of the name: OpenAI's weights need one that ends in ``-quickgelu``.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from rewards.base import RewardError
from rewards.pretrained.locate import Weights
from rewards.pretrained.tensors import load_strictly

_PLAIN = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
_PLAIN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers"}


def package(needed_by: str) -> Any:
    """Return the module ``open_clip``.

    Args:
        needed_by: What needs it, the subject of the message.

    Raises:
        ImportError: If it is not installed.
    """
    if importlib.util.find_spec("open_clip") is None:
        raise ImportError(
            f"{needed_by} needs the package open_clip_torch. Install with: "
            f'pip install "moa-diffusion[open_clip]"'
        )
    import open_clip

    return open_clip


def check_architecture(architecture: str, *, needed_by: str, reads_text: bool) -> None:
    """Check that open_clip knows an architecture, and that it is a plain CLIP model.

    Args:
        architecture: Its name in open_clip.
        needed_by: See ``package``.
        reads_text: Whether its text encoder is used. That has to be CLIP's own then: others are
            masked and read otherwise, and their tokenizers are fetched from the hub.

    Raises:
        ImportError: If open_clip is not installed.
        ValueError: If there is no such architecture, or it is no plain CLIP.
    """
    config = package(needed_by).get_model_config(architecture)
    if config is None or not set(config) <= _PLAIN:
        raise ValueError(
            f"Parameter `architecture` should be the name of a plain CLIP model in open_clip "
            f"(`open_clip.list_models()`). Found `architecture = {architecture!r}`."
        )
    others = sorted(set(config["text_cfg"]) - _PLAIN_TEXT)
    if reads_text and others:
        raise ValueError(
            f"Parameter `architecture` should be the name of a model in open_clip that has CLIP's "
            f"own text encoder and tokenizer, such as ViT-H-14. "
            f"Found `architecture = {architecture!r}`, with {', '.join(others)}."
        )


def image_size(architecture: str) -> int:
    """Return the side of the square images that an architecture was made for, in pixels."""
    import open_clip

    return int(open_clip.get_model_config(architecture)["vision_cfg"]["image_size"])


def build_visual(architecture: str, weights: Weights) -> nn.Module:
    """Return the half of a model that reads images: ``[n, 3, S, S]`` to ``[n, D]``, on the CPU.

    Raises:
        RewardError: If the weights do not fit.
    """
    visual: nn.Module = _sketch(architecture).visual
    load_strictly(visual, weights, prefix="visual.")
    return visual


def build_model(architecture: str, weights: Weights, *, within: str = "") -> Any:
    """Return an ``open_clip.CLIP`` on the CPU, in the precision of its file.

    Args:
        architecture: Its name in open_clip.
        weights: Its file.
        within: See ``load_strictly``.

    Raises:
        RewardError: If the weights do not fit.
    """
    model = _sketch(architecture)
    load_strictly(model, weights, within=within)
    if model.attn_mask is not None:
        # The one buffer that no file has: what a token may look at, itself and those before it.
        length = model.context_length
        model.attn_mask = torch.full((length, length), -torch.inf).triu(1)
    homeless = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if homeless:
        raise RewardError(
            f"The architecture `{architecture}` of open_clip has buffers that its files lack: "
            f"{', '.join(homeless)}. Name a plain CLIP model."
        )
    return model


def _sketch(architecture: str) -> Any:
    """Return the model on the meta device, where it costs no memory and draws no numbers."""
    import open_clip

    with torch.device("meta"):
        return open_clip.CLIP(**open_clip.get_model_config(architecture))
