"""Images made small enough that a page with all of them stays under a number of bytes."""

from __future__ import annotations

import base64
import bisect
import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

from moa_diffusion.types import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How small a thumbnail is."""

    side: int  # the longer edge in pixels; smaller images stay as they are
    quality: int  # WebP's, 0 to 100


# From the best on: fewer pixels first, then lower quality.
LADDER = tuple(
    Size(side=side, quality=quality)
    for side, quality in (
        *((512, 90), (512, 82), (384, 82), (320, 82), (256, 82), (192, 82), (160, 82)),
        *((128, 82), (96, 82), (96, 60), (96, 40), (64, 40), (64, 20)),
    )
)
TRIED = 24  # images from which the bytes of all are estimated
MARGIN = 1.03  # factor by which that estimate is raised
QUOTES = 3  # bytes of JSON around each image


def thumbnails(files: Sequence[Path], room: int) -> list[str]:
    """Return WebP files in Base64, at the best size at which they fit together.

    Args:
        files: N different image files.
        room: Bytes for all of them, as a JSON list of strings.

    Returns:
        N strings.

    Raises:
        ConfigError: If they do not fit even at the smallest size, or one cannot be read.
    """
    if not files:
        return []
    tried = [files[i] for i in range(0, len(files), -(-len(files) // TRIED))]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:

        @cache
        def estimate(rung: int) -> float:
            return _length(pool.map(_encode, tried, [LADDER[rung]] * len(tried))) / len(tried)

        factor, rung, needed = MARGIN, 0, 0
        while rung < len(LADDER):
            per_image = room / len(files) / factor
            # The first rung that fits; from one to the next the bytes fall.
            rung = bisect.bisect_left(
                range(len(LADDER) - 1), -per_image, lo=rung, key=lambda i: -estimate(i)
            )
            encoded = list(pool.map(_encode, files, [LADDER[rung]] * len(files)))
            needed = _length(encoded)
            if needed <= room:
                return encoded
            # Those tried were smaller than the others.
            factor = needed / len(files) / estimate(rung) * MARGIN
            rung += 1
    raise ConfigError(
        f"budget: should leave {needed} bytes for {len(files)} images of "
        f"{LADDER[-1].side} pixels. Found {max(room, 0)}. Evaluate fewer prompts, seeds or "
        "checkpoints in one table."
    )


def _length(encoded: Iterable[str]) -> int:
    return sum(len(text) + QUOTES for text in encoded)


def _encode(path: Path, size: Size) -> str:
    target = io.BytesIO()
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except OSError as error:
        raise ConfigError(
            f"`{path}` should be an image of the evaluation. {error}. Evaluate again: the same "
            "command draws what is missing."
        ) from error
    small.thumbnail((size.side, size.side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    small.save(target, format="WEBP", quality=size.quality, method=4)
    return base64.b64encode(target.getvalue()).decode("ascii")
