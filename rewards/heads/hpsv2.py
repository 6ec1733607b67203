"""Human Preference Score v2: CLIP tuned on which of several images people preferred."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Unpack

from torch import Tensor, nn
from torch.nn import functional as F

from rewards.heads.clip import TwoTowerHead
from rewards.pretrained.base import Dtype, ModelOptions
from rewards.pretrained.locate import Weights
from rewards.pretrained.open_clip_models import (
    build_model,
    check_architecture,
    image_size,
    package,
)
from rewards.pretrained.preprocessing import standardise
from rewards.registry import register

_HEAD = 'The head "hpsv2"'


@register("hpsv2")
class HpsV2(TwoTowerHead):
    """Which image people would prefer for the prompt: the cosine of a CLIP that was tuned on it.

    Higher is better, about 0.2 to 0.35. Human Preference Score v2 (Wu et al. 2023,
    https://arxiv.org/abs/2306.09341), by default the weights of version 2.1: CLIP ViT-H/14 tuned on
    rankings of images. Reports of the authors multiply by 100. Their code scores under autocast, in
    float16 on a card; here ``float32`` is the default.

    The longer side of an image is brought to the model's and the rest is black, by bicubic
    resampling of floating-point pixels, as the authors' code does with torchvision 0.17 or later;
    earlier versions resampled without antialiasing. The published weights were not at hand: the
    head was tested on small random weights.

    Args:
        model: A checkpoint of the authors, which holds the weights of an open_clip model under
            ``state_dict``: file, ``package://NAME/PATH`` or hub model.
        architecture: Name of the model in open_clip.
        dtype: Precision: ``float32``, ``bfloat16`` or ``float16``.
        options: See ``ModelOptions``.

    Raises:
        ValueError: If a parameter is wrong.
        ImportError: If open_clip is not installed.
    """

    unit = "cosine"
    required = ()

    def __init__(
        self,
        model: str = "xswu/HPSv2:HPS_v2.1_compressed.pt",
        architecture: str = "ViT-H-14",
        dtype: Dtype = "float32",
        **options: Unpack[ModelOptions],
    ) -> None:
        super().__init__(model=model, dtype=dtype, **options)
        check_architecture(architecture, needed_by=_HEAD, reads_text=True)
        self.architecture = architecture

    def provenance(self) -> Mapping[str, str]:
        """Return model, precision, architecture; once loaded, also the revision and the digest."""
        return {**super().provenance(), "architecture": self.architecture}

    def _recipe(self) -> Hashable:
        return HpsV2, self.architecture

    def _build(self, weights: Weights) -> nn.Module:
        model: nn.Module = build_model(self.architecture, weights, within="state_dict")
        return model.to(self.dtype)

    def _prepare(self, weights: Weights) -> None:
        self._tokenizer = package(_HEAD).get_tokenizer(self.architecture)
        self._texts.clear()

    def _token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        start, end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        return [[start, *self._tokenizer.encode(prompt), end] for prompt in prompts]

    def _part_read(self, prompt: str, longest: int) -> str:
        (token_ids,) = self._token_ids([prompt])
        # The first token stands for the beginning, and the last one for the end.
        text: str = self._tokenizer.decode(token_ids[1 : longest - 1])
        return text

    def _longest(self, module: Any) -> int:
        longest: int = module.context_length
        return longest

    def _embed_images(self, module: Any, images: Tensor) -> Tensor:
        pixels = letterbox(images, image_size(self.architecture)).to(self.device, self.dtype)
        return F.normalize(module.encode_image(pixels).float(), dim=-1).cpu()

    def _embed_prompts(self, module: Any, prompts: Sequence[str]) -> Tensor:
        self._warn_of_cuts(prompts, self._longest(module))
        tokens = self._tokenizer(list(prompts)).to(self.device)  # [n, context length]
        return F.normalize(module.encode_text(tokens).float(), dim=-1).cpu()

    def _score_batch(self, module: Any, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.cosine(module, images, prompts)


def letterbox(images: Tensor, side: int) -> Tensor:
    """Resample the longer side, centre the image on a black square, and normalise as CLIP does.

    Args:
        images: Images ``[n, 3, H, W]``, uint8, any device.
        side: Side of the square in pixels.

    Returns:
        ``[n, 3, side, side]``, float32, on the CPU.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transform

    pixels = images.cpu().float() / 255
    scale = side / max(pixels.shape[-2:])
    height, width = (round(extent * scale) for extent in pixels.shape[-2:])
    pixels = transform.resize(
        pixels, [height, width], InterpolationMode.BICUBIC, antialias=True
    )  # an image of this size stays as it is
    below, right = side - height, side - width
    margins = (right // 2, right - right // 2, below // 2, below - below // 2)
    return standardise(F.pad(pixels, margins))
