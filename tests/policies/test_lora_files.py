"""LoRA weights of others are read, or named for what they are; training starts from them."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, LoraModel
from safetensors.torch import save_file

from moa_diffusion import assembly, tiny
from moa_diffusion.config import from_dict
from moa_diffusion.policies.adapters import (
    read_sd3_adapter,
    read_text_adapter,
    sd3_skeleton,
    text_skeleton,
)
from moa_diffusion.policies.causal_lm import CausalLMPolicy
from moa_diffusion.policies.lora_files import CONFIG, DIFFUSERS, PEFT, foreign_format
from moa_diffusion.policies.sd3 import load_pipeline
from moa_diffusion.storage import checkpoint
from moa_diffusion.types import ConfigError, Request

CPU = torch.device("cpu")
LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k")
PEFT_CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_k"]}

WRAPPED = (  # in DDP, or compiled
    "module.{layer}.lora_{part}.default.weight",
    "module.transformer.{layer}.lora_{part}.weight",
    "transformer._orig_mod.{layer}.lora_{part}.weight",
    "_orig_mod.{layer}.lora_{part}.weight",
)


@pytest.fixture(scope="module")
def transformer():
    return sd3_skeleton(str(tiny.PIPELINE_PATH))


def tensors(transformer, pattern: str, rank: int = 4) -> dict[str, torch.Tensor]:
    """A and B by names such as ``transformer.{layer}.lora_{part}.weight``."""
    draws, state = torch.Generator().manual_seed(0), {}
    for layer in LAYERS:
        linear = transformer.get_submodule(layer)
        shapes = {"A": (rank, linear.in_features), "B": (linear.out_features, rank)}
        for part, shape in shapes.items():
            state[pattern.format(layer=layer, part=part)] = torch.randn(shape, generator=draws)
    return state


def peft_folder(folder: Path, transformer, prefix: str = "base_model.model.") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors(transformer, prefix + "{layer}.lora_{part}.weight"), folder / PEFT)
    (folder / CONFIG).write_text(json.dumps(PEFT_CONFIG))
    return folder


# ---------------------------------------------------------------------- what is read


def test_formats_of_diffusers_and_peft_are_read_alike(tmp_path: Path, transformer):
    """Folders, single files of any name, safetensors and the older pickles of tensors."""
    folder = peft_folder(tmp_path / "peft", transformer)
    plain = tensors(transformer, "transformer.{layer}.lora_{part}.weight")
    for name, state in (
        (DIFFUSERS, plain),
        ("anything.safetensors", plain),
        ("bare.safetensors", tensors(transformer, "{layer}.lora_{part}.weight")),
        ("named.safetensors", tensors(transformer, "{layer}.lora_{part}.default.weight")),
        *((f"{i}.safetensors", tensors(transformer, name)) for i, name in enumerate(WRAPPED)),
    ):
        save_file(state, tmp_path / name)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(plain, pickled / "pytorch_lora_weights.bin")
    alone = tmp_path / "alone"
    alone.mkdir()
    save_file(plain, alone / "my_lora.safetensors")
    expected = read_sd3_adapter(tmp_path, transformer).layers
    found = {
        place: read_sd3_adapter(place, transformer).layers
        for place in (
            *(tmp_path / name for name in (DIFFUSERS, "anything.safetensors")),
            *(tmp_path / name for name in ("bare.safetensors", "named.safetensors")),
            *(tmp_path / f"{i}.safetensors" for i in range(len(WRAPPED))),
            *(pickled, alone, folder, folder / PEFT),
        )
    }
    for place, layers in found.items():
        assert layers.keys() == set(LAYERS) == expected.keys()
        scale = 2.0 if folder in (place, place.parent) else 1.0  # peft scales by alpha / r
        for layer, (a, b) in expected.items():
            assert torch.equal(layers[layer][0], a)
            assert torch.equal(layers[layer][1], scale * b)


def test_layers_that_a_peft_folder_leaves_out_stay_as_they_are(tmp_path: Path, transformer, caplog):
    """Their B starts at zero, unless the configuration says that it is drawn."""
    folder = peft_folder(tmp_path, transformer)
    assert read_sd3_adapter(folder, transformer).layers.keys() == set(LAYERS)
    assert "none for 10 of the 12 layers" in caplog.text
    (folder / CONFIG).write_text(json.dumps({**PEFT_CONFIG, "init_lora_weights": False}))
    with pytest.raises(ConfigError, match="Found B None and A None"):
        read_sd3_adapter(folder, transformer)


def test_a_peft_folder_is_what_peft_makes_of_it(tmp_path: Path, transformer):
    """The update of each layer is that of peft's own merge."""
    found = read_sd3_adapter(peft_folder(tmp_path, transformer), transformer)
    model = torch.nn.ModuleDict({"to_q": torch.nn.Linear(128, 128, bias=False)})
    tuner = LoraModel(model, LoraConfig(**{**PEFT_CONFIG, "target_modules": ["to_q"]}), "one")
    state = tensors(transformer, "{layer}.{part}")
    adapted = tuner.model["to_q"]
    with torch.no_grad():
        adapted.lora_A["one"].weight.copy_(state[f"{LAYERS[0]}.A"])
        adapted.lora_B["one"].weight.copy_(state[f"{LAYERS[0]}.B"])
    a, b = found.layers[LAYERS[0]]
    # Sums of some products of up to 33, scaled before or after: within torch's 1.3e-6 and 1e-5.
    torch.testing.assert_close(b @ a, adapted.get_delta_weight("one"))


# ---------------------------------------------------------------------- what is named


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "kohya-ss.*U-Net"),
        (["lora_unet_input_blocks_1_1_proj_in.lora_up.weight"], "kohya-ss.*U-Net"),
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"], "kohya-ss.*text encoders"),
        (["lora_prior_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"], "of text encoders"),
        *(
            ([f"{name}.self_attn.q_proj.lora_A.weight"], "a LoRA of a text encoder")
            for name in (
                "text_encoder.text_model.encoder.layers.0",
                "text_encoder_2.text_model.encoder.layers.0",
                "text_encoders.clip_l.transformer.text_model.encoder.layers.0",
                "te1.text_model.encoder.layers.0",
                "te2_text_model_encoder_layers_0",
                "t5xxl.transformer.encoder.block.0.layer.0",
                "base_model.model.text_model.encoder.layers.0",
                "encoder.block.0.layer.0",
            )
        ),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "kohya-ss LoRA of Flux"),
        (["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"], "kohya.*Diffusion 3"),
        (["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], "LoRA of a U-Net"),
        (["unet.mid_block.attentions.0.processor.to_q_lora.down.weight"], "LoRA of a U-Net"),
        (["down_blocks.0.attn1.processor.to_q_lora.up.weight"], "LoRA of a U-Net"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "LoRA of Flux"),
        (["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"], "ComfyUI LoRA of Flux"),
        (["diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight"], "ComfyUI LoRA"),
        (["lora_unet_x.hada_w1_a"], "LoHa"),
        (["transformer.transformer_blocks.0.attn.to_q.lokr_w1"], "LoKr"),
        (["transformer.a.lora_A.weight", "transformer.a.lora_magnitude_vector"], "DoRA"),
        (["lora_unet_x.lora_down.weight", "lora_unet_x.dora_scale"], "DoRA"),
        (["base_model.model.x.ia3_l.weight"], r"\(IA\)\^3"),
        (["lora_unet_x.oft_blocks"], "OFT"),
        (["prompt_embeddings"], "prompt tuning"),
        (["clip_l", "clip_g"], "textual inversion"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "whole checkpoint"),
        (["transformer_blocks.0.attn.to_q.weight"], "whole weights of an image transformer"),
        (["model.layers.0.self_attn.q_proj.weight"], "whole weights of a language model"),
        (["transformer_blocks.0.attn.to_q.lora.down.weight", "x.alpha"], "alpha"),
        (["transformer.a.lora.down.weight", "transformer.a.network_alpha"], "alpha"),
        (["double_blocks.0.processor.qkv_lora1.down.weight"], "XLabs LoRA of Flux"),
        (["double_blocks.0.img_attn.qkv.lora_A.weight"], "a LoRA of Flux or"),
        (["double_blocks.0.img_attn.qkv.weight"], "whole weights of Flux"),
        (["transformer.double_blocks.0.img_attn_qkv.lora_A.weight"], "LoRA of HunyuanVideo"),
        (["blocks.0.self_attn.q.lora_A.weight"], "LoRA of Wan"),
        (["diffusion_model.blocks.0.ffn.0.lora_B.weight"], "ComfyUI LoRA of Wan"),
        (["lora_unet_blocks_0_cross_attn_k.lora_down.weight"], "kohya-ss LoRA of Wan"),
        (["transformer.joint_transformer_blocks.0.attn.to_q.lora_A.weight"], "LoRA of AuraFlow"),
        (["transformer.transformer_blocks.0.img_mlp.net.2.lora_A.weight"], "LoRA of Qwen-Image"),
        (["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"], "PixArt, Sana, LTX"),
        (["joint_blocks.0.x_block.attn.qkv.lora_A.weight"], "Stability AI's names"),
        (["unet:0:up", "unet:0:down"], "cloneofsimo"),
        (["base_model.model.a.lora_A", "base_model.model.a.lora_E"], "AdaLoRA"),
        (
            ["base_model.model.a.vera_lambda_b", "base_model.model.a.vera_lambda_d"],
            "a VERA of peft",
        ),
        (["base_model.model.a.randlora_lambda"], "a RANDLORA of peft"),
        (["lycoris_a.a1.weight", "lycoris_a.b1.weight"], "GLoRA"),
        (["lora_transformer_a.diff"], "differences of whole weights"),
    ],
)
def test_foreign_formats_are_named_for_what_they_are(
    tmp_path: Path, transformer, names: list[str], kind: str
):
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / DIFFUSERS)
    with pytest.raises(ConfigError, match=rf"{DIFFUSERS}` should be a LoRA.*Found .*{kind}"):
        read_sd3_adapter(tmp_path, transformer)


def test_what_is_read_is_not_called_foreign(transformer):
    for pattern in ("transformer.{layer}.lora_{part}.weight", "base_model.model.{layer}.lora_A.w"):
        assert foreign_format(tensors(transformer, pattern)) is None
    # A language model's blocks are not a video model's.
    assert (
        foreign_format(["base_model.model.transformer.blocks.0.ffn.up_proj.lora_A.weight"]) is None
    )
    language = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    assert (
        foreign_format([language, "base_model.model.model.layers.0.mlp.up.lora_B.weight"]) is None
    )


def test_a_folder_without_lora_weights_says_what_it_holds(tmp_path: Path, transformer):
    def refused(files: dict[str, bytes], message: str, place: str = "") -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        with pytest.raises(ConfigError, match=message):
            read_sd3_adapter(folder / place, transformer)

    refused({"config.yaml": b"", "metrics.jsonl": b""}, "Found the folder of a run; --run")
    refused({"model_index.json": b"{}"}, "model_index.json: a whole model")
    refused({"a.safetensors": b"", "b.safetensors": b""}, "one has to be named: a.*, b.safetensors")
    refused({"ema/" + PEFT: b""}, "Found some in the folder ema in it")
    refused({"lora.ckpt": b""}, r"\.safetensors file\. Found '\.ckpt': a pickle")
    refused({"lora.pt": b""}, r"Found '\.pt': a pickle", "lora.pt")
    refused({"readme.txt": b""}, "Found readme.txt")
    refused({"x": b""}, "do not exist", "nowhere")
    refused({PEFT: b""}, "are damaged")
    refused({"pytorch_lora_weights.bin": b"x"}, "are damaged")
    save_file(tensors(transformer, "base_model.model.{layer}.lora_{part}.weight"), tmp_path / PEFT)
    with pytest.raises(ConfigError, match=f"Found no {CONFIG} in it"):  # where the scale stands
        read_sd3_adapter(tmp_path / PEFT, transformer)


def test_another_base_model_is_told_by_its_shapes(tmp_path: Path, transformer):
    state = {
        f"transformer.{LAYERS[0]}.lora_A.weight": torch.ones(4, 1536),
        f"transformer.{LAYERS[0]}.lora_B.weight": torch.ones(1536, 4),
    }
    save_file(state, tmp_path / DIFFUSERS)
    with pytest.raises(ConfigError, match=r"do not fit.*another base model, where it is \(1536, 1"):
        read_sd3_adapter(tmp_path, transformer)
    model = text_skeleton(str(tiny.LM_PATH))
    with pytest.raises(ConfigError, match="should be of a language model, as peft writes them"):
        read_text_adapter(tmp_path, model)
    with pytest.raises(ConfigError, match="do not fit the base model"):
        read_text_adapter(peft_folder(tmp_path / "peft", transformer), model)


@pytest.mark.parametrize(
    ("start", "found"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of git-lfs"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"", "an empty file"),
        (b"PK\x03\x04", "a pickle of PyTorch"),
    ],
)
@pytest.mark.parametrize("name", [DIFFUSERS, CONFIG])
def test_a_file_of_something_else_is_named(
    tmp_path: Path, transformer, name: str, start: bytes, found: str
):
    folder = peft_folder(tmp_path, transformer) if name == CONFIG else tmp_path
    (folder / name).write_bytes(start)
    with pytest.raises(ConfigError, match=rf"{name}` (is|are) damaged\. Found {found}"):
        read_sd3_adapter(folder, transformer)


@pytest.mark.parametrize("length", [0x80, 0x4B50, 0x3C])  # as a pickle, a ZIP file or a page begins
def test_a_file_that_is_cut_short_is_damaged_whatever_its_length(
    tmp_path: Path, transformer, length: int
):
    start = length.to_bytes(8, "little") + b'{"layer.lora_A.weight":{"dtype'
    (tmp_path / DIFFUSERS).write_bytes(start)
    with pytest.raises(ConfigError, match=r"are damaged \(SafetensorError: "):
        read_sd3_adapter(tmp_path, transformer)


@pytest.mark.parametrize("pattern", ["{layer}.lora_{part}.weight", "{layer}.lora.{part}.weight"])
@pytest.mark.parametrize("lost", ["A", "B"])
def test_half_a_layer_is_told_as_incomplete(tmp_path: Path, transformer, pattern: str, lost: str):
    old = {"A": "down", "B": "up"}
    state = tensors(transformer, "{layer} {part}")
    kept = {
        pattern.format(
            layer=name.split()[0], part=old[part] if "lora." in pattern else part
        ): tensor
        for name, tensor in state.items()
        if (part := name.split()[1]) != lost or LAYERS[0] not in name
    }
    save_file({f"transformer.{name}": t for name, t in kept.items()}, tmp_path / DIFFUSERS)
    with pytest.raises(ConfigError, match=rf"attn\.to_q is .*{lost} None.*the file is incomplete"):
        read_sd3_adapter(tmp_path, transformer)


@pytest.mark.parametrize(
    "state",
    [
        {"{q}.lora_A.weight": torch.ones(4), "{q}.lora_B.weight": torch.ones(4)},
        {"{q}.lora_A.weight": torch.ones(0, 128), "{q}.lora_B.weight": torch.ones(128, 0)},
        {"{q}.lora_A.weight": torch.ones(4, 128).char(), "{q}.lora_B.weight": torch.ones(128, 4)},
        {"{q}x.lora_A.weight": torch.ones(4, 128), "{q}x.lora_B.weight": torch.ones(128, 4)},
        {"pos_embed.proj.lora_A.weight": torch.ones(4, 16, 2, 2)},
    ],
    ids=["vectors", "no rank", "integers", "no such layer", "a convolution"],
)
def test_tensors_that_are_no_update_are_told_once(
    tmp_path: Path, transformer, state: dict[str, torch.Tensor], caplog, capfd
):
    """diffusers logs what it raises."""
    named = {f"transformer.{name.format(q=LAYERS[0])}": t for name, t in state.items()}
    save_file(named, tmp_path / DIFFUSERS)
    with pytest.raises(ConfigError, match=rf"LoRA weights `{tmp_path}.* (should be|do not fit)"):
        read_sd3_adapter(tmp_path, transformer)
    assert not caplog.text
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": None}, "target_modules.*Found null"),
        ({"target_modules": 5}, "target_modules should be a list"),
        ({"target_modules": [None]}, "do not fit"),
        ({"target_modules": "["}, "do not fit.*unterminated"),
        ({"target_modules": ["no_such_layer"]}, "do not fit.*not found"),
        ({"r": "4"}, "r should be a whole number"),
        ({"r": 8}, f"the rank of {CONFIG}, 8 in layer"),
        ({"lora_alpha": None}, "lora_alpha should be a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha should be finite"),
        ({"rank_pattern": []}, "rank_pattern should be a mapping"),
        ({"alpha_pattern": {"to_q": "x"}}, "do not fit"),
        ({"peft_type": "ADALORA"}, "should be of a LoRA. Found peft_type ADALORA"),
    ],
)
def test_damaged_settings_of_peft_are_told(tmp_path: Path, transformer, settings, message: str):
    """And leave the skeleton as it was."""
    folder = peft_folder(tmp_path, transformer)
    (folder / CONFIG).write_text(json.dumps({**PEFT_CONFIG, **settings}))
    with pytest.raises(ConfigError, match=message):
        read_sd3_adapter(folder, transformer)
    assert type(transformer.get_submodule(LAYERS[0])) is torch.nn.Linear


@pytest.mark.parametrize("metadata", ["{", "[]", "3", '{"transformer.r": 4}'])
def test_damaged_metadata_of_diffusers_are_told(tmp_path: Path, transformer, metadata: str):
    state = tensors(transformer, "transformer.{layer}.lora_{part}.weight")
    save_file(state, tmp_path / DIFFUSERS, metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(ConfigError, match="have damaged metadata"):
        read_sd3_adapter(tmp_path, transformer)


# ---------------------------------------------------------------------- a second stage


def settings_of(tmp_path: Path, **policy: object):
    return from_dict(
        {
            "output_dir": str(tmp_path / "run"),
            "policy": {"max_sequence_length": 16, "lora": {"rank": 4}, **policy},
            "sampling": {"resolution": 64, "steps": 2, "guidance": 1.0},
            "evaluation": {"steps": 2, "guidance": 1.0, "every": 0},
            "rewards": {"colourfulness": {}},
            "log": {"trackers": []},
        }
    )


def test_training_starts_with_the_images_of_the_adapter(tmp_path: Path, transformer):
    """As diffusers draws them with the folder loaded, or with peft's scale folded into B."""
    layers = read_sd3_adapter(peft_folder(tmp_path / "peft", transformer), transformer).layers
    small = {name: (0.05 * a, b) for name, (a, b) in layers.items()}  # an image, not noise
    save_file(
        {
            f"transformer.{name}.lora_{part}.weight": tensor.contiguous()
            for name, pair in small.items()
            for part, tensor in zip("AB", pair, strict=True)
        },
        tmp_path / "stage_one.safetensors",
    )
    pipeline = load_pipeline(str(tiny.PIPELINE_PATH))
    pipeline.load_lora_weights(str(tmp_path), weight_name="stage_one.safetensors")
    expected = pipeline(
        "a red square",
        num_inference_steps=2,
        guidance_scale=1.0,
        height=64,
        width=64,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    place = str(tmp_path / "stage_one.safetensors")
    lora = {"rank": 8, "alpha": 2}  # more than the adapter has, at another scale
    policy = assembly.policy(settings_of(tmp_path, adapter=place, lora=lora), CPU)
    policy.prepare(["a red square"])
    request = [Request(prompt="a red square", seed=3)]
    images = policy.generate(request).outputs
    # Both are in [0, 1]; sums of float32 in another order differ by a few of its last places,
    # relative 6e-8, grown by two denoising steps and the VAE.
    torch.testing.assert_close(images, expected.float(), rtol=0, atol=1e-4)
    with policy.reference():  # the KL is to the base model, without an adapter
        base = policy.generate(request).outputs
    plain = assembly.policy(settings_of(tmp_path), CPU)
    plain.prepare(["a red square"])
    assert torch.equal(base, plain.generate(request).outputs)
    assert (base - images).abs().max() > 0.05
    # All of the adapter can be trained: where B is zero A is not.
    for name, a in policy.trainable().items():
        if ".lora_A." in name:
            b = policy.trainable()[name.replace(".lora_A.", ".lora_B.")]
            assert bool(((a != 0).any(1) | (b != 0).any(0)).all())


def test_a_checkpoint_starts_another_run_with_its_weights(tmp_path: Path):
    first = assembly.policy(settings_of(tmp_path), CPU)
    with torch.no_grad():
        for number, parameter in enumerate(first.trainable().values()):
            draws = torch.Generator().manual_seed(number)
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draws))
    with checkpoint.atomic_folder(tmp_path / "step-000001") as partial:
        first.save(partial)
        (partial / "ema").mkdir()
        first.save(partial / "ema")
    place = str(tmp_path / "step-000001" / "ema")
    second = assembly.policy(settings_of(tmp_path, adapter=place), CPU)
    for name, parameter in first.trainable().items():
        assert torch.equal(second.trainable()[name], parameter)


def test_a_language_model_starts_with_the_log_probs_of_the_adapter(tmp_path: Path):
    settings = settings_of(tmp_path, name="causal_lm", lora={"rank": 4, "alpha": 8})
    first = assembly.policy(settings, CPU)
    with torch.no_grad():
        for number, parameter in enumerate(first.trainable().values()):
            draws = torch.Generator().manual_seed(number)
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draws))
    first.save(tmp_path)
    lora = {"rank": 6, "alpha": 3}
    second = assembly.policy(
        settings_of(tmp_path, name="causal_lm", lora=lora, adapter=str(tmp_path)), CPU
    )
    texts = (" Dear Sam,", " the bread was good.")

    def log_probs(policy: CausalLMPolicy) -> torch.Tensor:
        with torch.no_grad():
            return policy.log_probs_of(["To the baker:"] * 2, policy.tokens_of(texts))

    # Products of rank 4 and 6 are summed in another order: float32's 6e-8, over a few layers.
    torch.testing.assert_close(log_probs(second), log_probs(first), rtol=1e-4, atol=1e-4)
    untrained = assembly.policy(settings_of(tmp_path, name="causal_lm"), CPU)
    assert (log_probs(untrained) - log_probs(first)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"lora": {"rank": 2}}, r"policy\.lora\.rank: should be at least 4, .*Found 2"),
        (
            {"lora": {"rank": 4, "target_modules": ["attn.to_q"]}},
            r"policy\.lora\.target_modules: .*Found none for transformer_blocks\.0\.attn\.to_k",
        ),
        ({"adapter": "/nope"}, r"policy\.adapter: LoRA weights `/nope` do not exist"),
    ],
)
def test_what_does_not_fit_is_told_before_a_model_loads(
    tmp_path: Path, transformer, monkeypatch: pytest.MonkeyPatch, policy: dict, message: str
):
    monkeypatch.setattr("moa_diffusion.assembly.models.load_pipeline", None)
    folder = peft_folder(tmp_path / "peft", transformer)
    settings = settings_of(tmp_path, **({"adapter": str(folder)} | policy))
    for make in (assembly.trainer, lambda settings: assembly.policy(settings, CPU)):
        with pytest.raises(ConfigError, match=message):
            make(settings)


def test_layers_that_it_leaves_out_are_told_once(tmp_path: Path, transformer, caplog):
    """The files are read twice: checked before anything expensive, and where they are used."""
    folder = peft_folder(tmp_path / "peft", transformer)
    settings = settings_of(tmp_path, adapter=str(folder))
    settings.prompts.train = "tiny"
    assembly.trainer(settings).close()
    assert caplog.text.count("none for 10 of the 12 layers") == 1


def test_a_resumed_run_does_not_read_it(tmp_path: Path):
    settings = settings_of(tmp_path, adapter="/nope")
    settings.resume = "latest"
    assert assembly.models.starting_adapter(settings) is None


def test_a_run_that_begins_anew_for_want_of_a_checkpoint_reads_it(tmp_path: Path):
    settings = settings_of(tmp_path, adapter="/nope")
    settings.resume = "latest"
    settings.prompts.train = "tiny"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 0")
    with pytest.raises(ConfigError, match=r"policy\.adapter: .*/nope"):
        assembly.trainer(settings)


# ---------------------------------------------------------------------- files that others can read


@pytest.mark.parametrize("name", ["sd3", "causal_lm"])
def test_saved_weights_have_the_mode_of_other_files(tmp_path: Path, name: str):
    plain = tmp_path / "plain"
    plain.touch()
    policy = assembly.policy(settings_of(tmp_path, name=name), CPU)
    with checkpoint.atomic_folder(tmp_path / "step-000001") as partial:
        (partial / "ema").mkdir()
        policy.save(partial)
        policy.save(partial / "ema")
    modes = {
        stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "step-000001").rglob("*")
        if path.is_file()
    }
    assert modes == {stat.S_IMODE(plain.stat().st_mode)}


# ---------------------------------------------------------------------- base models


def test_a_missing_folder_is_told_at_once(tmp_path: Path):
    for path in ("/nope", "./nope", "../nope", "models/sd/nope"):
        for name in ("sd3", "causal_lm"):
            with pytest.raises(ConfigError, match=r"policy\.path: should be a folder.*Found none"):
                assembly.policy(settings_of(tmp_path, path=path, name=name), CPU)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Found a file"):
        assembly.policy(settings_of(tmp_path, path=str(tmp_path / "file")), CPU)


@pytest.mark.parametrize("name", ["sd3", "causal_lm"])
def test_a_hub_that_does_not_answer_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    asked = []

    def model_info(self, *arguments: object, timeout: float, **options: object) -> None:
        asked.append(arguments)
        assert 2 * timeout < 10  # to connect, and to read: seconds
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(ConfigError, match=r"policy\.path: .*there is no folder .*does not answer"):
        assembly.policy(settings_of(tmp_path, path="owner/name", name=name), CPU)
    assert asked == [("owner/name",)]
    # A run asks before it makes heads, which may load models of their own.
    monkeypatch.setattr("moa_diffusion.assembly.trainers.scorers", None)
    train = assembly.text_trainer if name == "causal_lm" else assembly.trainer
    with pytest.raises(ConfigError, match=r"`hf auth login` if it is private or gated; or name a"):
        train(settings_of(tmp_path, path="owner/name", name=name))
    assert len(asked) == 2
