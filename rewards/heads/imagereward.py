"""Which image people would prefer for the prompt, by ImageReward: BLIP, trained on rankings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from rewards.base import RewardError
from rewards.heads.aesthetic import read_affine
from rewards.heads.prompt_tokens import PromptHead
from rewards.pretrained.base import Dtype, ModelOptions
from rewards.pretrained.locate import Weights, check_name
from rewards.pretrained.preprocessing import Preprocessing
from rewards.pretrained.tensors import load_strictly, read_tensor, read_tensors
from rewards.pretrained.tokens import find_tokenizer, load_tokenizer
from rewards.registry import register

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the layers' output, as published
_TOKENS = 35  # that are read of a prompt, with those for its beginning and end
_HEAD_WIDTH = 64  # channels of an attention head of the vision transformer, in all sizes of BLIP
_VISION, _TEXT, _MLP = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
_BLOCK = re.compile(re.escape(_VISION) + r"blocks\.(\d+)\.")
_CONFIG = "med_config.json"
_TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
)
_VISION_NAMES = (  # parts of names: in transformers, in the files
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("post_layernorm", "norm"),
    ("encoder.layers", "blocks"),
    ("layer_norm", "norm"),
    ("self_attn.projection", "attn.proj"),
    ("self_attn.qkv", "attn.qkv"),
)


@register("imagereward")
class ImageReward(PromptHead):
    """Which image people would prefer for the prompt: fit, quality and harmlessness in one number.

    Higher is better, about -2 to 2. ImageReward v1.0 (Xu et al. 2023,
    https://arxiv.org/abs/2304.05977): BLIP reads the prompt in sight of the image, and layers
    without activations turn its first token into a number, of which the published mean is
    subtracted and which is divided by the published standard deviation. A difference of the
    numbers before that is the log odds that people prefer the one image.

    The default weights have 446 million parameters, 1.8 GB in float32, under the Apache licence
    2.0. Sizes of the text encoder are read from ``med_config.json`` beside the weights. Those of
    the vision transformer are read from the shapes of its weights, with 64 channels per head as in
    both sizes of BLIP.

    A prompt is cut at 35 tokens, see ``PromptHead``.

    The published weights were not at hand: that this head computes what the authors' code computes
    was tested on small random weights.

    Deviations: the layers are multiplied out to one affine map when they are loaded, in float64.
    What a prompt holds of ``[DEC]`` and ``[ENC]`` is read as words.

    Args:
        model: File of weights beside ``med_config.json``: a path, ``package://NAME/PATH``, or
            ``OWNER/NAME:FILE`` on the hub.
        tokenizer: The tokenizer of BERT, named as a model is: a folder or a hub model.
        dtype: Precision of BLIP: ``float32``, ``bfloat16`` or ``float16``.
        options: See ``ModelOptions``.

    Raises:
        ValueError: If a parameter is wrong.
    """

    unit = "standard deviations"
    required = (_CONFIG,)

    def __init__(
        self,
        model: str = "zai-org/ImageReward:ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        dtype: Dtype = "float32",
        **options: Unpack[ModelOptions],
    ) -> None:
        super().__init__(model=model, dtype=dtype, **options)
        check_name(tokenizer, option="tokenizer")
        self.tokenizer = tokenizer
        self._tokenizer_used: dict[str, str] = {}
        self._affine: tuple[Tensor, Tensor] | None = None

    def provenance(self) -> Mapping[str, str]:
        """Return model and precision; once loaded, also tokenizer, revisions and the digest."""
        return {**super().provenance(), **self._tokenizer_used}

    def _longest(self, module: Any) -> int:
        return min(_TOKENS, module.text.config.max_position_embeddings)

    def _build(self, weights: Weights) -> nn.Module:
        return build_blip(weights).to(self.dtype)

    def _prepare(self, weights: Weights) -> None:
        text = _text_config(weights)
        files = find_tokenizer(self.tokenizer)
        tokenizer = load_tokenizer(files)
        if len(tokenizer) > text.vocab_size:
            raise RewardError(
                f"The tokenizer `{self.tokenizer}` should have at most the {text.vocab_size} "
                f"tokens that the model knows. Found {len(tokenizer)}. Name the one that the model "
                f"was trained with."
            )
        weight, bias = read_affine(weights, prefix=_MLP)
        if len(weight) != text.hidden_size:
            raise RewardError(
                f"The layers `{_MLP}layers` of `{self.model}` should read {text.hidden_size} "
                f"numbers, `hidden_size` in {_CONFIG}. Found {len(weight)}."
            )
        self._tokenizer, self._affine = tokenizer, (weight, bias)
        self._tokenizer_used = {"tokenizer": files.model, **files.origin("tokenizer_")}

    def _score_batch(self, module: Any, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert self._affine is not None  # `_prepare` ran
        side = module.vision.config.image_size
        preprocess = Preprocessing(side=side, crop=side, rounding="even")
        pixels = preprocess(images).to(self.device, self.dtype)  # [n, 3, S, S]
        first = module(pixels, **self._read(module, prompts))  # [n, D]
        weight, bias = self._affine  # [D], []
        return (first.double().cpu() @ weight + bias - _MEAN) / _STD


class Blip(nn.Module):
    """BLIP as far as ImageReward reads it: the prompt's first token, in sight of the image.

    Args:
        vision: A ``BlipVisionConfig`` of transformers.
        text: A ``BlipTextConfig``.
    """

    def __init__(self, vision: Any, text: Any) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last hidden state ``[n, D]`` of the first token.

        Args:
            pixels: Preprocessed images ``[n, 3, S, S]``.
            input_ids: Tokens of the prompts ``[n, T]``.
            attention_mask: 1 for a token and 0 for padding, ``[n, T]``.
        """
        seen = self.vision(pixel_values=pixels).last_hidden_state  # [n, 1 + patches, width]
        read = self.text(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen
        )
        first: Tensor = read.last_hidden_state[:, 0]
        return first


def build_blip(weights: Weights) -> Blip:
    """Return ImageReward's BLIP in the precision of its file, on the CPU.

    Raises:
        RewardError: If ``med_config.json`` or the weights are damaged or do not fit each other.
    """
    vision, text = _vision_config(weights), _text_config(weights)
    text.encoder_hidden_size = vision.hidden_size  # the file's `encoder_width` is of another size
    # On the meta device the model costs no memory and draws no random numbers.
    with torch.device("meta"):
        blip = Blip(vision, text)
    load_strictly(blip.vision, weights, prefix=_VISION, stored_as=_name_in_file)
    load_strictly(blip.text, weights, prefix=_TEXT, ignore=("position_ids",))
    # A constant, which is not loaded with the weights.
    places = torch.arange(text.max_position_embeddings).expand(1, -1)
    blip.text.embeddings.position_ids = places
    return blip


def _name_in_file(name: str) -> str:
    for ours, theirs in _VISION_NAMES:
        name = name.replace(ours, theirs)
    return name


def _vision_config(weights: Weights) -> Any:
    """Return a ``BlipVisionConfig`` of the sizes that the weights have.

    Raises:
        RewardError: If a tensor that tells them is missing or has another shape.
    """
    from transformers import BlipVisionConfig

    name = f"{_VISION}pos_embed"
    shape = read_tensor(weights, name).shape  # [1, 1 + grid^2, width]
    grid = math.isqrt(shape[1] - 1) if len(shape) == 3 and shape[1] > 1 else 0
    if not grid or shape[1] != grid**2 + 1 or shape[2] % _HEAD_WIDTH:
        raise RewardError(
            f"The tensor `{name}` of `{weights.model}` should have the shape [1, n^2 + 1, "
            f"{_HEAD_WIDTH} h], for n^2 patches and h heads. Found {list(shape)}."
        )
    patch = read_tensor(weights, f"{_VISION}patch_embed.proj.weight").shape[-1]
    inner = read_tensor(weights, f"{_VISION}blocks.0.mlp.fc1.weight").shape[0]
    blocks = {match[1] for match in map(_BLOCK.match, read_tensors(weights)) if match}
    return BlipVisionConfig(
        hidden_size=shape[2],
        intermediate_size=inner,
        num_hidden_layers=len(blocks),
        num_attention_heads=shape[2] // _HEAD_WIDTH,
        image_size=grid * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def _text_config(weights: Weights) -> Any:
    """Return a ``BlipTextConfig`` of the sizes in ``med_config.json``.

    Raises:
        RewardError: If the file is damaged, or a size is missing or no size.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import BlipTextConfig

    file = weights.folder / _CONFIG
    try:
        values = json.loads(file.read_text())
        return BlipTextConfig(**{key: values[key] for key in _TEXT_SIZES})
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise RewardError(
            f"The file {file} should give {', '.join(_TEXT_SIZES)} of the text encoder. "
            f"Found {type(error).__name__}: {error}."
        ) from error
