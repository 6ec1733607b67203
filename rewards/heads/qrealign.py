"""Image quality as Q-ReAlign rates it: the reading of DeQA-Score on a small current model."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Unpack

from torch import Tensor, nn

from rewards.base import RewardError, Scores
from rewards.heads.levels import LEVELS, rate
from rewards.pretrained.base import Dtype, ModelHead, ModelOptions
from rewards.pretrained.locate import Weights
from rewards.pretrained.tensors import load_pretrained
from rewards.pretrained.tokens import PROCESSOR_FILES, chat_text, load_processor
from rewards.registry import register

_QUESTION = "How would you rate the quality of this image?"
_STEM = "The quality of the image is"
_WORTH = (1.0, 0.75, 0.5, 0.25, 0.0)  # from excellent to bad


@register("qrealign")
class QRealignHead(ModelHead):
    """How good people would find the quality of the image: 0 bad to 1 excellent.

    Higher is better; the prompt is not looked at. Q-ReAlign
    (https://github.com/Q-Future/Q-ReAlign) is Q-Align (Wu et al. 2023,
    https://arxiv.org/abs/2312.17090) on Qwen3.5-VL: asked to rate the image, the model goes on
    after "The quality of the image is" with a word, which is read as a rating, see
    ``rewards.heads.levels``. The scores table also gets the probability of each level. Question,
    reading and weights of the levels are those of the authors' quick start.

    The default weights have 0.8 billion parameters, 2.2 GB in half precision, under the Apache
    licence 2.0 as their model card says; the 4 and 9 billion ones (``q-future/Q-ReAlign-Lite-4B``,
    ``q-future/Q-ReAlign-Pro-9B``) load alike. Three of four layers are slow on a GPU without the
    packages flash-linear-attention and causal-conv1d, of which transformers tells.

    The published weights were not at hand: that this head computes what the quick start computes
    was tested on a small model of the same class with random weights. The turn of the assistant
    begins as the chat template of the weights has it by default; they were trained without
    thinking, so a template that opens a thought there would be wrong for them.

    Args:
        model: Folder with ``config.json``, weights, tokenizer and processor, or hub model.
        dtype: Precision; the weights are published in bfloat16.
        options: See ``ModelOptions``.

    Raises:
        ValueError: If a parameter is wrong or names a folder or device that is not there.
        ImportError: If transformers is older than 5.2, which brought the model.
    """

    unit = "rating, 0 to 1"
    required = ("config.json", "tokenizer.json", "tokenizer_config.json")
    optional = PROCESSOR_FILES

    def __init__(
        self,
        model: str = "q-future/Q-ReAlign-Mini-0.8B",
        dtype: Dtype = "bfloat16",
        **options: Unpack[ModelOptions],
    ) -> None:
        if importlib.util.find_spec("transformers.models.qwen3_5") is None:
            raise ImportError(
                'The head "qrealign" needs transformers 5.2 or later. Install with: '
                'pip install --upgrade "transformers>=5.2"'
            )
        super().__init__(model=model, dtype=dtype, **options)
        self._processor: Any = None
        self._text = ""
        self._level_ids: list[int] = []

    def _build(self, weights: Weights) -> nn.Module:
        from transformers import Qwen3_5ForConditionalGeneration

        return load_pretrained(Qwen3_5ForConditionalGeneration, weights, dtype=self.dtype)

    def _prepare(self, weights: Weights) -> None:
        from transformers import Qwen3VLProcessor

        processor = load_processor(Qwen3VLProcessor, weights)
        words = processor.tokenizer([f" {level}" for level in LEVELS], add_special_tokens=False)
        level_ids = [ids[0] for ids in words.input_ids]
        if len(set(level_ids)) < len(LEVELS):
            raise RewardError(
                f"The tokenizer in {weights.folder} does not tell {', '.join(LEVELS)} apart by "
                f"their first token. Found {level_ids}. Name the tokenizer that the model was "
                f"trained with."
            )
        self._processor, self._level_ids = processor, level_ids
        self._text = chat_text(processor, _QUESTION) + _STEM

    def _score_batch(self, module: nn.Module, images: Tensor, prompts: Sequence[str]) -> Scores:
        # Images of one size give sequences of one length, so nothing needs padding.
        inputs = self._processor(
            text=[self._text] * len(images), images=list(images.cpu()), return_tensors="pt"
        ).to(self.device)
        logits = module(**inputs, logits_to_keep=1, use_cache=False).logits  # [n, 1, V]
        return rate(logits[:, -1, self._level_ids], _WORTH)
