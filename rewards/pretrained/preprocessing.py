"""What a vision model sees of an image: the reference preprocessing of CLIP, to the bit.

Bicubic resampling by Pillow on 8-bit pixels, then a crop of the centre, then normalisation in
float32. Published scores were computed so; resampling by torch or torchvision differs by 1 to 2
steps of 255, which shifts a score by more than its rounding. The result equals that of
transformers' ``CLIPImageProcessorPil`` and of open_clip's ``image_transform(is_train=False)``.

The two disagree on one thing: which row (or column) to start a crop at when an odd number of them
is cut off. transformers rounds the half down, torchvision, which open_clip uses, to the even
number. Both are here; square images are not concerned.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards.base import RewardError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Rounding = Literal["down", "even"]  # as transformers and as torchvision do it


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """Resize the shorter side, crop the centre, normalise.

    Raises:
        ValueError: If the crop is larger than the resized image or a number is not positive.
    """

    side: int  # shorter side after resizing, pixels
    crop: int  # side of the square cut from the centre, pixels
    mean: tuple[float, float, float] = CLIP_MEAN  # R, G, B in [0, 1]
    std: tuple[float, float, float] = CLIP_STD
    rounding: Rounding = "down"  # where an odd number of rows is cut off

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.side:
            raise ValueError(
                f"Parameter `crop` should be from 1 to `side`. "
                f"Found `crop = {self.crop}` with `side = {self.side}`."
            )
        if not min(self.std) > 0:
            raise ValueError(f"Parameter `std` should be positive. Found `std = {self.std}`.")

    def __call__(self, images: Tensor) -> Tensor:
        """Return what the model sees.

        Args:
            images: Images ``[N, 3, H, W]``, uint8, any device.

        Returns:
            ``[N, 3, crop, crop]``, float32, on the CPU.
        """
        resized = resize_shorter(images, self.side)
        return normalise(crop_centre(resized, self.crop, self.rounding), self.mean, self.std)


def read_preprocessing(file: Path) -> Preprocessing:
    """Read a ``preprocessor_config.json`` of CLIP.

    Raises:
        RewardError: If it asks for other steps than ``Preprocessing`` takes.
    """
    try:
        config = json.loads(file.read_text())
        steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        usual = (
            all(config.get(step, True) is True for step in steps)
            and not config.get("do_pad")
            and config.get("resample", Image.Resampling.BICUBIC) == Image.Resampling.BICUBIC
            and abs(config.get("rescale_factor", 1 / 255) - 1 / 255) < 1e-9
        )
        mean = tuple(config.get("image_mean", CLIP_MEAN))
        std = tuple(config.get("image_std", CLIP_STD))
        if not usual or len(mean) != 3 or len(std) != 3:
            raise ValueError(
                "expected are bicubic resizing, a crop of the centre and normalisation of R, G, B"
            )
        return Preprocessing(
            side=_side(config.get("size", 224), "shortest_edge"),
            crop=_side(config.get("crop_size", 224), "height", "width"),
            mean=mean,
            std=std,
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RewardError(f"The preprocessing in {file} cannot be done here: {error}.") from error


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Resample each image with Pillow's bicubic filter, enlarging or reducing.

    Args:
        images: Images ``[N, 3, H, W]``, uint8, any device.
        height: New height in pixels.
        width: New width in pixels.

    Returns:
        ``[N, 3, height, width]``, uint8, on the CPU.
    """
    images = images.cpu()
    if images.shape[-2:] == (height, width):
        return images
    arrays = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())  # [N, H, W, 3]
    resized = np.empty((len(arrays), height, width, 3), dtype=np.uint8)
    for index, array in enumerate(arrays):
        pil_image = Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)
        resized[index] = np.asarray(pil_image)
    return torch.from_numpy(resized).permute(0, 3, 1, 2).contiguous()


def resize_shorter(images: Tensor, side: int) -> Tensor:
    """Resample so that the shorter side has ``side`` pixels; the longer one is rounded down.

    Args:
        images: Images ``[N, 3, H, W]``, uint8, any device.
        side: Length of the shorter side, in pixels.

    Returns:
        ``[N, 3, h, w]``, uint8, on the CPU, with min(h, w) = side.
    """
    height, width = images.shape[-2:]
    if width <= height:
        return resize(images, int(side * height / width), side)
    return resize(images, side, int(side * width / height))


def crop_centre(images: Tensor, side: int, rounding: Rounding = "down") -> Tensor:
    """Cut a square from the centre: ``[N, 3, H, W]`` to ``[N, 3, side, side]``, same dtype.

    Args:
        images: Images ``[N, 3, H, W]``, at least ``side`` high and wide.
        side: Side of the square in pixels.
        rounding: Where the square lies if an odd number of pixels is cut off.
    """
    height, width = images.shape[-2:]
    top, left = ((extent - side) / 2 for extent in (height, width))
    if rounding == "down":
        top, left = int(top), int(left)
    else:
        top, left = round(top), round(left)  # Python rounds a half to the even number
    return images[..., top : top + side, left : left + side]


def pad_to_square(images: Tensor, colour: Sequence[int]) -> Tensor:
    """Centre each image on a square of its longer side, as the LLaVA family does.

    Where an odd number of rows (or columns) is added, the extra one is the last.

    Args:
        images: Images ``[N, 3, H, W]``, uint8, any device.
        colour: Colour of the margin: R, G, B from 0 to 255, usually int(255 mean).

    Returns:
        ``[N, 3, S, S]``, uint8, with S = max(H, W).
    """
    height, width = images.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = images.new_tensor(colour).view(3, 1, 1).expand(len(images), 3, side, side).clone()
    square[..., top : top + height, left : left + width] = images
    return square


def normalise(
    images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Tensor:
    """Return (x / 255 - mean) / std per channel: ``[N, 3, H, W]`` uint8 to float32, same device.

    Args:
        images: Images ``[N, 3, H, W]`` uint8.
        mean: Mean of R, G and B in [0, 1].
        std: Standard deviation of R, G and B in [0, 1].
    """
    return standardise(images.to(torch.float32).div(255), mean, std)


def standardise(
    pixels: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Tensor:
    """Return (x - mean) / std per channel: ``[N, 3, H, W]`` float32, same device.

    Args:
        pixels: Images ``[N, 3, H, W]`` float32, in [0, 1].
        mean: Mean of R, G and B.
        std: Standard deviation of R, G and B.
    """
    shift = torch.tensor(mean, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
    return pixels.sub(shift).div(scale)


def _side(size: Any, *keys: str) -> int:
    """Return the one length that a size holds.

    A size is ``224``, ``{"shortest_edge": 224}`` or ``{"height": 224, "width": 224}``.
    """
    if isinstance(size, dict):
        lengths = set(size.values())
        if set(size) != set(keys) or len(lengths) != 1:
            raise ValueError(f"found the size {size} instead of one length under {', '.join(keys)}")
        size = lengths.pop()
    if not isinstance(size, int):
        raise ValueError(f"found the size {size!r} instead of a number of pixels")
    return size
