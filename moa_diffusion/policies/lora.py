"""LoRA on a diffusers or transformers model: attach, switch off, save for every loader."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moa_diffusion.policies.forward import AddedForward, LoraForward, MergedForward, Record

ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


def attach(
    model: Any,
    *,
    rank: int,
    alpha: int,
    target_modules: Sequence[str],
    seed: int,
    task: str | None = None,
    merge: bool = True,
) -> None:
    """Add one float32 LoRA adapter (A normal, B zero: the model is unchanged at first).

    Args:
        model: A diffusers or transformers model with peft support; frozen here.
        rank: The rank of the update.
        alpha: The update is multiplied by ``alpha / rank``.
        target_modules: Suffixes of the linear layers to adapt.
        seed: The seed of A's draw; the global generator is left alone.
        task: Peft's name of the model's task, for loaders that choose a class by it.
        merge: Whether float32 layers multiply by weight and update in one (``MergedForward``), and
            keep a copy of the weight for it, instead of peft's forward pass.

    Raises:
        ValueError: If a name matches no layer.
    """
    from peft import LoraConfig

    model.requires_grad_(False)
    check_targets(model, target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        init_lora_weights="gaussian",
        target_modules=list(target_modules),
        task_type=task,
        fan_in_fan_out=any(
            isinstance(module, _conv1d()) and name.endswith(tuple(target_modules))
            for name, module in model.named_modules()
        ),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # peft draws on the CPU; others stay as they are
        model.add_adapter(config)
    for parameter in parameters(model).values():
        parameter.data = parameter.data.float()
    for layer in layers(model):
        # peft casts every input to float32, and autocast casts it back.
        layer.cast_input_dtype_enabled = False
        base = layer.base_layer
        if not isinstance(base, nn.Linear):
            continue
        # A method: of other objects, torch.compile would make a graph for each.
        if base.weight.dtype in AddedForward.dtypes:
            layer.forward = AddedForward(layer).__call__
        elif merge and base.weight.dtype in MergedForward.dtypes:
            layer.forward = MergedForward(layer).__call__


def check_targets(model: nn.Module, target_modules: Sequence[str]) -> None:
    """Check that each suffix names linear layers.

    Raises:
        ValueError: Naming the first that does not.
    """
    names = _linear_layers(model)
    for target in target_modules:
        if not any(name.endswith(target) for name in names):
            raise ValueError(
                "Parameter `target_modules` should name linear layers of "
                f"{type(model).__name__}. Found no layer that ends in {target!r}."
            )


def projections(model: Any) -> list[str]:
    """Return the last names of all linear layers of a language model but its output embedding."""
    head = model.get_output_embeddings()
    layers = _linear_layers(model)
    return sorted({name.rpartition(".")[2] for name in layers if layers[name] is not head})


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Linear, _conv1d())
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _conv1d() -> type[nn.Module]:
    """Return GPT-2's linear layer, whose weight is ``[in, out]``."""
    from transformers.pytorch_utils import Conv1D

    kind: type[nn.Module] = Conv1D
    return kind


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def layers(model: nn.Module) -> list[Any]:
    """Return the adapted layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def own_forward(layer: Any) -> LoraForward | None:
    """Return what computes an adapted layer in the place of peft, if anything does."""
    own = layer.forward.__self__ if inspect.ismethod(layer.forward) else None
    return own if isinstance(own, LoraForward) else None


def adapts(target_modules: Sequence[str], name: str) -> bool:
    """Return whether a layer of this name gets an adapter, by peft's rule: the name or its end."""
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


@torch.no_grad()
def start_from(model: Any, updates: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Put updates ``B A`` into the adapter of a model, which ``attach`` has just added.

    What the adapter has beyond them, layers and ranks, keeps its A and a B of zero, so that the
    model is the base model with these updates, and all of the adapter can be trained.

    Args:
        model: A model with the adapter.
        updates: A ``[rank, in]`` and B ``[out, rank]`` by the name of an adapted layer, of at most
            the adapter's rank.
    """
    for name, (a, b) in updates.items():
        layer = model.get_submodule(name)
        layer.lora_A["default"].weight[: len(a)] = a
        layer.lora_B["default"].weight[:, : len(a)] = b / layer.scaling["default"]


class _Tap(torch.autograd.Function):
    """The identity on y; its backward pass hands over x and the gradient of y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, leaf: Tensor, linear: TappedLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.linear = linear
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        linear: TappedLinear = ctx.linear
        if linear.record is not None:
            linear.record(linear.weights[0], dy, *ctx.saved_tensors)
        return dy, None, None, None


class TappedLinear:
    """Replaces the ``forward`` of A or B, an ``nn.Linear``, where peft's own forward calls it.

    Outputs and gradients stay the same to the bit. While ``record`` is set, a backward pass that
    is asked for ``leaves`` calls it for ``weights``, and does not form their gradient, as nothing
    asked for leads there.

    Args:
        linear: A or B of an adapted layer.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.weights = (linear.weight,)
        self.leaves = (torch.zeros((), device=linear.weight.device, requires_grad=True),)
        self.record: Record | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer; with gradients, its backward pass records input and output."""
        if not torch.is_grad_enabled():
            return nn.Linear.forward(self.linear, x)
        if torch.is_autocast_enabled(x.device.type):
            # Autocast would do it; done here, x is kept once, as the linear layer keeps it.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = nn.Linear.forward(self.linear, x)
        tapped: Tensor = _Tap.apply(y, x.detach(), self.leaves[0], self)
        return tapped


def tapped(adapted: Sequence[Any]) -> list[LoraForward | TappedLinear]:
    """Make the adapted layers hand over what per-objective gradients are made of.

    Those with a ``LoraForward`` do so anyway; in the others A and B get a ``TappedLinear``, once.

    Args:
        adapted: The model's ``layers``.

    Returns:
        The ``layers`` of ``moa_diffusion.training.gradients.ObjectiveGradients``.
    """
    layers: list[LoraForward | TappedLinear] = []
    for layer in adapted:
        if (own := own_forward(layer)) is not None:
            layers.append(own)
            continue
        for linear in (layer.lora_A["default"], layer.lora_B["default"]):
            if not isinstance(linear.forward, TappedLinear):
                linear.forward = TappedLinear(linear)
            layers.append(linear.forward)
    return layers


@contextmanager
def disabled(adapted: Sequence[Any]) -> Iterator[None]:
    """Have the model be the reference within the block: its adapter is off.

    Args:
        adapted: The model's ``layers``, found once: walking the model costs a small model's
            forward pass.
    """
    for layer in adapted:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in adapted:
            layer.enable_adapters(True)


def folded_state(model: Any) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return the adapter with ``alpha / rank`` multiplied into B, and metadata with alpha = rank.

    Loaders that ignore the metadata assume alpha = rank: folded, they draw the same image.
    """
    from peft.utils import get_peft_model_state_dict

    config = model.peft_config["default"]
    scale = config.lora_alpha / config.r
    state = {
        name: (tensor * scale if ".lora_B." in name else tensor).detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(model).items()
    }
    metadata = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
    return state, {**metadata, "lora_alpha": config.r}


def save_sd3(model: Any, folder: Path) -> None:
    """Write ``pytorch_lora_weights.safetensors`` for ``StableDiffusion3Pipeline``."""
    from diffusers import StableDiffusion3Pipeline

    state, metadata = folded_state(model)
    StableDiffusion3Pipeline.save_lora_weights(
        folder, transformer_lora_layers=state, transformer_lora_adapter_metadata=metadata
    )


def save_peft(model: Any, folder: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` for ``PeftModel``."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(
        {f"base_model.model.{n}": t.detach().cpu().contiguous() for n, t in state.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    model.peft_config["default"].save_pretrained(folder)
