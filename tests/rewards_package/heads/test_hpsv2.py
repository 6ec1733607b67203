"""The HPSv2 head against the authors' code, and what it does with images and long prompts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formula_weights import formula_weights

from rewards import RewardBatch, RewardError, create
from rewards.heads.hpsv2 import letterbox
from rewards.pretrained.preprocessing import CLIP_MEAN, CLIP_STD

open_clip = pytest.importorskip("open_clip")

ARCHITECTURE = "moa-small-preference"
SIZES: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PROMPTS = ["a red fox", 'a sign that says "OPEN" in the rain, photo', "word " * 100]
# What the authors' code at commit 866735e (hpsv2/src/open_clip, torch 2.15.0, torchvision 0.29.2)
# gives for these weights, prompts and images, which are drawn one size after the other.
PUBLISHED = {
    (32, 32): [-0.1086439, -0.2416259, -0.1202834],
    (64, 64): [-0.0997436, -0.2316566, -0.1091387],
    (48, 80): [-0.1367444, -0.1556706, -0.1260932],
    (80, 48): [-0.1507080, -0.1537766, -0.0768593],
    (20, 31): [-0.0709839, -0.0591335, -0.1291020],
}


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("architecture")
    (folder / f"{ARCHITECTURE}.json").write_text(json.dumps(SIZES))
    open_clip.add_model_config(folder / f"{ARCHITECTURE}.json")
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in open_clip.CLIP(**SIZES).state_dict().items()}
    return formula_weights(shapes)


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the authors publish it."""
    file = tmp_path_factory.mktemp("hpsv2") / "HPS.pt"
    torch.save({"epoch": 3, "state_dict": tensors}, file)
    return file


def head(file: Path, **options: Any) -> Any:
    options = {"architecture": ARCHITECTURE, "device": "cpu"} | options
    return create("hpsv2", model=str(file), **options)


def images(height: int, width: int) -> torch.Tensor:
    rng = np.random.RandomState(8)
    for size in PUBLISHED:
        drawn = rng.randint(0, 256, (3, *size, 3)).astype(np.uint8)
        if size == (height, width):
            return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()
    raise AssertionError((height, width))


def batch(height: int = 64, width: int = 64) -> RewardBatch:
    return RewardBatch(prompts=PROMPTS, images=images(height, width).float() / 255)


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("batch_size", [2, 16])
def test_scores_are_those_of_the_authors_code(file, size, batch_size):
    before = torch.get_rng_state()
    found = head(file, batch_size=batch_size)(batch(*size))
    assert torch.equal(torch.get_rng_state(), before)
    # Cosines in float32, of two towers of two layers: 3e-7 apart; 8 eps.
    torch.testing.assert_close(found, torch.tensor(PUBLISHED[size]), rtol=0, atol=1e-6)


def test_an_image_of_the_models_length_is_padded_and_not_resampled():
    square = letterbox(images(20, 31)[:, :, :16], 31)
    black = letterbox(torch.zeros(3, 3, 31, 31, dtype=torch.uint8), 31)
    # Of 15 rows 7 are above.
    assert torch.equal(square[:, :, :7], black[:, :, :7])
    assert torch.equal(square[:, :, 23:], black[:, :, 23:])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    within = square[:, :, 7:23] * std + mean
    # Normalised and back in float32.
    torch.testing.assert_close(within * 255, images(20, 31)[:, :, :16].float(), rtol=0, atol=1e-4)


def test_cut_and_blank_prompts_are_told(file, caplog):
    long = "word " * 80 + 'with "OPEN"'
    made = head(file)
    cut, blank = made.remarks([*PROMPTS, long, " "])
    assert "2 of 5 prompts have more than the 77 tokens" in cut
    assert "1 of 5 prompts are blank" in blank
    with caplog.at_level(logging.WARNING):
        scores = made(RewardBatch(prompts=["a", long, " "], images=batch().images))
    assert scores.isnan().tolist() == [False, False, True]
    assert "cuts the quoted text 'OPEN' off" in caplog.text


def test_bfloat16_is_close(file):
    # Cosines of about 0.1 from embeddings that are rounded by 0.004 in four layers: 0.003 apart.
    half = head(file, dtype="bfloat16")(batch())
    torch.testing.assert_close(half, head(file)(batch()), rtol=0, atol=0.01)


def test_provenance_names_the_architecture(file):
    made = head(file)
    made.load()
    assert made.provenance()["architecture"] == ARCHITECTURE
    assert len(made.provenance()["sha256"]) == 64


def test_wrong_weights_are_named(file, tensors, tmp_path):
    torch.save(tensors, tmp_path / "flat.pt")
    with pytest.raises(RewardError, match="should hold tensors by name under `state_dict`"):
        head(tmp_path / "flat.pt").load()
    fewer = {name: tensor for name, tensor in tensors.items() if name != "text_projection"}
    torch.save({"state_dict": fewer}, tmp_path / "fewer.pt")
    with pytest.raises(RewardError, match="missing: text_projection"):
        head(tmp_path / "fewer.pt").load()


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("ViT-H-15", "name of a plain CLIP model .* Found `architecture = 'ViT-H-15'`"),
        ("ViT-H-14-CLIPA", "own text encoder and tokenizer.*'ViT-H-14-CLIPA'`, with .*causal_mask"),
        ("roberta-ViT-B-32", "own text encoder and tokenizer.*'roberta-ViT-B-32'`, with hf_model"),
    ],
)
def test_other_architectures_are_refused(file, architecture, message):
    with pytest.raises(ValueError, match=message):
        head(file, architecture=architecture)


def test_the_default_is_known_to_open_clip():
    assert create("hpsv2", device="cpu").architecture == "ViT-H-14"
