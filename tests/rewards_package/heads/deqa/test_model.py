"""DeQA-Score against the published code, and its head in use.

`fixtures/deqa_tiny.npz` holds random weights of a small model of DeQA-Score's architecture, three
inputs, and the logits and scores that the published code gives for them (transformers 4.36.1,
float32, eager attention).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from rewards import RewardBatch, RewardError, create
from rewards.heads.deqa.config import DeqaConfig
from rewards.heads.deqa.model import Deqa, load
from rewards.heads.levels import LEVELS
from rewards.pretrained.locate import find_weights

GOLDEN = np.load(Path(__file__).parents[3] / "fixtures" / "deqa_tiny.npz")
CONFIG: dict[str, Any] = json.loads(GOLDEN["__config__"].tobytes())
TENSORS = {key: torch.from_numpy(GOLDEN[key]) for key in GOLDEN.files if not key.startswith("__")}
PIXELS, LOGITS = torch.from_numpy(GOLDEN["__pixels__"]), torch.from_numpy(GOLDEN["__logits__"])
# Another batch, instruction set or number of threads sums in another order: some 60 products follow
# each other, whose errors add up to about 32 times float32's eps, of logits and scores of up to 4.
ROUNDING = 32 * 4 * torch.finfo(torch.float32).eps

# The published sizes; `config.json` of mPLUG-Owl2 holds more, which does not matter here.
FULL = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "visual_config": {
        "visual_model": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 448,
            "patch_size": 14,
            "layer_norm_eps": 1e-6,
        },
        "visual_abstractor": {
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 6,
            "num_attention_heads": 16,
            "num_learnable_queries": 64,
            "layer_norm_eps": 1e-6,
            "grid_size": 32,
        },
    },
}
# Another geometry with a vocabulary and a prompt of its own.
SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vocab_size": 9,
    "rms_norm_eps": 1e-5,
    "prompt_ids": [[0, 1], [2, 3, 1]],
    "level_ids": [4, 5, 6, 7, 8],
    "visual_config": {
        "visual_model": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "layer_norm_eps": 1e-6,
        },
        "visual_abstractor": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_learnable_queries": 3,
            "layer_norm_eps": 1e-6,
        },
    },
}


def write(
    folder: Path,
    tensors: dict[str, Tensor],
    kind: str = "safetensors",
    config: dict[str, Any] = CONFIG,
) -> Path:
    """Writes a model folder; `kind` is a suffix, with `-sharded` in two files and an index."""
    (folder / "config.json").write_text(json.dumps(config))
    suffix, _, sharded = kind.partition("-")
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    names = sorted(tensors)
    parts = {f"{stem}.{suffix}": names}
    if sharded:
        parts = {
            f"{stem}-00001-of-00002.{suffix}": names[::2],
            f"{stem}-00002-of-00002.{suffix}": names[1::2],
        }
        weight_map = {name: file for file, held in parts.items() for name in held}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, held in parts.items():
        part = {name: tensors[name].clone() for name in held}
        if suffix == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
    return folder


def random_arrays(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height)
    rough = rng.integers(0, 256, size=(4, 6, 6, 3), dtype=np.uint8)
    size = (width, height)
    return np.stack([np.asarray(Image.fromarray(a).resize(size)) for a in rough])


def batch(arrays: np.ndarray) -> RewardBatch:
    images = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
    return RewardBatch(prompts=["a fish"] * len(arrays), images=images.contiguous())


def seen(array: np.ndarray, side: int = 56) -> Tensor:
    """What the published code shows the model, by Pillow and NumPy alone."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    height, width, _ = array.shape
    longer = max(height, width)
    square = Image.new("RGB", (longer, longer), (122, 116, 104))
    square.paste(Image.fromarray(array), ((longer - width) // 2, (longer - height) // 2))
    small = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy((small / 255 - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("deqa"), TENSORS)


@pytest.fixture(scope="module")
def model(folder: Path) -> Deqa:
    return load(find_weights(str(folder)))


@torch.no_grad()
def test_logits_are_those_of_the_published_code(model):
    torch.testing.assert_close(model(PIXELS), LOGITS, rtol=0, atol=ROUNDING)
    scores = model(PIXELS).softmax(1) @ torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    assert scores.tolist() == pytest.approx(GOLDEN["__scores__"].tolist(), abs=ROUNDING)


@torch.no_grad()
def test_the_levels_are_words_of_the_whole_vocabulary(model):
    whole = model.next_word(PIXELS)
    assert whole.shape == (3, CONFIG["vocab_size"])
    # excellent, good, fair, poor, bad in LLaMA-2's vocabulary
    levels = whole[:, [15129, 1781, 6534, 6460, 4319]]
    torch.testing.assert_close(levels, LOGITS, rtol=0, atol=ROUNDING)


@torch.no_grad()
def test_an_image_is_read_alike_alone_and_among_others(model):
    alone = torch.cat([model(PIXELS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, model(PIXELS), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@torch.no_grad()
def test_half_precision_is_near(folder, dtype):
    half = load(find_weights(str(folder))).to(dtype)
    found = half(PIXELS.to(dtype))
    assert found.dtype == dtype
    # Some hundred roundings to this precision follow each other: 10 eps as a random walk, and a few
    # times as much in logits of about 1 to 3.
    torch.testing.assert_close(found.float(), LOGITS, rtol=0, atol=32 * torch.finfo(dtype).eps)


@torch.no_grad()
def test_norms_do_not_overflow_in_half_precision(folder):
    loud = {key: value.half() for key, value in TENSORS.items()}
    words = loud["model.embed_tokens.weight"] = loud["model.embed_tokens.weight"] * 2000
    assert words.abs().max() > 256  # whose square is beyond float16
    module = load(find_weights(str(folder)))
    module.load_state_dict(loud, assign=True)
    half = module(PIXELS.half()).float()
    # Some hundred roundings to float16, of logits of up to 2: as above.
    torch.testing.assert_close(half, module.float()(PIXELS), rtol=0, atol=32 * 2**-10)


def test_the_full_size_has_as_many_numbers_as_the_published_weights():
    with torch.device("meta"):
        full = Deqa(DeqaConfig.from_dict(FULL))
    tensors = full.state_dict()
    assert len(tensors) == 862
    assert sum(tensor.numel() for tensor in tensors.values()) == 8_204_550_144
    logits = full(torch.empty(2, 3, 448, 448, device="meta"))
    assert logits.shape == (2, 5)
    assert full.config.image_tokens == slice(15, 80)
    assert len(full.config.before) + 65 + len(full.config.after) == 92


def test_a_new_model_has_the_published_positions():
    new = Deqa(DeqaConfig.from_dict(CONFIG)).state_dict()
    places = [key for key in TENSORS if key.endswith("pos_embed")]
    assert len(places) == 4
    for key in places:
        # Sines of angles up to some 4, which float32 rounds by 2e-7.
        torch.testing.assert_close(new[key], TENSORS[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["safetensors-sharded", "bin", "bin-sharded"])
@torch.no_grad()
def test_every_format_of_weights_is_read(tmp_path, model, kind):
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder = write(tmp_path, {**TENSORS, **frequencies}, kind)
    assert torch.equal(load(find_weights(str(folder)))(PIXELS), model(PIXELS))


def test_the_dtype_of_the_file_is_kept_and_nothing_is_left_out(tmp_path):
    folder = write(tmp_path, {key: value.half() for key, value in TENSORS.items()})
    tensors = load(find_weights(str(folder))).state_dict().values()
    assert {(tensor.dtype, tensor.device.type) for tensor in tensors} == {(torch.float16, "cpu")}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model.norm.weight": None}, "missing: model.norm.weight"),
        ({"model.mystery": torch.ones(2)}, "unexpected: model.mystery"),
        (
            {"model.norm.weight": torch.ones(31)},
            r"of another shape: model.norm.weight \(\[31\] instead of \[32\]\)",
        ),
    ],
)
def test_wrong_weights_are_named(tmp_path, change, complaint):
    tensors = {k: v for k, v in {**TENSORS, **change}.items() if v is not None}
    head = create("deqa", model=str(write(tmp_path, tensors)), device="cpu")
    with pytest.raises(RewardError, match=f'Reward head "deqa" failed.*{complaint}'):
        head.load()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"hidden_size": None}, "`hidden_size` should be a positive int. Found None"),
        ({"hidden_size": "32"}, "`hidden_size` should be a positive int. Found '32'"),
        ({"rms_norm_eps": 0.0}, "`rms_norm_eps` should be a positive float. Found 0.0"),
        ({"hidden_size": 33}, "multiple of `num_attention_heads`. Found 33 and 4"),
        ({"num_attention_heads": 32, "num_key_value_heads": 32}, "should be even .* Found 1"),
        ({"num_key_value_heads": 2}, "`num_key_value_heads` should be 4. Found 2"),
        ({"hidden_act": "gelu"}, "`hidden_act` should be 'silu'. Found 'gelu'"),
        ({"rope_scaling": {"type": "linear"}}, "`rope_scaling` should be None. Found {"),
        ({"vocab_size": 1000}, "below `vocab_size = 1000`. Found"),
        ({"level_ids": [1, 2, 3, 4]}, "five levels .* Found 4 `level_ids`"),
        ({"prompt_ids": [1, 2]}, "lists of integers from 0 on"),
        ({"prompt_ids": [[1]]}, "two lists: .* Found 1"),
        ({"visual_config": None}, "`visual_config` should be a mapping. Found None"),
        ({"visual_model": {"image_size": 57}}, "multiple of `patch_size`. Found 57 and 14"),
        ({"visual_model": {"hidden_act": "gelu"}}, "`hidden_act` should be 'quick_gelu'"),
        ({"visual_abstractor": {"grid_size": 5}}, "`grid_size` should be 4. Found 5"),
        ({"visual_abstractor": {"hidden_size": 64}}, r"vision model \(32\). Found 64"),
    ],
)
def test_a_wrong_config_is_told(tmp_path, change, complaint):
    config = json.loads(json.dumps(CONFIG))
    for key, value in change.items():
        if key in ("visual_model", "visual_abstractor"):
            config["visual_config"][key].update(value)
        else:
            config[key] = value
    with pytest.raises(ValueError, match=complaint):
        DeqaConfig.from_dict(config)
    write(tmp_path, {"x": torch.ones(1)}, config=config)
    with pytest.raises(RewardError, match=r"config\.json` describes no DeQA model"):
        load(find_weights(str(tmp_path)))


def test_an_abstractor_of_odd_width_is_told():
    config = json.loads(json.dumps(SMALL))
    for part in config["visual_config"].values():
        part.update(hidden_size=18, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"multiple of 4 .* Found 18"):
        DeqaConfig.from_dict(config)


def test_a_config_that_is_no_mapping_is_told(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RewardError, match=r"`config.json` should be a mapping. Found \[\]"):
        load(find_weights(str(tmp_path)))


def test_a_model_of_another_geometry_learns_in_all_its_parts():
    torch.manual_seed(0)
    model = Deqa(DeqaConfig.from_dict(SMALL))
    pixels, levels = torch.randn(5, 3, 64, 64), torch.arange(5)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(pixels), levels)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    still = [key for key, value in model.named_parameters() if not value.grad.abs().sum() > 0]
    # Nothing reads what the last layer makes of the image's own positions.
    assert still == ["model.layers.1.post_attention_layernorm.multiway.1.weight"]
    assert losses[-1] < 0.2 < 1.2 < losses[0]


@torch.no_grad()
def test_a_model_of_another_geometry_is_saved_and_scores(tmp_path):
    torch.manual_seed(0)
    module = Deqa(DeqaConfig.from_dict(SMALL))
    halves = {key: value.half() for key, value in module.state_dict().items()}
    module.load_state_dict({key: value.float() for key, value in halves.items()})
    head = create("deqa", model=str(write(tmp_path, halves, config=SMALL)), dtype="float32")
    arrays = random_arrays(64, 64)
    shown = torch.stack([seen(array, side=64) for array in arrays])
    expected = module(shown).softmax(1) @ torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    assert expected.std() > 10 * ROUNDING  # there is something to be wrong about
    torch.testing.assert_close(head(batch(arrays)), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 97), (97, 40)])
@torch.no_grad()
def test_the_head_scores_what_the_published_preprocessing_shows(folder, model, height, width):
    head = create("deqa", model=str(folder), dtype="float32", device="cpu", batch_size=3)
    arrays = random_arrays(height, width)
    found = head.evaluate(batch(arrays))
    shares = model(torch.stack([seen(array) for array in arrays])).softmax(1)
    expected = shares @ torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    torch.testing.assert_close(found.values, expected, rtol=0, atol=ROUNDING)
    assert list(found.extra) == list(LEVELS)
    columns = torch.tensor([found.extra[level] for level in LEVELS])
    torch.testing.assert_close(columns.T, shares, rtol=0, atol=ROUNDING)
    assert 1 < found.values.min() < found.values.max() < 5


def test_scores_do_not_depend_on_the_batch_size(folder):
    arrays = random_arrays(64, 64)
    results = [
        create("deqa", model=str(folder), dtype="float32", device="cpu", batch_size=size)(
            batch(arrays)
        )
        for size in (1, 3, 4)
    ]
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(results[1], results[2], rtol=0, atol=ROUNDING)


def test_the_published_precision_is_the_default_and_is_recorded(folder):
    head = create("deqa", model=str(folder), device="cpu")
    assert head(batch(random_arrays(64, 64))).isfinite().all()
    provenance = head.provenance()
    assert provenance["dtype"] == "float16"
    assert provenance["sha256"] == find_weights(str(folder)).digest()


def test_a_folder_that_is_not_there_is_told_at_once():
    with pytest.raises(ValueError, match="does not exist"):
        create("deqa", model="./no/such/folder")


def test_no_library_of_models_is_needed(folder, monkeypatch):
    for library in ("transformers", "diffusers", "huggingface_hub", "tokenizers"):
        monkeypatch.setitem(sys.modules, library, None)  # importing it fails
    head = create("deqa", model=str(folder), device="cpu", batch_size=1)
    assert head(batch(random_arrays(20, 30))).isfinite().all()
