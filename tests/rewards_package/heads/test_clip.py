"""PickScore and CLIPScore on a small CLIP with random weights, against transformers itself."""

from __future__ import annotations

import json
import logging
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

import rewards.heads.clip
from rewards import RewardBatch, RewardError, create
from rewards.identity import Identity

SIDE = 32
TOKENIZER = Path(str(files("moa_diffusion"))) / "tiny" / "pipeline" / "tokenizer"  # 16 tokens
PROMPTS = ["a red circle", "a blue square on green", "a red circle", 'a sign that says "GO"']


def small_clip(folder: Path, *, hidden_act: str = "quick_gelu") -> Path:
    """A CLIP of transformers with random weights, as `save_pretrained` writes it."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": hidden_act,
    }
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={
            **tower,
            **ids,
            "pad_token_id": tokenizer.pad_token_id,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 16,
        },
        vision_config={**tower, "image_size": SIDE, "patch_size": 8},
        projection_dim=24,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
        for parameter in model.parameters():  # the usual start makes all embeddings alike
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


def add_processor(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    config = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(add_processor(small_clip(tmp_path_factory.mktemp("clip"))))


@pytest.fixture
def bare(folder, tmp_path) -> Path:
    """The model without tokenizer and preprocessing, as PickScore is published."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(folder) / name, bare)
    return bare


def identity(name: str, options: dict[str, str]) -> Identity:
    head = create(name, **options)
    head.load()
    return Identity.of(name, head, options)


def batch(prompts=PROMPTS, height: int = 40, width: int = 56) -> RewardBatch:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(len(prompts), 3, height, width, generator=generator)
    return RewardBatch(prompts=prompts, images=images)


def reference(folder: str, batch: RewardBatch) -> torch.Tensor:
    """exp(logit_scale) times the cosines, as transformers computes them."""
    model = CLIPModel.from_pretrained(folder)
    images = [Image.fromarray(array) for array in batch.arrays()]
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(folder)(
        list(batch.prompts), padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        return model(**pixels, **tokens).logits_per_image.diagonal()


def test_pickscore_is_the_diagonal_of_transformers_logits(folder):
    wanted = reference(folder, batch())
    assert wanted.std() > 1  # else a wrong pairing would pass
    for size in (1, 3, 16):
        found = create("pickscore", model=folder, batch_size=size)(batch())
        # 100 times cosines, which the passes of another batch round by 1e-8: 1.3e-6 apart; 8 eps of
        # vectors of length one.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_clipscore_is_the_cosine_from_the_same_module(folder):
    pick, clip = create("pickscore", model=folder), create("clipscore", model=folder)
    scale = load_file(Path(folder) / "model.safetensors")["logit_scale"].exp()
    # Cosines; to the bit but for a product and a division.
    torch.testing.assert_close(clip(batch()), pick(batch()) / scale, rtol=1e-6, atol=1e-6)
    assert pick._shared is clip._shared
    assert (pick.unit, clip.unit) == ("log odds of being picked", "cosine")


def test_half_precision_keeps_the_scale_exact(folder):
    whole, half = (
        create("pickscore", model=folder),
        create("pickscore", model=folder, dtype="bfloat16"),
    )
    # 100 times cosines, of vectors whose numbers bfloat16 rounds by 0.4 %: 0.06 apart.
    torch.testing.assert_close(half(batch()), whole(batch()), rtol=0.1, atol=1.0)
    assert half._shared.module.visual_projection.weight.dtype == torch.bfloat16
    assert torch.equal(half._shared.module.logit_scale, whole._shared.module.logit_scale)


def test_weights_are_read_once(folder, monkeypatch):
    reads = []
    monkeypatch.setattr(
        "safetensors.torch.load_file", lambda *a, **k: reads.append(1) or load_file(*a, **k)
    )
    head = create("pickscore", model=folder, dtype="float16")
    head.load()
    assert len(reads) == 1
    assert head._shared.module.logit_scale.dtype == torch.float32


def test_texts_are_embedded_once_and_the_oldest_are_forgotten(folder, monkeypatch):
    monkeypatch.setattr(rewards.heads.clip, "_MOST_TEXTS", 3)
    head = create("clipscore", model=folder)
    head.load()
    module, rows = head._shared.module, []
    embed = module.get_text_features

    def counting(input_ids, attention_mask):
        rows.append(len(input_ids))
        return embed(input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.setattr(module, "get_text_features", counting)
    first = head(batch())
    assert torch.equal(head(batch()), first)
    assert rows == [3]  # four prompts, one of them twice
    head(batch(["a lake"]))
    head(batch(PROMPTS[2:]))
    assert rows == [3, 1]  # still there; the square is the oldest and was forgotten
    head(batch(PROMPTS[1:2]))
    assert rows == [3, 1, 1]


def test_a_cut_of_quoted_text_is_warned_of_once(folder, caplog):
    long = "a red circle and a blue square and a green triangle on a white table that says"
    prompts = [f'{long} "STOP"', f'a sign "STOP" and {long}', long, f"{long} \u2018STOP\u2019"]
    head = create("pickscore", model=folder)
    with caplog.at_level(logging.WARNING, logger="rewards"):
        head(batch(prompts))
        head.close()
        head(batch(prompts))
    assert [record.name for record in caplog.records] == ["rewards.heads.prompt_tokens"] * 2
    first, second = (record.getMessage() for record in caplog.records)
    assert "\"pickscore\" reads 16 tokens and cuts the quoted text 'STOP' off" in first
    assert prompts[0] in first
    assert prompts[3] in second


def test_where_the_processor_comes_from(folder, bare, tmp_path, monkeypatch):
    other = add_processor(tmp_path / "other")
    config = {"size": SIDE, "crop_size": SIDE, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    (other / "preprocessor_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("rewards.heads.clip.PickScore.default_processor", str(other))

    own = create("pickscore", model=folder)
    named = create("pickscore", model=folder, processor=str(other))
    default = create("pickscore", model=str(bare))
    scores = [head(batch()) for head in (own, named, default)]
    assert torch.equal(scores[1], scores[2])
    assert (scores[0] - scores[1]).abs().max() > 0.01  # 4.4
    found = [head.provenance()["processor"] for head in (own, named, default)]
    assert found == [folder, str(other), str(other)]

    (other / "tokenizer.json").unlink()
    with pytest.raises(RewardError, match=r"lacks a tokenizer .*tokenizer\.json, or vocab\.json"):
        create("pickscore", model=str(bare)).load()
    with pytest.raises(ValueError, match="Parameter `processor` names a file or folder"):
        create("pickscore", model=str(bare), processor="./nowhere")


def test_another_preprocessing_is_another_scorer(folder, bare, tmp_path):
    own, other = shutil.copytree(folder, tmp_path / "own"), add_processor(tmp_path / "other")
    for place, options in ((own, {"model": str(own)}), (other, {"model": str(bare)})):
        options["processor"] = str(place)
        before = identity("clipscore", options)
        config = {"size": SIDE, "crop_size": SIDE, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        (place / "preprocessor_config.json").write_text(json.dumps(config))
        after = identity("clipscore", options)
        assert before.provenance["sha256"] == after.provenance["sha256"]
        assert before.digest != after.digest
        assert identity("clipscore", options) == after


def test_a_tokenizer_in_two_files_does_as_well(folder, tmp_path):
    model = json.loads((TOKENIZER / "tokenizer.json").read_text())["model"]
    old = add_processor(tmp_path / "old")
    (old / "tokenizer.json").unlink()
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (old / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    head = create("clipscore", model=folder, processor=str(old))
    assert torch.equal(head(batch()), create("clipscore", model=folder)(batch()))


def test_every_weight_must_be_there(folder, bare):
    file = bare / "model.safetensors"
    tensors = load_file(file)
    positions = {"text_model.embeddings.position_ids": torch.arange(16).view(1, 16)}
    save_file({**tensors, **positions}, file)  # as old versions of transformers wrote it
    head = create("clipscore", model=str(bare), processor=folder)
    assert head(batch()).isfinite().all()
    head.close()
    tensors["visual_projection.weight"] = torch.zeros(2, 2)
    tensors["extra"] = torch.zeros(1)
    del tensors["text_projection.weight"]
    save_file(tensors, file)
    with pytest.raises(RewardError) as caught:
        head.load()
    assert "missing: text_projection.weight" in caught.value.cause
    assert "unexpected: extra" in caught.value.cause
    assert "another shape: visual_projection.weight ([2, 2] instead of [24, 32])" in str(
        caught.value
    )


def test_loading_and_scoring_draw_no_random_numbers(folder):
    before = torch.get_rng_state()
    create("pickscore", model=folder)(batch())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_published_model_without_network_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RewardError, match="`hf download yuvalkirstain/PickScore_v1 --include"):
        create("pickscore").load()
    with pytest.raises(RewardError, match="`hf download openai/clip-vit-large-patch14 --include"):
        create("clipscore")(batch())


def test_prompts_that_are_cut_or_blank_are_counted_and_blank_ones_score_nan(folder):
    head = create("clipscore", model=folder)
    long = "a red circle " * 9
    assert head.remarks(PROMPTS) == []
    cut, blank = head.remarks([*PROMPTS, long, " "])
    assert cut.startswith("1 of 6 prompts have more than the 16 tokens that the model reads, up to")
    assert blank == "1 of 6 prompts are blank: they score NaN."
    found = head(batch(["a red circle", " ", "a red circle", ""]))
    assert found.isnan().tolist() == [False, True, False, True]
    # Cosines, of passes of another batch: 8 eps, as above.
    torch.testing.assert_close(found[0], head(batch())[0], rtol=1e-6, atol=1e-6)
    assert head(batch([""])).isnan().all()
