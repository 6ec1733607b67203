"""Every head that comes with the package, at full width on a GPU that is not there.

Images come from main memory, where Pillow resamples them. What follows runs on tensors that have
shapes, types and a device, and no data: an operation on two devices, or on two types, raises as it
would on a GPU. Two layers stand for all of a model, which are alike.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from card import CARD, CPU, HostReads, pretended_card
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from benchmarks import random_judges
from moa_diffusion import assembly, config, tiny
from moa_diffusion.planning.shapes import made_in
from rewards import RewardBatch, create
from rewards.heads import aesthetic, classifier, clip_iqa, hpsv2, imagereward
from rewards.pretrained.base import ModelHead
from rewards.registry import built_in

SAMPLES, SIDE = 2, 512
PROMPTS = ["a red circle", "a blue square"]
MODELS = (
    "pickscore",
    "clipscore",
    "aesthetic",
    "deqa",
    "classifier",
    "qrealign",
    "hpsv2",
    "clip_iqa",
    "vqascore",
    "imagereward",
)
PLAIN = ("colourfulness", "sharpness", "prompt_colour")
ON_THE_CPU = {  # by design, and why
    "ocr": "engines read arrays, in processes of their own",
    "jpeg_compressibility": "Pillow writes the files",
    "format": "counts characters",
    "keyword": "counts words",
    "length": "counts words",
    "repetition": "counts words",
    "remote": "sends files; the server's heads are those above",
}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostReads]:
    """Tensors that are made within a test have no data, except where files are read."""

    def resize(images: Tensor, height: int, width: int) -> Tensor:  # Pillow needs pixels
        assert (images.device, images.dtype) == (CPU, torch.uint8)
        return torch.empty(len(images), 3, height, width, dtype=torch.uint8)

    monkeypatch.setattr("rewards.pretrained.preprocessing.resize", resize)
    monkeypatch.setattr("rewards.heads.deqa.head.resize", resize)
    with pretended_card(real_inputs=True) as reads:
        yield reads


def batch() -> RewardBatch:
    """A batch as a policy hands it over: images in main memory."""
    with unset_fake_temporarily():
        images = torch.rand(SAMPLES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        return RewardBatch(prompts=PROMPTS, images=images)


def on_card(head: Any) -> Any:
    """The head with its model on the card; its files are read in main memory."""
    head.device, prepare = CARD, head._prepare

    def prepared(weights: Any) -> None:
        with unset_fake_temporarily():
            prepare(weights)

    head._prepare = prepared
    head.load()
    assert {parameter.device for parameter in head._loaded().module.parameters()} == {CARD}
    return head


def judge(folder: Path, name: str, **options: Any) -> ModelHead:
    """A head on a random model of two layers, of full width and with its real input size."""
    file = folder / "run.yaml"
    file.write_text(json.dumps({"rewards": {name: options}, "evaluation": {"every": 0}}))
    recipe = config.load(file, [])
    with unset_fake_temporarily():
        made, *_ = random_judges.judges(recipe, folder / "models", device="cpu", full=True)
    for path in (folder / "models").rglob("config.json"):
        path.write_text(json.dumps(shallow(json.loads(path.read_text()))))
    head = assembly.heads(dataclasses.replace(recipe, rewards={name: dict(made.options)}))[name]
    assert isinstance(head, ModelHead)
    return head


def shallow(sizes: Any) -> Any:
    if not isinstance(sizes, dict):
        return sizes
    return {
        key: 2 if key == "num_hidden_layers" else shallow(value) for key, value in sizes.items()
    }


def test_every_head_is_tested_here_or_has_no_part_on_a_card() -> None:
    assert set(built_in()) == {*MODELS, *PLAIN, *ON_THE_CPU}


@pytest.mark.parametrize(
    ("name", "dtype", "waits"),
    [
        # Of CLIP the embeddings of new prompts too; of PickScore the scale.
        ("pickscore", "float32", (3, 2)),
        ("clipscore", "float16", (2, 1)),
        ("aesthetic", "float16", (1, 1)),
        ("deqa", "float16", (1, 1)),
    ],
)
def test_images_are_scored_at_their_real_size(
    host: HostReads, tmp_path: Path, name: str, dtype: str, waits: tuple[int, int]
) -> None:
    head = on_card(judge(tmp_path, name, dtype=dtype))
    for count in waits:
        host.waits.clear()
        scores: Any = head.score(batch())
        assert (scores.values.shape, scores.values.device) == ((SAMPLES,), CPU)
        assert len(host.waits) == count, host.waits


def test_open_clip_scores_at_its_real_size(
    host: HostReads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_clip = pytest.importorskip("open_clip")

    def build(architecture: str, weights: Any) -> Any:
        sizes = open_clip.get_model_config(architecture)
        return open_clip.CLIP(**sizes | {"vision_cfg": sizes["vision_cfg"] | {"layers": 2}}).visual

    monkeypatch.setattr(aesthetic, "build_visual", build)
    files = judge(tmp_path, "aesthetic")
    options = {"predictor": files.predictor, "predictor_sha256": None}  # type: ignore[attr-defined]
    file = f"{files.model}/model.safetensors"
    head = create("aesthetic", model=file, backbone="open_clip", dtype="float16", **options)
    scores: Any = on_card(head).score(batch())
    assert scores.values.shape == (SAMPLES,)


@pytest.mark.parametrize(
    ("name", "module", "waits"),
    # The embeddings of images, and of new prompts; of the two sentences none is read back.
    [("hpsv2", hpsv2, (2, 1)), ("clip_iqa", clip_iqa, (1, 1))],
)
def test_whole_models_of_open_clip_score_at_their_real_size(
    host: HostReads,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    module: Any,
    waits: tuple[int, int],
) -> None:
    open_clip = pytest.importorskip("open_clip")

    def build(architecture: str, weights: Any, **options: Any) -> Any:
        sizes = open_clip.get_model_config(architecture)
        vision, text = ({**sizes[half]} for half in ("vision_cfg", "text_cfg"))
        if isinstance(vision["layers"], int):
            vision["layers"] = 2
        return open_clip.CLIP(**sizes | {"vision_cfg": vision, "text_cfg": text | {"layers": 2}})

    monkeypatch.setattr(module, "build_model", build)
    (tmp_path / "weights.pt").touch()
    head = on_card(create(name, model=str(tmp_path / "weights.pt"), dtype="float16"))
    for count in waits:
        host.waits.clear()
        scores: Any = head.score(batch())
        assert (scores.values.shape, scores.values.device) == ((SAMPLES,), CPU)
        assert len(host.waits) == count, host.waits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_are_classified_at_full_width(
    host: HostReads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """DistilBERT of 768 with two layers."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    folder = tmp_path / "model"
    shutil.copytree(tiny.TRAITS_PATH / "mood", folder)
    sizes = json.loads((folder / "config.json").read_text())
    sizes |= {"dim": 768, "hidden_dim": 3072, "n_heads": 12}
    (folder / "config.json").write_text(json.dumps(sizes))

    def build(weights: Any, kind: torch.dtype) -> Any:
        with made_in(kind):
            return DistilBertForSequenceClassification(DistilBertConfig(**sizes))

    monkeypatch.setattr(classifier, "build_classifier", build)
    made = create("classifier", model=str(folder), logit="POSITIVE", dtype=dtype, device="cpu")
    head = on_card(made)
    texts = RewardBatch(prompts=PROMPTS, texts=["is a good one", "is not"])
    host.waits.clear()
    assert head.score(texts).values.shape == (SAMPLES,)
    assert len([place for place in host.waits if "classifier.py" in place]) == 1, host.waits


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_imagereward_scores_at_full_width(
    host: HostReads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """ViT-L/16 and BERT with two layers each."""
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.initialization import no_init_weights

    layers = {"num_hidden_layers": 2}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    sizes = BlipTextConfig(num_attention_heads=12, encoder_hidden_size=1024, **layers)
    with unset_fake_temporarily():
        mlp = {"mlp.layers.0.weight": torch.ones(1, 768), "mlp.layers.0.bias": torch.ones(1)}
        torch.save(mlp, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps(sizes.to_dict()))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')

    def build(weights: Any) -> Any:
        # Random starts are drawn until they fit, which numbers that are not there never do.
        with made_in(getattr(torch, dtype)), no_init_weights():
            seen = BlipVisionConfig(image_size=224, patch_size=16, **vision, **layers)
            return imagereward.Blip(seen, sizes)

    monkeypatch.setattr(imagereward, "build_blip", build)
    file = str(tmp_path / "ImageReward.pt")
    options = {"tokenizer": str(tmp_path), "dtype": dtype, "device": "cpu"}
    head = on_card(create("imagereward", model=file, **options))
    host.waits.clear()
    scores: Any = head.score(batch())
    assert (scores.values.shape, scores.values.device) == ((SAMPLES,), CPU)
    assert len(host.waits) == 1, host.waits


@pytest.mark.parametrize(("name", "read"), [("qrealign", "_level_ids"), ("vqascore", "_tokens")])
def test_a_vision_language_model_is_handed_images_and_read_on_the_card(
    host: HostReads, tmp_path: Path, name: str, read: str
) -> None:
    """The model is left out, which reads sizes and tokens from its input: those have no data."""
    if importlib.util.find_spec("transformers.models.qwen3_5") is None:
        pytest.skip("transformers is older than 5.2")
    (tmp_path / "config.json").write_text("{}")
    head: Any = create(name, model=str(tmp_path), device="cpu")
    head.device, patches = CARD, (SIDE // 16) ** 2
    setattr(head, read, [0, 1, 2, 3, 4])

    def processed(*, text: list[str], images: list[Any], return_tensors: str) -> Any:
        from transformers import BatchFeature

        flat = [image[0] if isinstance(image, list) else image for image in images]
        assert {(image.device, image.shape) for image in flat} == {(CPU, (3, SIDE, SIDE))}
        tokens = torch.zeros(len(text), patches // 4 + 20, dtype=torch.long)
        pixels = torch.zeros(len(text) * patches, 1536)
        return BatchFeature({"input_ids": tokens, "pixel_values": pixels})

    class Model(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
            assert {tensor.device for tensor in tensors} == {CARD}
            count = len(inputs["input_ids"])
            logits = torch.empty(count, 1, 1000, dtype=torch.bfloat16, device=CARD)
            return SimpleNamespace(logits=logits)

    head._processor = Mock(side_effect=processed)
    head._processor.apply_chat_template.return_value = "Is it?"
    head._processor.tokenizer = Mock(bos_token=None)
    # Questions of two lengths are two passes, which are read back at once.
    head._processor.tokenizer.return_value.input_ids = [[0], [0, 0]]
    host.waits.clear()
    scores = head._score_batch(Model(), batch().uint8(), PROMPTS)
    assert (scores.values.shape, scores.values.device) == ((SAMPLES,), CPU)
    assert len(host.waits) == 1, host.waits


@pytest.mark.parametrize("name", PLAIN)
def test_images_may_lie_on_the_card(host: HostReads, name: str) -> None:
    """Heads without a model score where the images are."""
    samples = batch()
    object.__setattr__(samples, "images", samples.require_images().to(CARD))
    scores = create(name).score(samples)
    assert scores.shape == (SAMPLES,)


def test_planted_faults_are_seen(
    host: HostReads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixels that stay in main memory, pixels of another type, and a number read in between."""
    head: Any = on_card(judge(tmp_path, "deqa", dtype="float16"))
    samples, shared = batch(), head._loaded()
    monkeypatch.setattr(shared, "move", lambda device: None)
    with monkeypatch.context() as patch:
        patch.setattr(head, "device", CPU)
        with pytest.raises(RuntimeError, match=r"at least two devices|two different devices"):
            head.score(samples)
    with monkeypatch.context() as patch:
        patch.setattr(head, "dtype", torch.float32)
        with pytest.raises(RuntimeError, match="expected scalar type Float but found Half"):
            head.score(samples)
    whole = shared.module.forward
    host.waits.clear()
    with monkeypatch.context() as patch:
        patch.setattr(shared.module, "forward", lambda pixels: whole(pixels) * pixels.max().item())
        head.score(samples)
    assert len(host.waits) == 2, host.waits
