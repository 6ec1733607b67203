"""Does a head work here? Builds and loads it, and scores two samples that everybody has."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from rewards.base import Kind, RewardBatch, RewardError, RewardHead, Scores
from rewards.blame import passed
from rewards.registry import create

PROMPT = 'A red circle on a white wall, below it the black word "MARBLE"'
_SIDE = 512  # pixels


class Unusable(RuntimeError):
    """A head cannot be used here; the message says why and how to mend it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """The scores of two samples, and what they took."""

    scores: Scores  # the fitting sample's, then the degraded one's
    seconds: float  # for both
    provenance: Mapping[str, str]


def prepare(
    name: str,
    options: Mapping[str, Any],
    path: str | None = None,
    *,
    kind: Kind | None = None,
) -> RewardHead:
    """Build a head and load what it needs.

    Args:
        name: See ``rewards.create``.
        options: Options of the head.
        path: See ``rewards.create``.
        kind: What it is to score, which is checked before anything is loaded; None: anything.

    Raises:
        Unusable: If the head is unknown or scores something else, an option is wrong, a package
            is missing, or weights or a server cannot be had.
    """
    try:
        head = create(name, path, **options)
    except Exception as error:  # a head of somebody else's may raise anything
        plain = isinstance(error, ValueError | ImportError | RewardError)  # they say what to do
        message = str(error) if plain else f"{error!r}{passed(error)}"
        raise Unusable(f'Head "{name}": {message}{_advice(error)}') from error
    try:
        if kind is not None:
            head.expect(kind)
        head.load()
        if kind is not None:
            head.expect(kind)  # a remote one knows only now
    except Exception as error:  # a head of somebody else's may raise anything
        head.close()
        message = (
            str(error)
            if isinstance(error, RewardError)
            else f'Head "{name}": {error!r}{passed(error)}'
        )
        raise Unusable(f"{message}{_advice(error)}") from error
    return head


def try_head(head: RewardHead, *, texts: bool = False) -> Checked:
    """Score a fitting and a degraded sample: texts if the head scores nothing else, or images.

    Args:
        head: A head as ``prepare`` returns it.
        texts: Whether to have it score texts if it scores both.

    Raises:
        RewardError: If the head fails.
    """
    began = time.monotonic()
    scores = head.evaluate(_texts() if texts or head.scores == "texts" else _images())
    return Checked(
        scores=scores,
        seconds=time.monotonic() - began,
        provenance=dict(head.provenance()),
    )


def _advice(error: BaseException) -> str:
    # The heads of this package say themselves what to do; libraries raise an OSError for weights
    # that are not there.
    if not isinstance(error, OSError):
        return ""
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if name in os.environ]
    if offline:
        return f" Downloads are forbidden by {' and '.join(offline)}: unset it, or name a folder."
    return " If there is no network here, copy the weights and name their folder as `model`."


def _images() -> RewardBatch:
    good = Image.new("RGB", (_SIDE, _SIDE), "white")
    draw = ImageDraw.Draw(good)
    draw.ellipse((146, 60, 366, 280), fill=(220, 20, 20))
    font = ImageFont.load_default(size=96)
    draw.text((_SIDE / 2, 390), "MARBLE", fill="black", font=font, anchor="mm")
    bad = good.filter(ImageFilter.GaussianBlur(24)).convert("L").convert("RGB")
    pixels = torch.from_numpy(np.stack([np.asarray(good), np.asarray(bad)]))  # [2, H, W, 3]
    images = pixels.permute(0, 3, 1, 2).float().div(255)  # [2, 3, H, W]
    return RewardBatch(prompts=[PROMPT, PROMPT], images=images)


def _texts() -> RewardBatch:
    prompt = "What is the capital of France?"
    answers = ["The capital of France is Paris.", "capital capital wall France the the"]
    return RewardBatch(prompts=[prompt, prompt], texts=answers)
