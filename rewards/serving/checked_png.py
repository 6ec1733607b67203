"""RGB pictures of 8 bits per channel as PNG files, read with suspicion: others may have made them.

What a file will cost is told before it is decompressed, and files that decoders read differently,
with two sizes, transparency, several frames, an orientation or a colour space of their own, are
refused: a client sends plain sRGB.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

HEAD = 26  # bytes at the beginning of a file that say what it is
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_START = struct.Struct(">8sI4sIIBB")  # signature, 13, IHDR, width, height, bits, kind of colour
_CHUNK = struct.Struct(">I4s")  # length of the content, name; a checksum of 4 bytes ends a chunk
_RGB = (8, 2)  # bits, kind of colour
# A second size, transparency, an animation; then what viewers turn, or show in other colours.
_REFUSED = (b"IHDR", b"tRNS", b"acTL", b"eXIf", b"iCCP", b"cICP", b"gAMA", b"cHRM")


def encode(picture: np.ndarray) -> bytes:
    """Return a picture ``[H, W, 3]``, uint8, as a PNG file."""
    file = io.BytesIO()
    # Level 1: about half the time of the default, for files an eighth larger.
    Image.fromarray(picture).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def size(file: bytes) -> tuple[int, int]:
    """Return width and height by the first ``HEAD`` bytes of a file.

    Raises:
        ValueError: If it is no PNG file of RGB, 8 bits; the message goes on after "The picture".
    """
    if len(file) < HEAD:
        raise ValueError("is no PNG file.")
    signature, length, name, width, height, *kind = _START.unpack_from(file)
    if (signature, length, name) != (_SIGNATURE, 13, b"IHDR"):
        raise ValueError("is no PNG file.")
    if tuple(kind) != _RGB:
        raise ValueError(
            f"should be RGB of 8 bits (kind of colour 2). Found {kind[0]} bits, kind {kind[1]}."
        )
    if width == 0 or height == 0:
        raise ValueError(f"should have pixels. Found {width} x {height}.")
    return width, height


def decode(file: bytes) -> np.ndarray:
    """Return the pixels ``[H, W, 3]``, uint8, of a file that has the ``size`` which it says.

    Raises:
        ValueError: As ``size``, or if the file is damaged or could be read as something else.
    """
    expected = size(file)
    place = len(_SIGNATURE) + _CHUNK.size + 13 + 4  # after IHDR
    while place + _CHUNK.size <= len(file):
        length, name = _CHUNK.unpack_from(file, place)
        if name in _REFUSED:
            raise ValueError(f"should have no further chunk {name.decode()}.")
        place += _CHUNK.size + length + 4
    try:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
            # Pillow reads chunks in its own way: what it is about to decompress must be what was
            # counted.
            if image.mode != "RGB" or image.size != expected:
                raise ValueError(f"it reads as {image.mode}, {image.size}, not {expected}")
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be read: {error}.") from error
