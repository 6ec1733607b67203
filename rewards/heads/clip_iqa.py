"""What CLIP says of an image when asked to choose between two sentences: CLIP-IQA."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.base import RewardError
from rewards.pretrained.base import Dtype, ModelHead, ModelOptions
from rewards.pretrained.locate import Weights
from rewards.pretrained.open_clip_models import build_model, check_architecture, package
from rewards.pretrained.preprocessing import normalise
from rewards.registry import register


@register("clip_iqa")
class ClipIqa(ModelHead):
    """How much more the image is like one sentence than like its opposite, from 0 to 1.

    Higher is better; the prompt is not read. CLIP-IQA (Wang et al. 2022,
    https://arxiv.org/abs/2207.12396, equation 2): the softmax over two sentences of the logit scale
    times the cosine, from CLIP's ResNet-50 without its positional embedding, so that images keep
    their size. The two sentences are the question: "Sharp photo." and "Blurry photo." ask for
    sharpness, and several such heads share one model.

    Images are not resized, so the score depends on the resolution, and memory grows with it: beside
    the weights, 16 images take 0.99 GB at 512 x 512 pixels and 3.96 GB at 1024 x 1024 in float32;
    a smaller ``batch_size`` takes less. The published weights were not at hand: the head was tested
    on small random weights.

    Args:
        model: The CLIP model's file of open_clip: file, ``package://NAME/PATH`` or hub model.
        architecture: Its name in open_clip: a ResNet. OpenAI's weights need a name that ends in
            ``-quickgelu``.
        good: The sentence that a good image is like.
        bad: The sentence that a bad image is like.
        dtype: Precision: ``float32``, ``bfloat16`` or ``float16``.
        options: See ``ModelOptions``.

    Raises:
        ValueError: If a parameter is wrong.
        ImportError: If open_clip is not installed.
    """

    unit = "probability"
    required = ()

    def __init__(
        self,
        model: str = "timm/resnet50_clip.openai:open_clip_model.safetensors",
        architecture: str = "RN50-quickgelu",
        good: str = "Good photo.",
        bad: str = "Bad photo.",
        dtype: Dtype = "float32",
        **options: Unpack[ModelOptions],
    ) -> None:
        super().__init__(model=model, dtype=dtype, **options)
        check_architecture(architecture, needed_by='The head "clip_iqa"', reads_text=True)
        sizes = package('The head "clip_iqa"').get_model_config(architecture)
        if not isinstance(sizes["vision_cfg"].get("layers"), list):
            raise ValueError(
                f"Parameter `architecture` should be that of a ResNet, which reads images of any "
                f"size, such as RN50-quickgelu. Found `architecture = {architecture!r}`."
            )
        for name, sentence in (("good", good), ("bad", bad)):
            if not sentence.strip():
                raise ValueError(
                    f"Parameter `{name}` should be a sentence. Found `{name} = {sentence!r}`."
                )
        if good == bad:
            raise ValueError(
                f"Parameters `good` and `bad` should be two sentences. Found {good!r} twice."
            )
        self.architecture = architecture
        self.sentences = (good, bad)
        self._pair: Tensor | None = None  # their embeddings, [2, D] of length 1

    def provenance(self) -> Mapping[str, str]:
        """Return model, precision and question; once loaded, also the revision and the digest."""
        good, bad = self.sentences
        return {
            **super().provenance(),
            "architecture": self.architecture,
            "good": good,
            "bad": bad,
        }

    def _recipe(self) -> Hashable:
        return ClipIqa, self.architecture

    def _build(self, weights: Weights) -> nn.Module:
        model: Any = build_model(self.architecture, weights)
        pool = model.visual.attnpool
        # No position is added, for any number of them.
        pool.positional_embedding = nn.Parameter(
            torch.zeros_like(pool.positional_embedding[:1]), requires_grad=False
        )
        scale = model.logit_scale.detach().float()
        # In bfloat16 the exponential of the rounded scale would be 1 % off.
        model.to(self.dtype).logit_scale.data = scale
        built: nn.Module = model
        return built

    def _prepare(self, weights: Weights) -> None:
        self._pair = None

    def _score_batch(self, module: Any, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if self._pair is None:
            self._pair = self._read(module)
        smallest = 32  # pixels that are one place of the last layer
        if min(images.shape[-2:]) < smallest:
            raise RewardError(
                f"Images should be at least {smallest} pixels high and wide. "
                f"Found {images.shape[-2]} x {images.shape[-1]}."
            )
        # Normalised on the device: as uint8 images are a quarter of the bytes to copy.
        pixels = normalise(images.to(self.device)).to(self.dtype)
        seen = F.normalize(module.encode_image(pixels).float(), dim=-1)  # [n, D]
        logits = module.logit_scale.exp() * seen @ self._pair.to(seen.device).T  # [n, 2]
        return logits.softmax(-1)[:, 0]

    def _read(self, module: Any) -> Tensor:
        tokenizer = package('The head "clip_iqa"').get_tokenizer(self.architecture)
        token_ids = tokenizer(list(self.sentences)).to(self.device)
        return F.normalize(module.encode_text(token_ids).float(), dim=-1)
