"""How well and how fast the OCR engines read words whose text is known."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.phases import machine
from rewards import RewardBatch, RewardError
from rewards.heads.ocr.engines import ENGINES
from rewards.heads.ocr.head import OcrHead
from rewards.heads.ocr.target_text import legibility

SIDES = (512, 64)  # pixels
NOISES = (0.0, 0.1, 0.2)  # standard deviation, in units of full scale
HEIGHTS = {512: (0.07, 0.25), 64: (0.2, 0.5)}  # the font's height, as a share of the side
WIDTH = 0.9  # share of the side: longer texts are set smaller
CONTRAST = 90.0  # least difference in brightness between text and ground, of 255
BRIGHTNESS = (0.299, 0.587, 0.114)  # parts of red, green and blue in it
TARGETS = {("rapidocr", 512, 0.0): (0.98, 90.0)}  # at least exact, at most ms
WORDS = (
    *("OPEN", "STOP", "BREAD", "COFFEE", "GARDEN", "MUSIC", "SALE", "OCEAN", "TAXI", "1987"),
    *("Market", "Station", "Harbour", "Welcome", "Library", "Hotel", "Museum", "River", "Night"),
    *("bakery", "flowers", "pizza", "school", "bridge", "tickets", "fresh", "today", "quiet", "24"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """An image of known text."""

    text: str
    pixels: np.ndarray  # [side, side, 3] uint8, RGB


def measure_ocr(images: int, *, seed: int = 0) -> dict[str, Any]:
    """Read the same images with every engine that is installed, in this process.

    Args:
        images: Images per side and level of noise.
        seed: Seed of texts, fonts' sizes, colours, positions and noise.

    Returns:
        A list ``rows`` with the shares that were read ``exact``, the ``mean`` score of the
        reward and the CPU ``milliseconds`` per image, subprocesses included; and by engine its
        ``provenance``, or in ``absent`` why it was left out.
    """
    torch.set_num_threads(1)
    sets = {
        (side, noise): renderings(images, side=side, noise=noise, seed=seed)
        for side in SIDES
        for noise in NOISES
    }
    rows: list[dict[str, Any]] = []
    provenance, absent = {}, {}
    for engine in ENGINES:
        try:
            head = OcrHead(engine, workers=0)
            head.load()
        except (ImportError, RewardError) as error:  # no package or program; no weights
            absent[engine] = str(error)
            continue
        with closing(head):
            rows += [_row(head, engine, *case, drawn) for case, drawn in sets.items()]
            provenance[engine] = head.provenance()
    return {
        "images": images,
        "seed": seed,
        "machine": machine(),
        "provenance": provenance,
        "absent": absent,
        "rows": rows,
    }


def renderings(count: int, *, side: int, noise: float, seed: int) -> list[Rendering]:
    """Return one or two words each, anywhere in an image of one colour, in Pillow's own font.

    Args:
        count: Number of images.
        side: Side of the square images, a key of ``HEIGHTS``.
        noise: Standard deviation of Gaussian noise, in units of full scale.
        seed: Seed of everything random; the words do not depend on the noise.
    """
    words, grain = (np.random.default_rng([seed, side, part]) for part in range(2))
    made = []
    for _ in range(count):
        clean = _draw(words, side)
        noisy = clean.pixels + 255 * noise * grain.standard_normal(clean.pixels.shape)
        pixels = noisy.clip(0, 255).round().astype(np.uint8)
        made.append(Rendering(text=clean.text, pixels=pixels))
    return made


def _draw(source: np.random.Generator, side: int) -> Rendering:
    text = " ".join(source.choice(WORDS, source.integers(1, 3), replace=False))
    ground, ink = _colours(source)
    size = round(side * source.uniform(*HEIGHTS[side]))
    while True:
        font = ImageFont.load_default(size)
        left, top, right, bottom = font.getbbox(text)
        if right - left <= WIDTH * side:
            break
        size -= 1
    x, y = source.uniform(0, side - (right - left)), source.uniform(0, side - (bottom - top))
    image = Image.new("RGB", (side, side), ground)
    ImageDraw.Draw(image).text((x - left, y - top), text, font=font, fill=ink)
    return Rendering(text=text, pixels=np.asarray(image))


def _colours(source: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Draw the colours of ground and ink."""
    while True:
        ground, ink = source.integers(0, 256, (2, 3))
        if abs(np.dot(ground - ink, BRIGHTNESS)) >= CONTRAST:
            return tuple(ground.tolist()), tuple(ink.tolist())


def _row(
    head: OcrHead, engine: str, side: int, noise: float, images: Sequence[Rendering]
) -> dict[str, Any]:
    pixels = torch.from_numpy(np.stack([image.pixels for image in images]))
    batch = RewardBatch(
        prompts=[f'a sign that says "{image.text}"' for image in images],
        images=pixels.permute(0, 3, 1, 2).float() / 255,
    )
    start = _cpu_seconds()
    scores = head.evaluate(batch)
    seconds = _cpu_seconds() - start
    pairs = zip(scores.extra["read"], images, strict=True)
    exact = [legibility(read, image.text, substring_ok=False) == 1 for read, image in pairs]
    return {
        "engine": engine,
        "side": side,
        "noise": noise,
        "exact": float(np.mean(exact)),
        "mean": float(scores.values.mean()),
        "milliseconds": 1e3 * seconds / len(images),
        "target": TARGETS.get((engine, side, noise)),
    }


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and the processes it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
