"""Cheap statistics of outputs: a reward that is being gamed shows in them before anybody looks.

A policy that is paid for brightness draws white, one that is paid for a small file draws nothing,
one that has collapsed draws the same image for every seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moa_diffusion.statistics.groups import group_moments
from moa_diffusion.types import Outputs

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
CUTOFF = 0.25  # cycles per pixel; the highest that an image can hold is 0.5
THUMBNAIL = 16  # side at which siblings are compared, in pixels


def statistics(
    outputs: Outputs, *, device: torch.device | None = None, batch: int = 8
) -> dict[str, Tensor]:
    """Return numbers about each output: ``[n]`` float64 by name, on the CPU.

    Args:
        outputs: N images or texts.
        device: Where images are looked at; where they are by default.
        batch: Images there at a time.
    """
    if not isinstance(outputs, Tensor):
        return of_texts(outputs)
    parts = [of_images(part.to(device or part.device)) for part in outputs.split(batch)]
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    table = torch.stack(list(rows.values())).cpu().double()  # waits for the device once
    return dict(zip(rows, table, strict=True))


def of_images(images: Tensor) -> dict[str, Tensor]:
    """Return what changes when images bleach, blacken, blur or fill with noise.

    Args:
        images: Images ``[n, 3, H, W]`` float32 in [0, 1].

    Returns:
        ``[n]`` float32 each: ``brightness`` and ``contrast`` (mean and standard deviation of the
        luma), ``saturation`` (mean of HSV's, in [0, 1]), ``high_frequency`` (share of the luma's
        power, its mean left out, beyond a quarter of a cycle per pixel; 0 for a plain image).
    """
    red, green, blue = (weight * images[:, c] for c, weight in enumerate(LUMA))
    luma = red + green + blue  # [n, H, W]
    highest, lowest = images.amax(1), images.amin(1)  # [n, H, W]
    saturation = (highest - lowest) / torch.where(highest > 0, highest, 1.0)
    # Twice: the mean of many pixels is rounded, and a plain image should be left with nothing.
    deviation = luma - luma.mean((1, 2), keepdim=True)
    deviation -= deviation.mean((1, 2), keepdim=True)
    contrast = deviation.square().mean((1, 2)).sqrt()

    power = torch.view_as_real(torch.fft.rfft2(deviation)).square().sum(3)  # [n, H, W // 2 + 1]
    height, width = luma.shape[1:]
    power[:, :, 1 : (width + 1) // 2] *= 2  # the negative frequencies, which are left out
    rows = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    columns = torch.fft.rfftfreq(width, dtype=torch.float64)[None]
    fine = ((rows.square() + columns.square()).sqrt() > CUTOFF).to(power.device)
    total = power.sum((1, 2))
    plain = contrast < 1e-6  # what is left is rounding
    high = torch.where(plain, 0.0, (power * fine).sum((1, 2)) / torch.where(plain, 1.0, total))
    return {
        "brightness": luma.mean((1, 2)),
        "saturation": saturation.mean((1, 2)),
        "contrast": contrast,
        "high_frequency": high,
    }


def of_texts(texts: Sequence[str]) -> dict[str, Tensor]:
    """Return ``words``, and ``distinct``: the share of a text's words that differ (1 if empty)."""
    words = [text.casefold().split() for text in texts]
    return {
        "words": torch.tensor(
            [float(len(text_words)) for text_words in words], dtype=torch.float64
        ),
        "distinct": torch.tensor(
            [len(set(text_words)) / len(text_words) if text_words else 1.0 for text_words in words],
            dtype=torch.float64,
        ),
    }


def fingerprints(outputs: Outputs) -> Tensor | list[list[str]]:
    """Return what ``diversity`` needs of outputs: thumbnails ``[n, d]``, or the texts' words."""
    if isinstance(outputs, Tensor):
        small = torch.nn.functional.adaptive_avg_pool2d(
            outputs, (min(THUMBNAIL, outputs.shape[2]), min(THUMBNAIL, outputs.shape[3]))
        )
        return small.flatten(1).double()
    return [sorted(set(text.casefold().split())) for text in outputs]


def diversity(kept: Tensor | Sequence[Sequence[str]], groups: Tensor) -> float:
    """Return how much siblings differ, 0 if they are all alike; NaN without any.

    Args:
        kept: ``fingerprints`` of N outputs.
        groups: Group ids ``[N]``, equal for siblings.

    Returns:
        Images: the root mean square over thumbnails' pixels of the standard deviation within a
        group. Texts: the mean over pairs of siblings of the share of their words that only one has
        (Jaccard's distance).
    """
    _, index, count = torch.unique(groups, return_inverse=True, return_counts=True)
    shared = count[index] > 1  # [N]
    if not shared.any():
        return float("nan")
    if isinstance(kept, Tensor):
        _, std, _ = group_moments(kept.T, groups)  # [d, N]
        return float(std[:, shared].square().mean().sqrt())
    distances = []
    for group in range(len(count)):
        members = [set(kept[i]) for i in (index == group).nonzero().flatten().tolist()]
        for one, other in itertools.combinations(members, 2):
            union = len(one | other)
            distances.append(1 - len(one & other) / union if union else 0.0)
    return sum(distances) / len(distances)


def prefixed(kind: str, outputs: Outputs, values: Mapping[str, float]) -> dict[str, float]:
    """Return the names of metrics: ``image/<statistic>`` or ``text/<statistic>`` after a prefix.

    Args:
        kind: The prefix: empty for rollouts, ``eval_`` for evaluations.
        outputs: Images or texts, which decides between the two.
        values: The statistics by name.
    """
    what = "image" if isinstance(outputs, Tensor) else "text"
    return {f"{kind}{what}/{name}": value for name, value in values.items()}
