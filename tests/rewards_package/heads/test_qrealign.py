"""The Q-ReAlign head against a direct computation, on a small model of the published class."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_vlms import (
    QWEN_ANSWER,
    QWEN_TURNS,
    batch,
    change,
    qwen_ids,
    qwen_processor,
    random_images,
)
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from rewards import RewardError, create
from rewards.heads.levels import LEVELS

# The model's own turn begins behind a thought that is over.
TEMPLATE = QWEN_TURNS + QWEN_ANSWER.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")


def small_processor(words: tuple[str, ...] = LEVELS) -> Any:
    """A processor whose tokenizer makes one token of each of the words."""
    return qwen_processor([f"is {word}" for word in words], TEMPLATE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the hub has it: random weights, one tensor of another head among them."""
    folder = tmp_path_factory.mktemp("qrealign")
    processor = small_processor()
    processor.save_pretrained(folder)
    config = Qwen3_5Config(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,  # three of linear attention and one of full attention
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "initializer_range": 0.3,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "initializer_range": 0.3,
        },
        **qwen_ids(processor),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    # Qwen3.5's own weights hold a head for several tokens at once, which nothing here loads.
    change(folder, {"mtp.norm.weight": torch.ones(32)})
    return folder


@torch.no_grad()
def direct(folder: Path, image: Image.Image) -> torch.Tensor:
    """Shares of the levels as the authors' quick start computes them, one image at a time."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    question = "How would you rate the quality of this image?"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(
        text=[text + "The quality of the image is"], images=[image], return_tensors="pt"
    )
    words = ("excellent", "good", "fair", "poor", "bad")
    ids = [processor.tokenizer(f" {w}", add_special_tokens=False).input_ids[0] for w in words]
    return model(**inputs).logits[0, -1, ids].softmax(-1)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_the_head_scores_as_the_quick_start_does(folder, height, width):
    head = create("qrealign", model=str(folder), dtype="float32", device="cpu", batch_size=2)
    images = random_images(height, width)
    found = head.evaluate(batch(images))
    shares = torch.stack([direct(folder, image) for image in images])
    expected = shares @ torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    # Shares and scores, of 0 to 1: a few dozen products of float32 follow each other, in another
    # batch: 2.4e-7 apart; 80 eps.
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-5)
    assert found.values.max() - found.values.min() > 1e-3  # 0.007 and 0.015
    columns = torch.tensor([found.extra[level] for level in LEVELS])
    torch.testing.assert_close(columns.T, shares, rtol=0, atol=1e-5)


def test_the_published_precision_is_the_default(folder):
    head = create("qrealign", model=str(folder), device="cpu")
    exact = create("qrealign", model=str(folder), device="cpu", dtype="float32")
    images = batch(random_images(32, 32))
    # Scores in [0, 1]: some dozen roundings to bfloat16, whose eps is 0.008, walk by 0.0034.
    torch.testing.assert_close(head(images), exact(images), rtol=0, atol=0.02)
    assert head.provenance()["dtype"] == "bfloat16"


def broken(folder: Path, copy: Path) -> Any:
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    return create("qrealign", model=str(copy), device="cpu")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model.visual.merger.norm.weight": None}, "missing: model.visual.merger.norm.weight"),
        ({"model.mystery": torch.ones(2)}, "unexpected: model.mystery"),
    ],
)
def test_wrong_weights_are_named(folder, tmp_path, changes, complaint):
    head = broken(folder, tmp_path)
    change(tmp_path, changes)
    with pytest.raises(RewardError, match=f'Reward head "qrealign" failed.*{complaint}'):
        head.load()


@pytest.mark.parametrize("file", ["chat_template.jinja", "processor_config.json"])
def test_what_is_missing_beside_the_weights_is_told(folder, tmp_path, file):
    head = broken(folder, tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(RewardError, match=r"chat template in .* is missing or damaged .* anew"):
        head.load()


def test_a_folder_without_tokenizer_is_told(folder, tmp_path):
    head = broken(folder, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(RewardError, match=r"lacks `tokenizer\.json`"):
        head.load()


def test_a_tokenizer_that_splits_the_levels_alike_is_told(folder, tmp_path):
    head = broken(folder, tmp_path)
    small_processor(words=("unheard",)).save_pretrained(tmp_path)  # " " is the first token of all
    with pytest.raises(RewardError, match="does not tell excellent, good, fair, poor, bad apart"):
        head.load()


def test_an_old_transformers_is_told_when_the_head_is_built(monkeypatch):
    known = importlib.util.find_spec

    def without(name: str) -> Any:
        return None if name == "transformers.models.qwen3_5" else known(name)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ImportError, match=r'pip install --upgrade "transformers>=5\.2"'):
        create("qrealign", model="owner/name")
