"""The aesthetic head: the layers multiplied out, and both backbones on the same random weights."""

from __future__ import annotations

import builtins
import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

from rewards import RewardBatch, RewardError, create
from rewards.heads.aesthetic import read_affine
from rewards.pretrained.locate import find_weights
from rewards.pretrained.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing

SIDE, WIDTH, LAYERS, EMBEDDING = 32, 48, 2, 24
HEADS = WIDTH // 16
ARCHITECTURE = "moa-small-quickgelu"
has_open_clip = pytest.mark.skipif(
    importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed"
)


def layers(*widths: int, dropout: bool = True) -> nn.Sequential:
    """Linear layers as in the published head, with dropout between them but the last two."""
    modules: list[nn.Module] = []
    pairs = list(itertools.pairwise(widths))
    for index, (before, after) in enumerate(pairs):
        modules.append(nn.Linear(before, after))
        if dropout and index < len(pairs) - 2:
            modules.append(nn.Dropout(0.2))
    with torch.random.fork_rng():
        torch.manual_seed(len(widths))
        for module in modules:
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return nn.Sequential(*modules).eval()


def save_head(folder: Path, head: nn.Sequential) -> str:
    file = folder / "head.pth"
    torch.save({f"layers.{name}": tensor for name, tensor in head.state_dict().items()}, file)
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A CLIP of transformers with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_act": "quick_gelu",
    }
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 10}
    config = CLIPConfig(
        text_config={**tower, **ids, "max_position_embeddings": 8},
        vision_config={**tower, "image_size": SIDE, "patch_size": 8},
        projection_dim=EMBEDDING,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    config = {"size": SIDE, "crop_size": SIDE}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return str(folder)


def in_open_clip_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The image half of a transformers CLIP as open_clip stores it."""
    vision = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("vision_model.")
    }
    found = {
        "class_embedding": vision["embeddings.class_embedding"],
        "positional_embedding": vision["embeddings.position_embedding.weight"],
        "conv1.weight": vision["embeddings.patch_embedding.weight"],
        "proj": tensors["visual_projection.weight"].T.contiguous(),
    }
    for kind in ("weight", "bias"):
        found[f"ln_pre.{kind}"] = vision[f"pre_layrnorm.{kind}"]
        found[f"ln_post.{kind}"] = vision[f"post_layernorm.{kind}"]
        for i in range(LAYERS):
            ours, theirs = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            found[f"{ours}.attn.in_proj_{kind}"] = torch.cat(
                [vision[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
            for mine, name in {
                "attn.out_proj": "self_attn.out_proj",
                "ln_1": "layer_norm1",
                "ln_2": "layer_norm2",
                "mlp.c_fc": "mlp.fc1",
                "mlp.c_proj": "mlp.fc2",
            }.items():
                found[f"{ours}.{mine}.{kind}"] = vision[f"{theirs}.{name}.{kind}"]
    return {f"visual.{name}": tensor for name, tensor in found.items()}


@pytest.fixture(scope="module")
def open_clip_file(folder, tmp_path_factory) -> str:
    """The same weights for open_clip, which is told of the architecture."""
    import open_clip

    place = tmp_path_factory.mktemp("open_clip")
    vision = {"image_size": SIDE, "layers": LAYERS, "width": WIDTH, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 10, "width": 16, "heads": 1, "layers": 1}
    config = {
        "embed_dim": EMBEDDING,
        "vision_cfg": {**vision, "head_width": 16},
        "text_cfg": text,
    }
    for name, quick in ((ARCHITECTURE, True), ("moa-small", False)):
        file = place / f"{name}.json"
        file.write_text(json.dumps({**config, "quick_gelu": quick}))
        open_clip.add_model_config(file)
    tensors = in_open_clip_names(load_file(Path(folder) / "model.safetensors"))
    save_file({**tensors, "logit_scale": torch.tensor(1.0)}, place / "open_clip_model.safetensors")
    return str(place / "open_clip_model.safetensors")


def batch(height: int = 40, width: int = 60) -> RewardBatch:
    images = torch.rand(5, 3, height, width, generator=torch.Generator().manual_seed(5))
    return RewardBatch(prompts=["a"] * 5, images=images)


@pytest.mark.parametrize(
    ("widths", "names"),
    [((768, 1024, 128, 64, 16, 1), {0, 2, 4, 6, 7}), ((24, 8, 1), {0, 1}), ((24, 1), {0})],
)
def test_the_affine_map_is_the_layers_multiplied_out(tmp_path, widths, names):
    head = layers(*widths)
    assert {int(name.partition(".")[0]) for name in head.state_dict()} == names
    weight, bias = read_affine(find_weights(save_head(tmp_path, head), required=()))
    assert weight.dtype == bias.dtype == torch.float64
    x = torch.randn(7, widths[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        wanted = head.double()(x).squeeze(-1)
    # Float64, sums of up to 1024 products that are cut otherwise: 2e-16 apart.
    torch.testing.assert_close(x @ weight + bias, wanted, rtol=1e-12, atol=1e-12)


def test_the_score_is_the_head_on_the_embedding_of_length_one(folder, tmp_path):
    head = layers(EMBEDDING, 16, 8, 1)
    found = create(
        "aesthetic", model=folder, predictor=save_head(tmp_path, head), predictor_sha256=None
    )
    clip = CLIPModel.from_pretrained(folder)
    pixels = Preprocessing(side=SIDE, crop=SIDE)(batch().uint8())
    with torch.no_grad():
        embedded = clip.get_image_features(pixel_values=pixels).pooler_output
        wanted = head(embedded / embedded.norm(dim=-1, keepdim=True)).squeeze(-1)
    scores = found(batch())
    # Float32: layers are multiplied out, and embeddings have length one. 1.5e-8 apart; 16 eps.
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=2e-6)
    assert scores.std() > 1e-3  # 0.017
    prompts = RewardBatch(prompts=["b"] * 5, images=batch().images)
    assert torch.equal(found(prompts), scores)  # the prompt is not read


def test_it_shares_the_module_with_clipscore(folder, tmp_path):
    head = save_head(tmp_path, layers(EMBEDDING, 1))
    aesthetic = create("aesthetic", model=folder, predictor=head, predictor_sha256=None)
    aesthetic.load()
    weights = find_weights(folder)
    twin = create("aesthetic", model=folder, predictor=head, predictor_sha256=None)
    twin.load()
    assert aesthetic._shared is twin._shared
    assert aesthetic._recipe() is create("clipscore", model=folder)._recipe()
    assert aesthetic.provenance()["sha256"] == weights.digest()


@has_open_clip
@pytest.mark.parametrize("size", [(32, 32), (40, 60), (60, 43), (20, 31)])
def test_preprocessing_is_open_clips_to_the_bit(size):
    from open_clip.transform import image_transform

    transform = image_transform(SIDE, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)
    images = batch(*size)
    wanted = torch.stack([transform(image) for image in images.to_pil()])
    found = Preprocessing(side=SIDE, crop=SIDE, rounding="even")(images.uint8())
    assert torch.equal(found, wanted)


@has_open_clip
def test_both_backbones_agree_on_the_same_weights(folder, open_clip_file, tmp_path):
    head = save_head(tmp_path, layers(EMBEDDING, 16, 1))
    theirs = create(
        "aesthetic",
        backbone="open_clip",
        architecture=ARCHITECTURE,
        model=open_clip_file,
        predictor=head,
        predictor_sha256=None,
    )
    ours = create("aesthetic", model=folder, predictor=head, predictor_sha256=None)
    before = torch.get_rng_state()
    found, wanted = theirs(batch()), ours(batch())
    assert torch.equal(torch.get_rng_state(), before)
    # Two writings of one model in float32, of embeddings of length one: 5e-8 apart; 16 eps.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)
    assert theirs._shared is not ours._shared

    # Another activation loads the same weights and scores otherwise.
    wrong = create(
        "aesthetic",
        backbone="open_clip",
        architecture="moa-small",
        model=open_clip_file,
        predictor=head,
        predictor_sha256=None,
    )
    assert (wrong(batch()) - wanted).abs().max() > 1e-4  # 0.001
    assert wrong._shared is not theirs._shared


@has_open_clip
def test_an_architecture_that_open_clip_does_not_know_is_told():
    with pytest.raises(ValueError, match=r"Found `architecture = 'ViT-L-99'`\."):
        create("aesthetic", backbone="open_clip", architecture="ViT-L-99")


def test_a_missing_package_is_told_with_the_install_line(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "open_clip" else real(name)
    )
    with pytest.raises(ImportError, match=r'pip install "moa-diffusion\[open_clip\]"'):
        create("aesthetic", backbone="open_clip")


def test_the_transformers_backbone_needs_no_open_clip(folder, tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        assert not name.startswith("open_clip")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    head = save_head(tmp_path, layers(EMBEDDING, 1))
    create("aesthetic", model=folder, predictor=head, predictor_sha256=None)(batch())


def test_another_file_than_the_published_head_is_refused_unless_named(folder, tmp_path):
    file = save_head(tmp_path, layers(EMBEDDING, 1))
    digest = find_weights(file, required=()).digest()
    with pytest.raises(RewardError, match=f"is {digest}, expected is 21dd590f.*`predictor_sha256`"):
        create("aesthetic", model=folder, predictor=file).load()
    head = create("aesthetic", model=folder, predictor=file, predictor_sha256=digest)
    head.load()
    assert head.provenance()["predictor_sha256"] == digest
    assert head.provenance()["predictor"] == file
    assert head.provenance()["backbone"] == "transformers"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"should hold `layers\.N\.weight`"),
        ({"w": torch.zeros(1, EMBEDDING)}, "and nothing else. Found: w"),
        ({"layers.0.weight": torch.zeros(1, EMBEDDING)}, "should hold `layers"),
        ({"layers.0.weight": torch.zeros(2, EMBEDDING), "layers.0.bias": torch.zeros(2)}, "end in"),
        (
            {
                "layers.0.weight": torch.zeros(2, EMBEDDING),
                "layers.0.bias": torch.zeros(2),
                "layers.1.weight": torch.zeros(1, 3),
                "layers.1.bias": torch.zeros(1),
            },
            r"do not fit each other.*layers\.1\.weight \[1, 3\]",
        ),
    ],
)
def test_wrong_layers(tmp_path, tensors, message):
    file = tmp_path / "head.pth"
    torch.save(tensors, file)
    with pytest.raises(RewardError, match=message):
        read_affine(find_weights(str(file), required=()))


def test_a_head_of_another_width_is_told(folder, tmp_path):
    head = save_head(tmp_path, layers(EMBEDDING + 1, 1))
    with pytest.raises(RewardError, match=r"reads 25 numbers, and .* makes 24 of an image"):
        create("aesthetic", model=folder, predictor=head, predictor_sha256=None)(batch())


def test_without_network_the_error_tells_where_the_head_is_published(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RewardError) as caught:
        create("aesthetic", model=folder).load()
    assert "`hf download camenduru/improved-aesthetic-predictor --include" in caught.value.cause
    assert "github.com/christophschuhmann/improved-aesthetic-predictor" in caught.value.cause
    assert "set `predictor` to its path" in caught.value.cause


def test_wrong_options(folder):
    with pytest.raises(
        ValueError, match=r"one of 'transformers', 'open_clip'. Found `backbone = 'x'`"
    ):
        create("aesthetic", backbone="x")
    with pytest.raises(ValueError, match="Parameter `predictor` names a file or folder"):
        create("aesthetic", model=folder, predictor="./nowhere.pth")
