"""How well an image fits its prompt by CLIP, and by PickScore, which is CLIP tuned on votes."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.base import RewardError
from rewards.heads.prompt_tokens import PromptHead
from rewards.pretrained.base import Dtype, ModelOptions
from rewards.pretrained.locate import Weights, check_name, find_weights
from rewards.pretrained.preprocessing import Preprocessing, read_preprocessing
from rewards.pretrained.tensors import load_pretrained, read_tensor
from rewards.registry import register

_PREPROCESSING = "preprocessor_config.json"
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # either set will do
_PROCESSOR = (
    _PREPROCESSING,
    "tokenizer_config.json",
    "special_tokens_map.json",
    *(name for names in _TOKENIZERS for name in names),
)
_MOST_TEXTS = 4096  # embeddings kept, 16 MB at width 1024


class TwoTowerHead(PromptHead):
    """A head on a model that embeds images and prompts in one space, and prompts once.

    Args:
        model: See ``ModelHead``.
        dtype: See ``ModelHead``.
        options: See ``ModelOptions``.
    """

    def __init__(self, *, model: str, dtype: Dtype, **options: Unpack[ModelOptions]) -> None:
        super().__init__(model=model, dtype=dtype, **options)
        self._texts: OrderedDict[str, Tensor] = OrderedDict()  # prompt -> [D] of length 1

    @abstractmethod
    def _embed_images(self, module: Any, images: Tensor) -> Tensor:
        """Return embeddings of images ``[n, 3, H, W]``, uint8: ``[n, D]`` of length 1, on the CPU.

        They are float32, as those of prompts are.
        """

    @abstractmethod
    def _embed_prompts(self, module: Any, prompts: Sequence[str]) -> Tensor:
        """Return embeddings of prompts, cut where they are too long: ``[n, D]`` of length 1."""

    def cosine(self, module: Any, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosines between the embeddings of images and prompts.

        Args:
            module: The model.
            images: Images ``[n, 3, H, W]``, uint8.
            prompts: The n prompts.

        Returns:
            ``[n]`` in [-1, 1], float32, on the CPU.
        """
        seen = self._embed_images(module, images)  # [n, D]
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            self._texts.update(zip(new, self._embed_prompts(module, new), strict=True))
        read = torch.stack([self._texts[prompt] for prompt in prompts])  # [n, D]
        for prompt in prompts:
            self._texts.move_to_end(prompt)
        while len(self._texts) > _MOST_TEXTS:
            self._texts.popitem(last=False)
        return (seen * read).sum(dim=-1)


class ClipHead(TwoTowerHead):
    """A head on a ``CLIPModel`` of transformers and the tokenizer that belongs to it.

    A prompt is cut at the number of tokens that the model reads (77), see ``PromptHead``.

    Args:
        model: See ``ModelHead``.
        processor: Where the tokenizer and ``preprocessor_config.json`` come from, named as a model
            is; by default the model, if it has these files, else ``default_processor``.
        dtype: See ``ModelHead``.
        options: See ``ModelOptions``.
    """

    default_processor: ClassVar[str]
    optional = _PROCESSOR

    def __init__(
        self,
        *,
        model: str,
        processor: str | None,
        dtype: Dtype,
        **options: Unpack[ModelOptions],
    ) -> None:
        super().__init__(model=model, dtype=dtype, **options)
        if processor is not None:
            check_name(processor, option="processor")
        self.processor = processor
        self._processor_used: dict[str, str] = {}
        self._preprocess: Preprocessing | None = None

    def provenance(self) -> Mapping[str, str]:
        """Return model, precision and processor; once loaded, also revisions and the digest."""
        return {**super().provenance(), **self._processor_used}

    def _recipe(self) -> Hashable:
        return build_clip

    def _build(self, weights: Weights) -> nn.Module:
        return build_clip(weights, self.dtype)

    def _prepare(self, weights: Weights) -> None:
        from transformers import CLIPTokenizer

        files = self._processor_files(weights)
        self._preprocess = read_preprocessing(files.folder / _PREPROCESSING)
        self._tokenizer = CLIPTokenizer.from_pretrained(files.folder, local_files_only=True)
        self._texts.clear()
        self._processor_used = {"processor": files.model, **files.origin("processor_")}

    def _processor_files(self, weights: Weights) -> Weights:
        if self.processor is None and _is_processor(weights):
            return weights
        named = self.processor or self.default_processor
        files = find_weights(named, required=(_PREPROCESSING,), optional=_PROCESSOR, tensors=False)
        if not _is_processor(files):
            raise RewardError(
                f"The processor `{named}` lacks a tokenizer in {files.folder}: "
                f"{', or '.join(' and '.join(names) for names in _TOKENIZERS)}."
            )
        return files

    def _embed_images(self, module: Any, images: Tensor) -> Tensor:
        assert self._preprocess is not None  # `_prepare` ran before the first batch
        return embed_images(module, self._preprocess(images).to(self.device, self.dtype))

    def _embed_prompts(self, module: Any, prompts: Sequence[str]) -> Tensor:
        output = module.get_text_features(**self._read(module, prompts))
        return F.normalize(output.pooler_output.float(), dim=-1).cpu()

    def _longest(self, module: Any) -> int:
        return min(
            self._tokenizer.model_max_length, module.config.text_config.max_position_embeddings
        )


@register("pickscore")
class PickScore(ClipHead):
    """Which image people would pick for the prompt: exp(logit scale) times the CLIP cosine.

    Higher is better, about 17 to 26; published results are in this unit, some divided by 26.
    PickScore v1 (Kirstain et al. 2023, https://arxiv.org/abs/2305.01569, equation 1): CLIP
    ViT-H/14 tuned on choices between two images, so that a difference of scores is the log odds
    of the choice.

    Args:
        model: Weights in the format of transformers: folder, ``package://NAME/PATH`` or hub model.
        processor: Tokenizer and preprocessing; by default the model's, if it has them, else those
            of ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``, as published.
        dtype: Precision: ``float32``, ``bfloat16`` or ``float16``.
        options: See ``ModelOptions``.

    Raises:
        ValueError: If a parameter is wrong.
    """

    unit = "log odds of being picked"
    default_processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = None,
        dtype: Dtype = "float32",
        **options: Unpack[ModelOptions],
    ) -> None:
        super().__init__(model=model, processor=processor, dtype=dtype, **options)

    def _score_batch(self, module: Any, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scale = module.logit_scale.exp().cpu()
        return scale * self.cosine(module, images, prompts)


@register("clipscore")
class ClipScore(ClipHead):
    """How well the image fits the prompt: the cosine of their CLIP embeddings.

    Higher is better, from -1 to 1, in practice 0.1 to 0.4. CLIPScore (Hessel et al. 2021,
    https://arxiv.org/abs/2104.08718).

    Deviations: without the factor of 2.5, and negative cosines stay; the weights are ViT-L/14
    instead of ViT-B/32.

    Args:
        model: Weights in the format of transformers: folder, ``package://NAME/PATH`` or hub model.
        processor: Tokenizer and preprocessing; by default the model's, if it has them, else those
            of ``openai/clip-vit-large-patch14``.
        dtype: Precision: ``float32``, ``bfloat16`` or ``float16``.
        options: See ``ModelOptions``.

    Raises:
        ValueError: If a parameter is wrong.
    """

    unit = "cosine"
    default_processor = "openai/clip-vit-large-patch14"

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        dtype: Dtype = "float32",
        **options: Unpack[ModelOptions],
    ) -> None:
        super().__init__(model=model, processor=processor, dtype=dtype, **options)

    def _score_batch(self, module: Any, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.cosine(module, images, prompts)


def build_clip(weights: Weights, dtype: torch.dtype) -> nn.Module:
    """Return a ``CLIPModel`` of transformers on the CPU.

    Raises:
        RewardError: If the weights are damaged or do not fit.
    """
    from transformers import CLIPModel

    # Files written by old versions hold the positions 0, 1, 2, ... too.
    model: Any = load_pretrained(CLIPModel, weights, dtype=dtype, ignore=("position_ids",))
    # In bfloat16 the exponential of the rounded scale would be 1 % off.
    model.logit_scale.data = read_tensor(weights, "logit_scale").float()
    return model


def embed_images(module: Any, pixels: Tensor) -> Tensor:
    """Return the embeddings of preprocessed images ``[n, 3, S, S]``.

    They are ``[n, D]`` of length 1, float32, on the CPU.
    """
    output = module.get_image_features(pixel_values=pixels)
    return F.normalize(output.pooler_output.float(), dim=-1).cpu()


def _is_processor(files: Weights) -> bool:
    return files.has(_PREPROCESSING) and any(files.has(*names) for names in _TOKENIZERS)
