"""Files of LoRA weights: which one is meant, what is in it, and whose format it is.

diffusers' ``pytorch_lora_weights`` and peft's ``adapter_model`` with its ``adapter_config.json``
are read, in a folder or named as a file. Any other format is named for what it is, by the names of
its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moa_diffusion.types import ConfigError

DIFFUSERS = "pytorch_lora_weights.safetensors"
PEFT = "adapter_model.safetensors"
CONFIG = "adapter_config.json"  # peft writes it beside its weights
_USUAL = (DIFFUSERS, PEFT, "pytorch_lora_weights.bin", "adapter_model.bin")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

# What tensors of other formats are called; the first pattern that is found in a name decides.
_FORMATS = (
    (r"hada_w[12]_", "a LoHa of LyCORIS (Hadamard products)"),
    (r"lokr_", "a LoKr of LyCORIS (Kronecker products)"),
    (r"dora_scale|lora_magnitude_vector", "a DoRA, which also scales the columns of the weights"),
    (r"oft_blocks|oft_diag|oft_r\b|boft_", "an OFT, which rotates the weights"),
    (r"ia3_l|on_input$", "an (IA)^3, which scales activations"),
    (r"lora_E\b|\.ranknum\b", "an AdaLoRA, which also has singular values"),
    (r"lora_mid", "a LyCORIS LoRA of convolutions"),
    (r"\.[ab][12]\.weight$", "a GLoRA of LyCORIS"),
    (r"\.diff(_b)?$|\.[wb]_norm$", "differences of whole weights, of LyCORIS"),
    (r":\d+:(up|down)$", "a LoRA of cloneofsimo, whose layers have numbers"),
    (r"prompt_embeddings|soft_prompt", "prompt tuning, which is no LoRA"),
    (r"^(clip_[gl]|t5xxl|emb_params|string_to_param.*)$", "a textual inversion, which is no LoRA"),
    (r"controlnet|control_model|lllite_", "a ControlNet"),
    (r"ip_adapter|^image_proj\.", "an IP-Adapter"),
    (r"^lora_unet_(double|single)_blocks", "a kohya-ss LoRA of Flux or HunyuanVideo"),
    (r"^lora_unet_joint_blocks", "a kohya-ss LoRA of Stable Diffusion 3, with q, k, v in one"),
    (r"^lora_unet_blocks_\d+_(self_attn|cross_attn|ffn)", "a kohya-ss LoRA of Wan"),
    (r"^lora_unet_.*joint_attention|^lora_transformer_", "a kohya-ss or LyCORIS LoRA"),
    (
        r"^lora_unet_(down|mid|up|input|middle|output)_",
        "a kohya-ss LoRA of a U-Net (Stable Diffusion 1.5, 2 or XL)",
    ),
    (r"^lora_unet_", "a kohya-ss LoRA of another model"),
    (r"^lora_(prior_)?te", "a kohya-ss LoRA of text encoders"),
    (r"blocks\.\d+\.processor\.\w+_lora\d?\.(down|up)", "an XLabs LoRA of Flux"),
    (
        r"^(model\.diffusion_model|first_stage_model|cond_stage_model)\.",
        "a whole checkpoint, not a LoRA",
    ),
)
# What layers of other models are called, with or without a LoRA.
_MODELS = (
    (r"double_blocks\.\d+\.(img|txt)_attn_|context_embedder\.token_refiner\.", "HunyuanVideo"),
    (r"(^|[._])(double|single)_blocks[._]\d", "Flux or HunyuanVideo in its authors' names"),
    (r"(^|\.)blocks\.\d+\.(self_attn\.|cross_attn\.|attn[12]\.|ffn\.(\d|net))", "Wan"),
    (r"(^|\.)joint_blocks\.\d", "Stable Diffusion 3 in Stability AI's names"),
    (r"joint_transformer_blocks\.", "AuraFlow"),
    (r"(^|\.)transformer_blocks\.\d+\.(img|txt)_(mlp|mod)\.", "Qwen-Image"),
    (r"(^|\.)single_transformer_blocks\.", "Flux, or of HunyuanVideo"),
    (r"(^|\.)(double|single)_stream_blocks\.", "HiDream"),
    (
        r"(^|\.)(down|mid|up|input|middle|output)_blocks?\.",
        "a U-Net (Stable Diffusion 1.5, 2 or XL)",
    ),
    (
        r"(^|\.)transformer_blocks\.\d+\.attn1\.",
        "a transformer with cross-attention (PixArt, Sana, LTX, CogVideoX or Mochi)",
    ),
)
# What the layers of text encoders are called: CLIP's and T5's, in a pipeline or by themselves.
_TEXT_ENCODER = re.compile(
    r"^(base_model\.model\.)?(text_encoders?(_\d)?\.|te\d?[._]|clip_[gl]\.|t5\w*\.|"
    r"text_model\.|encoder\.block\.\d)"
)
# Wrappers of a model in training, whose names come before the model's own.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
_DDP = "module."
# What is at the start of a file that is no file of weights.
_OTHER_FILES = (
    (b"version https://git-lfs", "a pointer of git-lfs: `git lfs pull` fetches the file itself"),
    (b"<", "a web page or XML, perhaps of a download that needed a login"),
    (b"GGUF", "a GGUF file of llama.cpp"),
    (b"\x80", "a pickle of PyTorch under another name"),
    (b"PK", "a pickle of PyTorch under another name"),
)
_PARTS = (
    (_TEXT_ENCODER.pattern, "a text encoder"),
    (r"(^|\.)(self_attn|mlp|c_attn|query_key_value)\.|\.h\.\d+\.", "a language model"),
    (r"(^|\.)transformer_blocks\.", "an image transformer"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraFile:
    """A file of LoRA weights, read."""

    path: Path
    state: Mapping[str, Tensor]  # by the names of layers in the model, ``...lora_A.weight``
    metadata: Mapping[str, str]  # what the file's header says
    config: Path | None  # adapter_config.json beside it, if peft wrote the weights


def read_lora_file(place: Path, prefixes: tuple[str, ...], *, of: str) -> LoraFile:
    """Read a file of LoRA weights, or the one in a folder.

    Args:
        place: Folder or file.
        prefixes: The prefixes of the names of tensors, of which all have the same one, or none.
        of: What the weights should be of, for messages: "transformer".

    Raises:
        ConfigError: If there is none, it is damaged, of another format or another kind of model,
            or has values that are not finite.
    """
    path = find_lora_file(place)
    state, metadata = _tensors(path)
    if not state:
        raise ConfigError(f"LoRA weights `{path}` should be of the {of} alone. Found no tensors.")
    if format_name := foreign_format(state):
        raise ConfigError(
            f"LoRA weights `{path}` should be a LoRA that diffusers or peft wrote. Found "
            f"{format_name} (`{next(iter(state))}`)."
        )
    state = _unwrapped(state)
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in state)), "")
    others = [name for name in state if not name.startswith(prefix) or not _is_lora(name)]
    if others:
        what = _first(_PARTS, others[:1])
        raise ConfigError(
            f"LoRA weights `{path}` should be of the {of} alone"
            f"{f', `{prefix} ...`' if prefix else ''}. Found `{others[0]}`"
            f"{f', of {what}' if what else ''}."
        )
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ConfigError(
                f"LoRA weights `{path}` should be floating-point numbers. Found `{name}` of "
                f"{tensor.dtype}."
            )
        if not bool(tensor.float().isfinite().all()):  # 8-bit numbers do not say so themselves
            raise ConfigError(f"LoRA weights `{path}` should be finite. Found NaN in `{name}`.")
    peft = path.name.startswith("adapter_model") or prefix == "base_model.model."
    config = path.with_name(CONFIG)
    if peft and not config.is_file():
        raise ConfigError(
            f"`{path.parent}` should be a folder that peft wrote: the scale of `{path.name}` "
            f"stands in {CONFIG}. Found no {CONFIG} in it."
        )
    return LoraFile(
        path=path,
        # A state of the model itself has the adapter's name in it.
        state={
            name.removeprefix(prefix).replace(".default.weight", ".weight"): tensor
            for name, tensor in state.items()
        },
        metadata=metadata,
        config=config if peft else None,
    )


def find_lora_file(place: Path) -> Path:
    """Return the file of LoRA weights that a folder or a file means.

    Raises:
        ConfigError: If there is none, or more than one that could be meant.
    """
    if place.is_file():
        return _readable(place)
    if not place.is_dir():
        raise ConfigError(f"LoRA weights `{place}` do not exist.")
    for name in _USUAL:
        if (place / name).is_file():
            return place / name
    files = sorted(path for path in place.iterdir() if path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors"]
    pickles = [path for path in files if path.suffix in _PICKLES and path.name != "state.pt"]
    inside = sorted(
        {path.parent.relative_to(place) for n in _USUAL for path in place.glob(f"*/{n}")}
    )
    whole = next((n for n in ("model_index.json", "config.json") if (place / n).is_file()), None)
    if (place / "config.yaml").is_file() or (place / "checkpoints").is_dir():
        contents = "the folder of a run; --run evaluates its checkpoints, and a checkpoint's folder"
        contents = f"{contents} (checkpoints/step-000020, or ema in it) holds LoRA weights"
    elif whole is not None:
        contents = f"{whole}: a whole model, not a LoRA"
    elif len(weights) == 1:
        return weights[0]
    elif weights:
        contents = f"{len(weights)} files, of which one has to be named: {_listed(weights)}"
    elif inside:
        contents = (
            f"some in the folder{'s' if inside[1:] else ''} {', '.join(map(str, inside))} in it"
        )
    elif pickles:
        return _readable(pickles[0])
    else:
        contents = _listed(files) or "no file"
    raise ConfigError(
        f"LoRA weights should be in `{place}`: {DIFFUSERS}, or {PEFT} with {CONFIG}. Found "
        f"{contents}."
    )


def _readable(path: Path) -> Path:
    if path.suffix == ".safetensors" or path.name in _USUAL:
        return path
    kind = repr(path.suffix or path.name)
    if path.suffix in _PICKLES:
        kind += (
            ": a pickle of PyTorch, which may run any code. `safetensors.torch.save_file("
            "torch.load(..., weights_only=True), ...)` converts tensors"
        )
    raise ConfigError(f"LoRA weights `{path}` should be a .safetensors file. Found {kind}.")


def _listed(files: Iterable[Path]) -> str:
    names = [path.name for path in files]
    return ", ".join(names[:5]) + (", ..." if names[5:] else "")


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from pickle import UnpicklingError

    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return state, file.metadata() or {}
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, UnpicklingError, RuntimeError, EOFError) as error:
        raise damaged(path, error, f"LoRA weights `{path}` are damaged") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ConfigError(f"LoRA weights `{path}` should be tensors by name. Found other objects.")
    return state, {}


def damaged(path: Path, error: Exception, so: str) -> ConfigError:
    """Return the error about a file that cannot be read; it says what the file is, if known.

    Args:
        path: An existing file.
        error: The error that the reader raised.
        so: A clause that says that the file is damaged.
    """
    with path.open("rb") as file:
        start = file.read(32)
    contents = next((kind for mark, kind in _OTHER_FILES if start.lstrip().startswith(mark)), None)
    # A safetensors file begins with a length, which may look like a mark.
    if start[8:9] == b"{":
        contents = None
    if not start:
        contents = "an empty file"
    elif contents is None or (path.suffix in _PICKLES and start[:2] in (b"PK", b"\x80\x02")):
        return ConfigError(f"{so} ({type(error).__name__}: {error}).")
    return ConfigError(f"{so}. Found {contents}.")


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the names of what a model is wrapped in for training, such as DDP's ``module.``."""
    plain = {_WRAPPERS.sub("", name).removeprefix("."): tensor for name, tensor in state.items()}
    if all(name.startswith(_DDP) for name in plain):
        plain = {name.removeprefix(_DDP): tensor for name, tensor in plain.items()}
    return plain if len(plain) == len(state) else state


def _is_lora(name: str) -> bool:
    return re.search(r"(?<![a-z])lora\d?[_.]", name) is not None


def foreign_format(names: Iterable[str]) -> str | None:
    """Return which format these names of tensors are of; None if diffusers or peft write such.

    Args:
        names: The names of all tensors of a file.
    """
    every = list(names)
    if format_name := _first(_FORMATS, every):
        return format_name
    model = _first(_MODELS, every)
    if not any(_is_lora(name) for name in every):
        if other := _other_adapter(every):
            return f"a {other} of peft, which is no LoRA"
        what = model or _first(_PARTS, every)
        return f"whole weights{f' of {what}' if what else ''}, not a LoRA"
    if all(_TEXT_ENCODER.match(name) for name in every):
        return "a LoRA of a text encoder, which is not trained here"
    comfy = any(name.startswith("diffusion_model.") for name in every)
    if model or comfy:
        return f"a {'ComfyUI ' if comfy else ''}LoRA{f' of {model}' if model else ''}"
    if any(re.search(r"\.(network_)?alpha$|^lora_", name) for name in every):
        return "a LoRA in the names of kohya-ss or LyCORIS, with `alpha` beside the tensors"
    return None


def _first(patterns: Iterable[tuple[str, str]], names: Iterable[str]) -> str:
    """Return what the first pattern means that is found in a name; "" for none."""
    every = list(names)
    matches = (what for pattern, what in patterns if any(re.search(pattern, n) for n in every))
    return next(matches, "")


def _other_adapter(names: Iterable[str]) -> str:
    """Return which of peft's other kinds of adapters has such tensors; "" for none."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING as PREFIXES

    parts = [part for name in names for part in name.split(".")]
    kinds = (kind for kind, prefix in PREFIXES.items() if any(p.startswith(prefix) for p in parts))
    return next((kind.value for kind in kinds), "")
