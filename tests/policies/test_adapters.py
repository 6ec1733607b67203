"""LoRA weights of other people: scales, names of older files, and what does not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moa_diffusion.policies.adapters import read_sd3_adapter, sd3_skeleton
from moa_diffusion.policies.lora_files import DIFFUSERS
from moa_diffusion.storage import checkpoint
from moa_diffusion.tiny import PIPELINE_PATH
from moa_diffusion.types import ConfigError


def test_scales_are_read_as_diffusers_reads_them(tmp_path: Path):
    """With alpha in the metadata and without, and in the names of older files."""
    transformer = sd3_skeleton(str(PIPELINE_PATH))
    name = "transformer_blocks.0.attn.to_q"
    width = transformer.get_submodule(name).in_features
    a, b = torch.randn(2, width), torch.randn(width, 2)
    state = {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    meta = {"r": 2, "lora_alpha": 6, "target_modules": [name]}
    packed = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in meta.items()})}
    old = {
        f"transformer.{name}.lora.down.weight": a,
        f"transformer.{name}.lora.up.weight": b,
    }
    for tensors, metadata, scale in ((state, packed, 3.0), (state, None, 1.0), (old, None, 1.0)):
        save_file(tensors, tmp_path / DIFFUSERS, metadata)
        found = read_sd3_adapter(tmp_path, transformer)
        assert list(found.layers) == [name]
        # At most one product in float32: 6e-8 of torch's 1.3e-6.
        torch.testing.assert_close(found.layers[name][1], scale * b)
        torch.testing.assert_close(found.layers[name][0], a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_encoder.x.lora_A.weight": (2, 4)}, "should be of the transformer alone"),
        ({"transformer.nowhere.lora_A.weight": (2, 4)}, "updates of the base model's linear"),
        (
            {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (2, 7)},
            "do not fit the base model",
        ),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": None}, "should be finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    two_runs: Path, tmp_path: Path, change: dict[str, tuple[int, int] | None], message: str
):
    state = load_file(checkpoint.step_folder(two_runs / "b", 1) / DIFFUSERS)
    for name, shape in change.items():
        state[name] = state[name] * math.nan if shape is None else torch.ones(shape)
    save_file(state, tmp_path / DIFFUSERS)
    with pytest.raises(ConfigError, match=message):
        read_sd3_adapter(tmp_path, sd3_skeleton(str(PIPELINE_PATH)))
