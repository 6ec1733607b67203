"""How good an image looks to people, whatever it shows: a linear reading of its CLIP embedding."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.base import RewardError
from rewards.heads.clip import build_clip, embed_images
from rewards.pretrained.base import Dtype, ModelHead, ModelOptions
from rewards.pretrained.locate import Weights, check_name, find_weights
from rewards.pretrained.open_clip_models import build_visual, check_architecture, image_size
from rewards.pretrained.preprocessing import Preprocessing, read_preprocessing
from rewards.pretrained.tensors import read_tensors
from rewards.registry import register

Backbone = Literal["transformers", "open_clip"]

_BACKBONES: dict[str, str] = {
    "transformers": "openai/clip-vit-large-patch14",
    "open_clip": "timm/vit_large_patch14_clip_224.openai:open_clip_model.safetensors",
}
_HEAD = "sac+logos+ava1-l14-linearMSE.pth"
_HEAD_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
_HEAD_SOURCE = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
_LAYER = re.compile(r"layers\.(\d+)\.(weight|bias)")


@register("aesthetic")
class Aesthetic(ModelHead):
    """How good the image looks to people, as a rating from 1 to 10; the prompt is not read.

    Higher is better, about 4 to 7. The LAION aesthetic predictor V2 (Schuhmann 2022,
    https://github.com/christophschuhmann/improved-aesthetic-predictor): layers without
    activations on the embedding of CLIP ViT-L/14, scaled to length 1.

    Deviations: the layers are multiplied out to one affine map when they are loaded, in float64.

    Args:
        model: The CLIP model, as folder, file, ``package://NAME/PATH`` or hub model: for
            transformers the folder, for open_clip the file of weights. By default OpenAI's
            ViT-L/14.
        backbone: What runs the CLIP model: ``transformers`` or ``open_clip``.
        architecture: Name of the model in open_clip, which its files do not tell. OpenAI's
            weights need a name that ends in ``-quickgelu``: without, they load and score wrongly.
        predictor: The layers, named as a model is. By default the published file, from a copy on
            the hub that the digest verifies.
        predictor_sha256: Expected SHA-256 digest of the layers; null for a head of one's own.
        dtype: Precision of the CLIP model: ``float32``, ``bfloat16`` or ``float16``.
        options: See ``ModelOptions``.

    Raises:
        ValueError: If a parameter is wrong.
        ImportError: If ``backbone`` is ``open_clip`` and it is not installed.
    """

    unit = "rating from 1 to 10"

    def __init__(
        self,
        model: str | None = None,
        backbone: Backbone = "transformers",
        architecture: str = "ViT-L-14-quickgelu",
        predictor: str = f"camenduru/improved-aesthetic-predictor:{_HEAD}",
        predictor_sha256: str | None = _HEAD_SHA256,
        dtype: Dtype = "float32",
        **options: Unpack[ModelOptions],
    ) -> None:
        if backbone not in _BACKBONES:
            raise ValueError(
                f"Parameter `backbone` should be one of {', '.join(_BACKBONES)}. "
                f"Found `backbone = {backbone!r}`."
            )
        super().__init__(
            model=_BACKBONES[backbone] if model is None else model, dtype=dtype, **options
        )
        check_name(predictor, option="predictor")
        self.backbone = backbone
        self.architecture = architecture
        self.predictor = predictor
        self.predictor_sha256 = predictor_sha256
        if backbone == "open_clip":
            self.required: Sequence[str] = ()
            check_architecture(architecture, needed_by="The backbone `open_clip`", reads_text=False)
        else:
            self.required = ("config.json", "preprocessor_config.json")
        self._predictor_used: dict[str, str] = {}
        self._affine: tuple[Tensor, Tensor] | None = None
        self._preprocess: Preprocessing | None = None

    def provenance(self) -> Mapping[str, str]:
        """Return model, precision, backbone and head; once loaded, also revisions and digests."""
        return {**super().provenance(), "backbone": self.backbone, **self._predictor_used}

    def _recipe(self) -> Hashable:
        if self.backbone == "open_clip":
            return self.architecture
        return build_clip  # shared with `clipscore`

    def _build(self, weights: Weights) -> nn.Module:
        if self.backbone == "open_clip":
            return build_visual(self.architecture, weights).to(self.dtype)
        return build_clip(weights, self.dtype)

    def _prepare(self, weights: Weights) -> None:
        if self.backbone == "open_clip":
            side = image_size(self.architecture)
            self._preprocess = Preprocessing(side=side, crop=side, rounding="even")
        else:
            self._preprocess = read_preprocessing(weights.folder / "preprocessor_config.json")
        try:
            files = find_weights(self.predictor, required=())
        except RewardError as error:
            raise RewardError(
                f"{error.cause} The published head is the file {_HEAD} of {_HEAD_SOURCE}: put it "
                f"where you like and set `predictor` to its path."
            ) from error
        digest = files.digest()
        files.expect(self.predictor_sha256, digest, option="predictor_sha256")
        self._affine = read_affine(files)
        self._predictor_used = {
            "predictor": files.model,
            "predictor_revision": files.revision,
            "predictor_sha256": digest,
        }

    def _score_batch(self, module: Any, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert self._preprocess is not None and self._affine is not None  # `_prepare` ran
        pixels = self._preprocess(images).to(self.device, self.dtype)
        if self.backbone == "open_clip":
            embedded = F.normalize(module(pixels).float(), dim=-1).cpu()  # [n, D]
        else:
            embedded = embed_images(module, pixels)  # [n, D]
        weight, bias = self._affine  # [D], []
        if len(weight) != embedded.shape[-1]:
            raise RewardError(
                f"The predictor `{self.predictor}` reads {len(weight)} numbers, and `{self.model}` "
                f"makes {embedded.shape[-1]} of an image. Name two that fit."
            )
        return embedded.double() @ weight + bias


def read_affine(weights: Weights, *, prefix: str = "") -> tuple[Tensor, Tensor]:
    """Multiply out a head of linear layers.

    ``layers.{i}.weight``, ``layers.{i}.bias``, any widths.

    Layers follow each other in the order of i; numbers left out were dropout. With layers
    W_i x + b_i the product is w x + b with w = W_k ... W_1 and b = W_k (... b_1) + b_k.

    Args:
        weights: The files that hold the head.
        prefix: Only the tensors whose names start so are meant, and their names without it.

    Returns:
        ``w [D]`` and ``b []``, float64.

    Raises:
        RewardError: If names or shapes are others.
    """
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in read_tensors(weights).items()
        if name.startswith(prefix)
    }
    matches = {name: _LAYER.fullmatch(name) for name in tensors}
    layers = sorted({int(match[1]) for match in matches.values() if match})
    whole = len(tensors) == 2 * len(layers) and all(matches.values())
    if not layers or not whole:
        raise RewardError(
            f"The head {weights.model} should hold `{prefix}layers.N.weight` and "
            f"`{prefix}layers.N.bias` for some N and nothing else. Found: {', '.join(tensors)}."
        )
    first = tensors[f"layers.{layers[0]}.weight"]
    total = torch.eye(first.shape[-1], dtype=torch.float64)
    offset = torch.zeros(first.shape[-1], dtype=torch.float64)
    try:
        for layer in layers:
            weight = tensors[f"layers.{layer}.weight"].double()  # [out, in]
            total = weight @ total  # [out, D]
            offset = weight @ offset + tensors[f"layers.{layer}.bias"].double()  # [out]
        return total.view(first.shape[-1]), offset.view(())
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise RewardError(
            f"The layers of the head {weights.model} do not fit each other, or do not end in one "
            f"number: {shapes}."
        ) from error
