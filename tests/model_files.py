"""Files of a model's weights, in every format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.tensor([0.5, -1.0])}


def write(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name.endswith(".safetensors"):
            save_file(TENSORS, folder / name)
        elif name.endswith((".bin", ".pth")):
            torch.save(TENSORS, folder / name)
        else:
            (folder / name).write_text("{}")
    return folder


def write_shards(folder: Path, ending: str) -> list[str]:
    """TENSORS in two files and an index, as transformers writes them."""
    stem, suffix = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}[
        ending
    ]
    names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for name, key in zip(names, TENSORS, strict=True):
        part = {key: TENSORS[key]}
        if ending == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name)
    index = {"weight_map": dict(zip(TENSORS, names, strict=True))}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return names
