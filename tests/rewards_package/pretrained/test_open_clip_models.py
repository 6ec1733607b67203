"""Models of open_clip: which architectures will do, and that nothing of them is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from formula_weights import formula_weights
from safetensors.torch import load_file, save_file

from rewards import RewardError
from rewards.pretrained import open_clip_models
from rewards.pretrained.locate import find_weights
from rewards.pretrained.open_clip_models import (
    build_model,
    build_visual,
    check_architecture,
    image_size,
)

open_clip = pytest.importorskip("open_clip")

SIZES: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 6, "vocab_size": 12, "width": 16, "heads": 1, "layers": 1},
}


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(open_clip, "get_model_config", {"small": SIZES}.get)
    with torch.random.fork_rng():
        shapes = {name: tuple(t.shape) for name, t in open_clip.CLIP(**SIZES).state_dict().items()}
    save_file(formula_weights(shapes), tmp_path / "model.safetensors")
    return find_weights(str(tmp_path / "model.safetensors"), required=())


@pytest.mark.parametrize("name", ["ViT-L-14-quickgelu", "ViT-H-14", "RN50-quickgelu"])
def test_published_architectures_are_plain(name: str) -> None:
    check_architecture(name, needed_by="A test", reads_text=True)
    assert image_size(name) == 224


def test_the_name_says_which_activation() -> None:
    with torch.device("meta"):
        visual = open_clip.CLIP(**open_clip.get_model_config("ViT-L-14-quickgelu")).visual
    assert isinstance(visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    assert visual.proj.shape == (1024, 768)


@pytest.mark.parametrize("name", ["ViT-L-99", "coca_ViT-L-14"])
def test_others_are_told(name: str) -> None:
    with pytest.raises(ValueError, match=f"a plain CLIP model in open_clip .*'{name}'"):
        check_architecture(name, needed_by="A test", reads_text=False)


@pytest.mark.parametrize("name", ["ViT-H-14-CLIPA", "xlm-roberta-base-ViT-B-32", "nllb-clip-base"])
def test_another_text_encoder_is_told_where_it_is_used(name: str) -> None:
    check_architecture(name, needed_by="A test", reads_text=False)
    with pytest.raises(ValueError, match=f"own text encoder and tokenizer, .*'{name}'`, with"):
        check_architecture(name, needed_by="A test", reads_text=True)


@torch.no_grad()
@pytest.mark.parametrize("text", [{}, {"no_causal_mask": True}])
def test_it_computes_what_open_clips_own_loading_gives(
    weights: Any, monkeypatch: pytest.MonkeyPatch, text: dict[str, Any]
) -> None:
    sizes = SIZES | {"text_cfg": SIZES["text_cfg"] | text}
    monkeypatch.setattr(open_clip, "get_model_config", {"small": sizes}.get)
    with torch.random.fork_rng():
        wanted = open_clip.CLIP(**sizes).eval()
    wanted.load_state_dict(load_file(weights.folder / weights.files[0]))
    before = torch.get_rng_state()
    found = build_model("small", weights).eval()
    assert torch.equal(torch.get_rng_state(), before)
    token_ids = torch.tensor([[1, 3, 4, 11, 0, 0], [1, 2, 11, 0, 0, 0]])
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    assert torch.equal(found.encode_text(token_ids), wanted.encode_text(token_ids))
    assert torch.equal(found.encode_image(pixels), wanted.encode_image(pixels))
    assert torch.equal(build_visual("small", weights)(pixels), wanted.encode_image(pixels))


def test_a_buffer_that_no_file_has_is_told(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sketched = open_clip_models._sketch

    def sketch(architecture: str) -> Any:
        model = sketched(architecture)
        model.visual.register_buffer("angles", torch.empty(3, device="meta"), persistent=False)
        return model

    monkeypatch.setattr(open_clip_models, "_sketch", sketch)
    with pytest.raises(RewardError, match=r"buffers that its files lack: visual\.angles"):
        build_model("small", weights)
