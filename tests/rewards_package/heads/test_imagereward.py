"""ImageReward on small weights, against scores of the authors' code on the same weights."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig

from rewards import RewardBatch, RewardError, create
from rewards.heads.imagereward import Blip

WIDTH, PATCH, SIDE, BLOCKS = 128, 8, 32, 2  # of the vision transformer: two heads, 16 patches
TEXT_WIDTH, INNER, PLACES, LAYERS = 96, 160, 40, 2
WORDS = "a red circle blue square and on the table that says stop sign ##s with green cat cafe"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", '"', ",", *WORDS.split()]
MED_CONFIG = {
    "add_cross_attention": True,
    "attention_probs_dropout_prob": 0.1,
    "encoder_width": 768,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": INNER,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": PLACES,
    "num_attention_heads": 3,
    "num_hidden_layers": LAYERS,
    "vocab_size": len(VOCABULARY) + 2,
}
LONG = " ".join(["a green cat and a red circle on the table"] * 4) + ' that says "STOP"'
PROMPTS = ["a red circle", "Caf\u00e9 sign, blue squares with a zebra", LONG]
# Scores by image size and prompt, of `ImageReward.score` in github.com/THUDM/ImageReward at commit
# c1392c6, with transformers 4.36.2 and timm 0.6.13, in float32.
PUBLISHED = {
    (40, 40): [-0.852706, 1.900371, 0.990616],
    (40, 59): [-4.979760, -4.566584, -3.240690],
    (59, 40): [-5.517107, -0.875903, 0.491109],
}


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of the published file, by name, at small sizes."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        found.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str, width: int) -> None:
        found.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    found[f"{vision}.cls_token"] = (1, 1, WIDTH)
    found[f"{vision}.pos_embed"] = (1, 1 + (SIDE // PATCH) ** 2, WIDTH)
    found[f"{vision}.patch_embed.proj.weight"] = (WIDTH, 3, PATCH, PATCH)
    found[f"{vision}.patch_embed.proj.bias"] = (WIDTH,)
    for block in (f"{vision}.blocks.{index}" for index in range(BLOCKS)):
        norm(f"{block}.norm1", WIDTH)
        linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        norm(f"{block}.norm2", WIDTH)
        linear(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH)
        linear(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
    norm(f"{vision}.norm", WIDTH)
    found[f"{text}.embeddings.word_embeddings.weight"] = (len(VOCABULARY) + 2, TEXT_WIDTH)
    found[f"{text}.embeddings.position_embeddings.weight"] = (PLACES, TEXT_WIDTH)
    norm(f"{text}.embeddings.LayerNorm", TEXT_WIDTH)
    for layer in (f"{text}.encoder.layer.{index}" for index in range(LAYERS)):
        for kind, inputs in (("attention", TEXT_WIDTH), ("crossattention", WIDTH)):
            linear(f"{layer}.{kind}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            linear(f"{layer}.{kind}.self.key", TEXT_WIDTH, inputs)
            linear(f"{layer}.{kind}.self.value", TEXT_WIDTH, inputs)
            linear(f"{layer}.{kind}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            norm(f"{layer}.{kind}.output.LayerNorm", TEXT_WIDTH)
        linear(f"{layer}.intermediate.dense", INNER, TEXT_WIDTH)
        linear(f"{layer}.output.dense", TEXT_WIDTH, INNER)
        norm(f"{layer}.output.LayerNorm", TEXT_WIDTH)
    linear("blip.vision_proj", 256, WIDTH)  # the published file has them, and no score needs them
    linear("blip.text_proj", 256, TEXT_WIDTH)
    for index, (inputs, outputs) in {
        0: (TEXT_WIDTH, 1024),
        2: (1024, 128),
        4: (128, 64),
        6: (64, 16),
        7: (16, 1),
    }.items():
        linear(f"mlp.layers.{index}", outputs, inputs)
    return found


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor that its name and shape decide, as the scores above were computed with."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "norm" in name.lower() and name.endswith("weight"):
        noise = 1 + 0.2 * noise
    elif len(shape) == 2 and name.endswith("weight") and "embed" not in name:
        noise *= 1.5 / np.sqrt(shape[1])
    elif name.startswith("blip.visual_encoder") and "block" not in name:
        noise *= 0.002  # so small that the epsilon of the norms shows: 1e-5 moves scores by 1
    else:
        noise *= 0.2
    return torch.from_numpy(noise).float()


def save(tensors: dict[str, Tensor], folder: Path) -> str:
    """The files of the published model, with these tensors."""
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    return str(folder / "ImageReward.pt")


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    constant = {"blip.text_encoder.embeddings.position_ids": torch.arange(PLACES).view(1, -1)}
    return constant | {name: value(name, shape) for name, shape in shapes().items()}


@pytest.fixture(scope="module")
def options(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The model's file, and a tokenizer in the files that BERT is published with."""
    folder = tmp_path_factory.mktemp("imagereward")
    tokenizer = folder / "bert"
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (tokenizer / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": True, "model_max_length": 512})
    )
    model = save(tensors, folder / "model")
    return {"model": model, "tokenizer": str(tokenizer), "device": "cpu"}


def image(height: int, width: int) -> Tensor:
    """Coloured rectangles ``[3, H, W]``, uint8, others for each size of those above."""
    seed = list(PUBLISHED).index((height, width))
    colours = np.random.RandomState(seed).randint(0, 256, (8, 12, 3)).astype(np.uint8)
    blocks = np.repeat(np.repeat(colours, 8, axis=0), 5, axis=1)  # [64, 60, 3]
    return torch.from_numpy(blocks[:height, :width]).permute(2, 0, 1)


def batch(prompts: list[str], size: tuple[int, int] = (40, 59)) -> RewardBatch:
    return RewardBatch(prompts=prompts, images=torch.stack([image(*size)] * len(prompts)) / 255)


@pytest.mark.parametrize("size", PUBLISHED)
def test_scores_are_those_of_the_authors_code(
    options: dict[str, Any], size: tuple[int, int]
) -> None:
    """Of a short prompt, of one with an accent, a comma and an unknown word, and of one cut."""
    found = create("imagereward", **options)(batch(PROMPTS, size))
    # Float32: 7e-6 apart; the authors' code in float64 is 1.7e-5 from theirs.
    torch.testing.assert_close(found, torch.tensor(PUBLISHED[size]), rtol=0, atol=1e-4)


def test_the_published_sizes_have_446_million_parameters() -> None:
    """ViT-L/16, BERT with cross attention in each layer, and the layers of the score."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    seen = BlipVisionConfig(**vision, num_attention_heads=16, image_size=224, patch_size=16)
    with torch.device("meta"):
        blip = Blip(seen, BlipTextConfig(num_attention_heads=12, encoder_hidden_size=1024))
    widths = (768, 1024, 128, 64, 16, 1)
    layers = sum((inputs + 1) * outputs for inputs, outputs in itertools.pairwise(widths))
    assert sum(part.numel() for part in blip.parameters()) + layers == 446_206_689


def test_scores_do_not_depend_on_the_batch_size(options: dict[str, Any]) -> None:
    whole = create("imagereward", **options)(batch(PROMPTS))
    for size in (1, 2):
        found = create("imagereward", **options, batch_size=size)(batch(PROMPTS))
        # Float32, as above: passes of another batch may round otherwise.
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-4)


def test_a_tokenizer_in_one_file_does_as_well(options: dict[str, Any], tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(options["tokenizer"]).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.txt").exists()
    found = create("imagereward", **options | {"tokenizer": str(tmp_path)})(batch(PROMPTS))
    assert torch.equal(found, create("imagereward", **options)(batch(PROMPTS)))


def test_blank_prompts_score_nan_and_cut_ones_are_counted(options: dict[str, Any]) -> None:
    head = create("imagereward", **options)
    assert head.remarks(PROMPTS[:2]) == []
    cut, blank = head.remarks([*PROMPTS, " "])
    assert cut.startswith(
        "1 of 4 prompts have more than the 35 tokens that the model reads, up to 47"
    )
    assert blank == "1 of 4 prompts are blank: they score NaN."
    found = head(batch([PROMPTS[0], " ", PROMPTS[1], ""]))
    assert found.isnan().tolist() == [False, True, False, True]
    # What follows after 35 tokens does not count.
    longer = head(batch([LONG, f"{LONG} and a blue square"]))
    torch.testing.assert_close(longer[0], longer[1], rtol=0, atol=1e-4)


def test_a_cut_of_quoted_text_is_warned_of_once(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    # Letters that the tokenizer writes otherwise, or not at all, are read all the same.
    read = [f'a sign that says "{text}" and {LONG[:-7]}' for text in ("Caf\u00e9", "\u0416", "GO")]
    head = create("imagereward", **options)
    with caplog.at_level(logging.WARNING, logger="rewards"):
        head(batch([LONG, *read, LONG]))
        head(batch([LONG]))
    (record,) = caplog.records
    assert "\"imagereward\" reads 35 tokens and cuts the quoted text 'STOP' off" in (
        record.getMessage()
    )


def test_what_the_scores_come_from(options: dict[str, Any]) -> None:
    head = create("imagereward", **options)
    assert head.provenance() == {"model": options["model"], "dtype": "float32"}
    head.load()
    found = head.provenance()
    assert (found["tokenizer"], found["tokenizer_revision"]) == (options["tokenizer"], "local")
    assert (found["revision"], len(found["sha256"])) == ("local", 64)
    assert len({found["files_sha256"], found["tokenizer_files_sha256"]}) == 2


def test_loading_and_scoring_draw_no_random_numbers(options: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    create("imagereward", **options)(batch(PROMPTS))
    assert torch.equal(torch.get_rng_state(), before)


VISION, TEXT = "blip.visual_encoder", "blip.text_encoder"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda all: all.pop(f"{VISION}.blocks.1.attn.proj.bias"),
            r"Tensors missing: blip\.visual_encoder\.blocks\.1\.attn\.proj\.bias\.",
        ),
        (
            lambda all: all.update({f"{VISION}.norm.weight": torch.ones(9)}),
            r"another shape: blip\.visual_encoder\.norm\.weight \(\[9\] instead of \[128\]\)",
        ),
        (
            lambda all: all.update({f"{VISION}.head.weight": torch.ones(9)}),
            r"unexpected: blip\.visual_encoder\.head\.weight",
        ),
        (
            lambda all: all.pop(f"{TEXT}.encoder.layer.1.crossattention.self.key.weight"),
            r"missing: blip\.text_encoder\.encoder\.layer\.1\.crossattention\.self\.key\.weight",
        ),
        (
            lambda all: all.pop(f"{VISION}.pos_embed"),
            r"lack the tensor `blip\.visual_encoder\.pos_embed`",
        ),
        (
            lambda all: all.update({f"{VISION}.pos_embed": torch.ones(1, 16, WIDTH)}),
            r"`blip\.visual_encoder\.pos_embed` .* \[1, n\^2 \+ 1, 64 h\].*Found \[1, 16, 128\]",
        ),
        (
            lambda all: all.update({f"{VISION}.pos_embed": torch.ones(1, 17, 100)}),
            r"Found \[1, 17, 100\]",
        ),
        (lambda all: all.pop("mlp.layers.4.bias"), r"should hold `mlp\.layers\.N\.weight`"),
        (
            lambda all: all.update({"mlp.layers.0.weight": torch.ones(1024, 9)}),
            r"should read 96 numbers, `hidden_size` in med_config\.json\. Found 9\.",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    options: dict[str, Any],
    tensors: dict[str, Tensor],
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], Any],
    message: str,
) -> None:
    damaged = dict(tensors)
    change(damaged)
    with pytest.raises(RewardError, match=message):
        create("imagereward", **options | {"model": save(damaged, tmp_path)}).load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"lacks `med_config\.json` in"),
        ("[]", r"med_config\.json should give vocab_size, .*Found TypeError"),
        ("{", r"med_config\.json should give .*Found JSONDecodeError"),
        ('{"vocab_size": 29}', r"should give .*Found KeyError: 'hidden_size'"),
        (
            json.dumps(MED_CONFIG | {"hidden_size": "96"}),
            r"should give .*Found StrictDataclass.*hidden_size",
        ),
    ],
)
def test_a_missing_or_damaged_med_config_is_told(
    options: dict[str, Any], tmp_path: Path, text: str | None, message: str
) -> None:
    model = shutil.copy(options["model"], tmp_path)
    if text is not None:
        (tmp_path / "med_config.json").write_text(text)
    with pytest.raises(RewardError, match=f"(?s){message}"):
        create("imagereward", **options | {"model": str(model)}).load()


def test_wrong_tokenizers(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Parameter `tokenizer` names a file or folder"):
        create("imagereward", **options | {"tokenizer": "./nowhere"})
    with pytest.raises(RewardError, match=r"lacks any of tokenizer\.json, .* in"):
        create("imagereward", **options | {"tokenizer": str(tmp_path)}).load()
    shutil.copytree(options["tokenizer"], tmp_path, dirs_exist_ok=True)
    with (tmp_path / "vocab.txt").open("a") as file:
        file.write("one\ntwo\nthree\n")
    with pytest.raises(RewardError, match=r"at most the 27 tokens .*\. Found 28\."):
        create("imagereward", **options | {"tokenizer": str(tmp_path)}).load()


def test_the_published_model_without_network_says_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RewardError) as caught:
        create("imagereward").load()
    assert (
        '`hf download zai-org/ImageReward --include "med_config.json" --include "ImageReward.pt"`'
        in caught.value.cause
    )
