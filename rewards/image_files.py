"""An image file as a viewer shows it: the one way in which files become pixels that are scored.

Pillow's own ``convert("RGB")`` clips 16 bits to 8, leaves a photo lying on its side, takes any
colour space for sRGB, drops transparency, and reads the first of several frames.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

_DEEP = ("I;16", "I;16B", "I;16L", "I;16N")  # grey of 16 bits
_PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # a profile that describes the mode
_GAMMA = 1 / 2.2  # what PNG files state whose pixels are sRGB
# TIFF tags: bits per sample, and what the numbers mean (0: white is zero).
_BITS, _MEANING = 258, 262


def read_rgb(file: Path | IO[bytes]) -> np.ndarray:
    """Read an image.

    Grey of 16 bits is scaled to 8; the orientation in the metadata is applied; colours of an
    embedded profile become those of sRGB; an alpha channel without effect is dropped.

    Returns:
        ``[H, W, 3]``, uint8, sRGB.

    Raises:
        ValueError: If the file is no image or damaged, holds several frames or transparent
            pixels, or numbers for which nothing says what is white. The message goes on after
            "The image cannot be used:".
    """
    try:
        with Image.open(file) as image:
            _refuse_frames(image)
            ImageOps.exif_transpose(image, in_place=True)
            return _pixels(image)
    except UnidentifiedImageError as error:  # Pillow's message has an address for what has no name
        raise ValueError("it is damaged, or of a format that is not known here") from error
    except (OSError, SyntaxError, ImageCms.PyCMSError) as error:  # raised on damaged files
        raise ValueError(str(error)) from error


def _refuse_frames(image: Image.Image) -> None:
    if image.format == "MPO":  # a photo with previews or depth behind it
        return
    try:
        image.seek(1)
    except EOFError:
        image.seek(0)
        return
    raise ValueError("it has several frames; save the one that should be scored")


def _pixels(image: Image.Image) -> np.ndarray:
    deep = image.mode in _DEEP or (image.mode == "I" and image.format == "PNG")  # older Pillow
    if not deep and image.mode not in _PLAIN:
        raise ValueError(
            f"nothing says which of its numbers is white (mode {image.mode}); save it with 8 or 16 "
            f"bits per channel"
        )
    if image.has_transparency_data and _lets_through(image, deep=deep):
        raise ValueError("it has transparent pixels; lay it over a background first")
    gamma = image.info.get("gamma", _GAMMA)
    described = "icc_profile" in image.info or "srgb" in image.info
    if not described and abs(gamma - _GAMMA) > 0.01:
        raise ValueError(
            f"it states a gamma of {gamma:g}, which not all viewers apply; save it as sRGB"
        )
    profile = image.info.get("icc_profile")
    if deep:
        image = _shallow(image)
    if image.mode in ("1", "LA"):
        image = image.convert("L")
    elif image.mode not in _SPACES:
        image = image.convert("RGB")
    return np.array(_in_srgb(image, profile))


def _lets_through(image: Image.Image, *, deep: bool) -> bool:
    """Return whether a pixel is not opaque."""
    if deep:
        return bool((np.asarray(image) == image.info["transparency"]).any())
    return image.convert("RGBA").getchannel("A").getextrema()[0] != 255


def _shallow(image: Image.Image) -> Image.Image:
    """Turn grey of 16 bits into grey of 8."""
    numbers = np.asarray(image).astype(np.int64)
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    white = 2 ** int(tags.get(_BITS, (16,))[0]) - 1
    if tags.get(_MEANING) == 0:
        numbers = white - numbers
    return Image.fromarray(((510 * numbers + white) // (2 * white)).astype(np.uint8))  # rounded


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return the image in RGB, by its profile if that speaks of such an image."""
    if profile:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        # Decoders ignore one for another kind of image, as PNG's specification says.
        if own.profile.xcolor_space.strip() == _SPACES[image.mode]:
            target = ImageCms.createProfile("sRGB")
            shown = ImageCms.profileToProfile(image, own, target, outputMode="RGB")
            assert shown is not None  # which is for `inPlace`
            return shown
    return image.convert("RGB")
