"""What one wants to know of a built-in head before using it: range, weights, memory, licence.

Facts about weights are those of their publishers; a licence that they do not state where the
weights lie reads "see source". Memory is that of the weights in the head's default precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCard:
    """Facts about one head."""

    range: str  # where scores lie; "about": where they lie in practice
    weights: str = "none"  # where they come from by default
    memory: str = "-"  # what the weights take
    licence: str = "Apache-2.0"  # that of weights and engines; this package's where there are none
    packages: tuple[str, ...] = ()  # import names, beside the core's, that it needs by default


CARDS: Mapping[str, HeadCard] = {
    "aesthetic": HeadCard(
        range="about 4 to 7",
        weights="CLIP ViT-L/14 and sac+logos+ava1-l14-linearMSE.pth",
        memory="428 M, 1.7 GB",
        licence="see source",
    ),
    "classifier": HeadCard(
        range="its model's own",
        weights="named by `model`",
        licence="see source",
    ),
    "clip_iqa": HeadCard(
        range="0 to 1",
        weights="timm/resnet50_clip.openai",
        memory="102 M, 0.4 GB",
        licence="MIT",
        packages=("open_clip",),
    ),
    "clipscore": HeadCard(
        range="-1 to 1, about 0.1 to 0.4",
        weights="openai/clip-vit-large-patch14",
        memory="428 M, 1.7 GB",
        licence="MIT",
    ),
    "colourfulness": HeadCard(range="0 to about 190"),
    "deqa": HeadCard(
        range="1 to 5",
        weights="zhiyuanyou/DeQA-Score-Mix3",
        memory="8.2 B, 16.4 GB",
        licence="MIT (code), Llama 2 (weights)",
    ),
    "format": HeadCard(range="0 or 1"),
    "hpsv2": HeadCard(
        range="about 0.2 to 0.35",
        weights="xswu/HPSv2, version 2.1",
        memory="986 M, 3.9 GB",
        licence="Apache-2.0",
        packages=("open_clip",),
    ),
    "imagereward": HeadCard(
        range="about -2 to 2",
        weights="zai-org/ImageReward",
        memory="446 M, 1.8 GB",
        licence="Apache-2.0",
    ),
    "jpeg_compressibility": HeadCard(range="at most 0"),
    "keyword": HeadCard(range="0 to 1"),
    "length": HeadCard(range="0.5 to 1.5"),
    "ocr": HeadCard(
        range="0 to 1",
        weights="inside rapidocr",
        memory="31 MB per worker",
        licence="Apache-2.0",
        packages=("rapidocr", "onnxruntime"),
    ),
    "pickscore": HeadCard(
        range="about 17 to 26",
        weights="yuvalkirstain/PickScore_v1",
        memory="986 M, 3.9 GB",
        licence="MIT",
    ),
    "prompt_colour": HeadCard(range="0 to 1"),
    "qrealign": HeadCard(
        range="0 to 1",
        weights="q-future/Q-ReAlign-Mini-0.8B",
        memory="0.8 B, 2.2 GB",
        licence="Apache-2.0",
    ),
    "remote": HeadCard(range="its own there", weights="on the server"),
    "repetition": HeadCard(range="-1 to 0"),
    "sharpness": HeadCard(range="0 to about 1e6"),
    "vqascore": HeadCard(
        range="0 to 1",
        weights="Qwen/Qwen3-VL-2B-Instruct",
        memory="2.1 B, 4.3 GB",
        licence="Apache-2.0",
    ),
}
