"""Image quality as DeQA-Score rates it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from torch import Tensor

from rewards.base import Scores
from rewards.heads.deqa.model import Deqa, load
from rewards.heads.levels import rate
from rewards.pretrained.base import Dtype, ModelHead, ModelOptions
from rewards.pretrained.locate import Weights
from rewards.pretrained.preprocessing import CLIP_MEAN, normalise, pad_to_square, resize
from rewards.registry import register

_WORTH = (5.0, 4.0, 3.0, 2.0, 1.0)  # from excellent to bad
_MARGIN = [int(255 * mean) for mean in CLIP_MEAN]  # R, G, B


@register("deqa")
class DeqaHead(ModelHead):
    """How good people would find the quality of the image: 1 bad to 5 excellent.

    Higher is better; the prompt is not looked at. DeQA-Score (You et al. 2025,
    https://arxiv.org/abs/2501.11561) asks a model that sees and speaks, "How would you rate the
    quality of this image?", and reads the next word of "The quality of the image is" as a rating,
    see ``rewards.heads.levels``. Flow-GRPO divides it by 5. The scores table also gets the
    probability of each level.

    The default weights have 8.2 billion parameters: 16.4 GB in half precision, on the device until
    ``offload``. The published code is under the MIT licence; the weights derive from LLaMA 2 and
    are under its community licence (https://ai.meta.com/llama/license).

    Deviations: the softmax over the levels is taken in float32, the published code takes it in
    half precision. The architecture is written anew, see ``rewards.heads.deqa.model``.

    Args:
        model: Folder with ``config.json`` and weights, or hub model.
        dtype: Precision; the published scores were computed in float16.
        options: See ``ModelOptions``.

    Raises:
        ValueError: If a parameter is wrong or names a folder or device that is not there.
    """

    unit = "rating, 1 to 5"

    def __init__(
        self,
        model: str = "zhiyuanyou/DeQA-Score-Mix3",
        dtype: Dtype = "float16",
        **options: Unpack[ModelOptions],
    ) -> None:
        super().__init__(model=model, dtype=dtype, **options)

    def _build(self, weights: Weights) -> Deqa:
        return load(weights).to(self.dtype)

    def _score_batch(self, module: Deqa, images: Tensor, prompts: Sequence[str]) -> Scores:
        side = module.config.vision.image_size
        pixels = normalise(resize(pad_to_square(images, _MARGIN), side, side))
        return rate(module(pixels.to(self.device, self.dtype)), _WORTH)
