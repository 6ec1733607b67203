"""RGB images of 8 bits per channel as PNG files, read with suspicion: others may have made them.

What a file will cost is told before it is decompressed, and files with transparency, several
frames, an orientation or a colour space of their own are refused: a client sends plain sRGB.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

# What Pillow calls transparency, an animation; then what viewers turn, or show in other colours.
_REFUSED = ("transparency", "loop", "exif", "icc_profile", "gamma", "chromaticity")
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def encode(image: np.ndarray) -> bytes:
    """Return an image ``[H, W, 3]``, uint8, as a PNG file."""
    file = io.BytesIO()
    # Level 1: about half the time of the default, for files an eighth larger.
    Image.fromarray(image).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def open_image(file: bytes | memoryview) -> ImageFile:
    """Return an image, of which the ``size`` is known and the pixels are not decompressed yet.

    Raises:
        ValueError: If it is no PNG file of RGB, 8 bits; the message goes on after "The image".
    """
    try:
        image = Image.open(io.BytesIO(file), formats=["PNG"])
    except UnidentifiedImageError as error:
        raise ValueError("is no PNG file, or its header is damaged.") from error
    except _UNREADABLE as error:
        raise ValueError(f"cannot be read: {error}.") from error
    mode = image.tile[0][3] if image.tile else image.mode  # RGB;16B where 16 bits are cut
    if mode != "RGB":
        raise ValueError(f"should be RGB of 8 bits. Found {mode}.")
    return image


def decode(image: ImageFile) -> np.ndarray:
    """Return the pixels ``[H, W, 3]``, uint8, of an open image.

    Raises:
        ValueError: If the file is damaged or could be shown as something else.
    """
    try:
        pixels = np.asarray(image)
    except _UNREADABLE as error:
        raise ValueError(f"cannot be read: {error}.") from error
    more = [key for key in _REFUSED if key in image.info]  # now that the whole file is read
    if more:
        raise ValueError(f"should be plain sRGB. Found {', '.join(more)}.")
    return pixels
