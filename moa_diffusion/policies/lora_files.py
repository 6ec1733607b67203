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
CONFIG = "adapter_config.json"  # of peft
_USUAL = (DIFFUSERS, PEFT, "pytorch_lora_weights.bin", "adapter_model.bin")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

# What tensors of other formats are called; the first pattern that is found in a name decides.
_FORMATS = (
    (r"hada_w[12]_", "a LoHa of LyCORIS (Hadamard products)"),
    (r"lokr_", "a LoKr of LyCORIS (Kronecker products)"),
    (r"dora_scale|lora_magnitude_vector", "a DoRA, which also scales the columns of the weights"),
    (r"oft_blocks|oft_diag|oft_r\b|boft_", "an OFT, which rotates the weights"),
    (r"ia3_l|on_input$", "an (IA)^3, which scales activations"),
    (r"lora_mid", "a LyCORIS LoRA of convolutions"),
    (r"prompt_embeddings|soft_prompt", "prompt tuning, which is no LoRA"),
    (r"^(clip_[gl]|t5xxl|emb_params|string_to_param.*)$", "a textual inversion, which is no LoRA"),
    (r"controlnet|control_model", "a ControlNet"),
    (r"^lora_unet_(double|single)_blocks", "a kohya-ss LoRA of Flux"),
    (r"^lora_unet_joint_blocks", "a kohya-ss LoRA of Stable Diffusion 3, with q, k, v in one"),
    (r"^lora_unet_.*joint_attention|^lora_transformer_", "a kohya-ss or LyCORIS LoRA"),
    (r"^lora_unet_", "a kohya-ss LoRA of a U-Net (Stable Diffusion 1.5, 2 or XL)"),
    (r"^lora_te", "a kohya-ss LoRA of text encoders"),
    (r"^diffusion_model\..*(double|single)_blocks", "a ComfyUI LoRA of Flux"),
    (r"^diffusion_model\.", "a ComfyUI LoRA"),
    (r"^(transformer\.|base_model\.model\.)?single_transformer_blocks\.", "a LoRA of Flux"),
    (
        r"^(unet|base_model\.model)\.(down|mid|up)_blocks?\.",
        "a LoRA of a U-Net (Stable Diffusion 1.5, 2 or XL)",
    ),
    (
        r"^(down|mid|up)_blocks?\..*(processor|lora)",
        "a LoRA of a U-Net (Stable Diffusion 1.5, 2 or XL)",
    ),
    (
        r"^(model\.diffusion_model|first_stage_model|cond_stage_model)\.",
        "a whole checkpoint, not a LoRA",
    ),
)
_PARTS = (
    (r"^text_encoder(_\d)?\.|^text_model\.", "a text encoder"),
    (r"(^|\.)(self_attn|mlp|c_attn|query_key_value)\.|\.h\.\d+\.", "a language model"),
    (r"(^|\.)transformer_blocks\.", "an image transformer"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraFile:
    """A file of LoRA weights, read."""

    path: Path
    state: Mapping[str, Tensor]  # by the names of layers in the model, ``...lora_A.weight``
    metadata: Mapping[str, str]  # of the file's header
    config: Path | None  # adapter_config.json beside it, if peft wrote the weights


def read_lora_file(place: Path, prefixes: tuple[str, ...], *, of: str) -> LoraFile:
    """Read a file of LoRA weights, or the one in a folder.

    Args:
        place: folder or file.
        prefixes: of the names of tensors, of which all have the same one, or none.
        of: what the weights should be of, for messages: "transformer".

    Raises:
        ConfigError: if there is none, it is damaged, of another format or another kind of model,
            or has values that are not finite.
    """
    path = find_lora_file(place)
    state, metadata = _tensors(path)
    if not state:
        raise ConfigError(f"LoRA weights `{path}` should be of the {of} alone. Found no tensors.")
    if found := foreign_format(state):
        raise ConfigError(
            f"LoRA weights `{path}` should be a LoRA that diffusers or peft wrote. Found {found} "
            f"(`{next(iter(state))}`)."
        )
    prefix = next((p for p in prefixes if sum(name.startswith(p) for name in state)), "")
    others = [name for name in state if not name.startswith(prefix) or not _is_lora(name)]
    if others:
        what = next((kind for pattern, kind in _PARTS if re.search(pattern, others[0])), "")
        raise ConfigError(
            f"LoRA weights `{path}` should be of the {of} alone"
            f"{f', `{prefix} ...`' if prefix else ''}. Found `{others[0]}`"
            f"{f', of {what}' if what else ''}."
        )
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
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
    """The file of LoRA weights that a folder or a file means.

    Raises:
        ConfigError: if there is none, or more than one that could be meant.
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
        found = "the folder of a run; --run evaluates its checkpoints, and a checkpoint's folder"
        found = f"{found} (checkpoints/step-000020, or ema in it) holds LoRA weights"
    elif whole is not None:
        found = f"{whole}: a whole model, not a LoRA"
    elif len(weights) == 1:
        return weights[0]
    elif weights:
        found = f"{len(weights)} files, of which one has to be named: {_listed(weights)}"
    elif inside:
        found = f"some in the folder{'s' if inside[1:] else ''} {', '.join(map(str, inside))} in it"
    elif pickles:
        return _readable(pickles[0])
    else:
        found = _listed(files) or "no file"
    raise ConfigError(
        f"LoRA weights should be in `{place}`: {DIFFUSERS}, or {PEFT} with {CONFIG}. Found {found}."
    )


def _readable(path: Path) -> Path:
    if path.suffix == ".safetensors" or path.name in _USUAL:
        return path
    kind = "a pickle of PyTorch, which may run any code" if path.suffix in _PICKLES else "no such"
    raise ConfigError(
        f"LoRA weights `{path}` should be a .safetensors file. Found {path.suffix or path.name!r}: "
        f"{kind}. `safetensors.torch.save_file(torch.load(..., weights_only=True), ...)` converts "
        "tensors."
    )


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
        raise ConfigError(f"LoRA weights `{path}` are damaged: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ConfigError(f"LoRA weights `{path}` should be tensors by name. Found other objects.")
    return state, {}


def _is_lora(name: str) -> bool:
    return re.search(r"lora[_.]", name) is not None


def foreign_format(names: Iterable[str]) -> str | None:
    """Which format these names of tensors are of; None if diffusers or peft write such.

    Args:
        names: of all tensors of a file.
    """
    every = list(names)
    for pattern, kind in _FORMATS:
        if any(re.search(pattern, name) for name in every):
            return kind
    if not any(_is_lora(name) for name in every):
        what = next((part for pattern, part in _PARTS for n in every if re.search(pattern, n)), "")
        return f"whole weights{f' of {what}' if what else ''}, not a LoRA"
    if any(re.search(r"\.alpha$|^lora_", name) for name in every):
        return "a LoRA in the names of kohya-ss or LyCORIS, with `alpha` beside the tensors"
    return None
