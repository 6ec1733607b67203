"""The CLIP-IQA head against the authors' code, and what it asks of images and sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formula_weights import formula_weights
from safetensors.torch import load_file, save_file

from rewards import RewardBatch, RewardError, create

open_clip = pytest.importorskip("open_clip")

ARCHITECTURE = "moa-small-resnet-quickgelu"
SIZES: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
# What the authors' code at commit 061fd3c (mmedit/models/components/clip, position embedding off,
# torch 2.15.0) gives for these weights and images, which it is given in an order of its own.
PUBLISHED = {
    (64, 64, "Good photo.", "Bad photo."): [0.5196349, 0.5176792, 0.5141809],
    (64, 64, "Sharp photo.", "Blurry photo."): [0.1936332, 0.1998844, 0.2040794],
    (96, 160, "Good photo.", "Bad photo."): [0.5127631, 0.5196675, 0.5147704],
    (96, 160, "Sharp photo.", "Blurry photo."): [0.2186275, 0.2190003, 0.2161933],
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in open_clip's format, of an architecture that it is told of."""
    folder = tmp_path_factory.mktemp("clip_iqa")
    (folder / f"{ARCHITECTURE}.json").write_text(json.dumps(SIZES))
    open_clip.add_model_config(folder / f"{ARCHITECTURE}.json")
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in open_clip.CLIP(**SIZES).state_dict().items()}
    save_file(formula_weights(shapes), folder / "open_clip_model.safetensors")
    return folder / "open_clip_model.safetensors"


def head(file: Path, **options: Any) -> Any:
    options = {"architecture": ARCHITECTURE, "device": "cpu"} | options
    return create("clip_iqa", model=str(file), **options)


def images(height: int, width: int) -> torch.Tensor:
    """The images of `PUBLISHED`, drawn one size after the other: patches of 16 x 16 pixels."""
    rng = np.random.RandomState(7)
    for size in ((64, 64), (96, 160)):
        patches = rng.randint(0, 256, (3, 3, size[0] // 16, size[1] // 16))
        if size == (height, width):
            return torch.from_numpy(np.kron(patches, np.ones((16, 16)))).float() / 255
    raise AssertionError((height, width))


def batch(pixels: torch.Tensor) -> RewardBatch:
    return RewardBatch(prompts=["a fish"] * len(pixels), images=pixels)


@pytest.mark.parametrize(("height", "width", "good", "bad"), PUBLISHED)
@pytest.mark.parametrize("batch_size", [1, 16])
def test_scores_are_those_of_the_authors_code(file, height, width, good, bad, batch_size):
    before = torch.get_rng_state()
    found = head(file, good=good, bad=bad, batch_size=batch_size)(batch(images(height, width)))
    assert torch.equal(torch.get_rng_state(), before)
    # Probabilities from logits of up to 20, whose rounding in float32 is 2e-6: 3e-7 apart.
    expected = torch.tensor(PUBLISHED[height, width, good, bad])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


def test_two_questions_share_one_model_and_opposite_ones_add_up_to_one(file):
    good, bad = head(file), head(file, good="Bad photo.", bad="Good photo.")
    shown = batch(images(64, 64))
    # Two probabilities of one softmax, each rounded.
    torch.testing.assert_close(good(shown) + bad(shown), torch.ones(3), rtol=0, atol=1e-6)
    assert good._shared is bad._shared


def test_half_precision_is_close(file):
    shown = batch(images(64, 64))
    half = head(file, dtype="bfloat16")
    # Cosines are rounded by 0.004 of about 0.1, and the logit scale is 20: 0.008 apart.
    torch.testing.assert_close(half(shown), head(file)(shown), rtol=0, atol=0.02)


def test_provenance_names_architecture_and_question(file):
    made = head(file, good="Sharp.", bad="Blurry.")
    told = {"architecture": ARCHITECTURE, "good": "Sharp.", "bad": "Blurry."}
    assert made.provenance().items() >= told.items()
    made.load()
    assert made.provenance().items() >= told.items()
    assert len(made.provenance()["sha256"]) == 64


def test_small_images_are_told(file):
    with pytest.raises(RewardError, match=r"at least 32 pixels high and wide\. Found 24 x 64"):
        head(file)(batch(torch.zeros(1, 3, 24, 64)))


def test_wrong_weights_are_named(file, tmp_path):
    tensors = load_file(file)
    del tensors["visual.attnpool.k_proj.bias"]
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(RewardError, match=r"missing: visual\.attnpool\.k_proj\.bias"):
        head(tmp_path / "w.safetensors").load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "ViT-B-32"}, "should be that of a ResNet"),
        ({"architecture": "convnext_base"}, "should be that of a ResNet"),
        ({"architecture": "RN51"}, "name of a plain CLIP model"),
        ({"good": " "}, "Parameter `good` should be a sentence"),
        ({"good": "x", "bad": "x"}, "should be two sentences. Found 'x' twice"),
    ],
)
def test_wrong_options(file, options, message):
    with pytest.raises(ValueError, match=message):
        head(file, **options)


def test_the_default_is_known_to_open_clip():
    assert create("clip_iqa", device="cpu").architecture == "RN50-quickgelu"
