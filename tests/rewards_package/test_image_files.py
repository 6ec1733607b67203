"""An image file is scored as a viewer shows it, or refused with what to do."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from rewards.image_files import read_rgb

COLOURS = (
    np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
)
RGB = Image.fromarray(COLOURS)
GREY = RGB.convert("L")
RAMP = np.tile(np.linspace(0, 65535, 256), (4, 1)).astype(np.uint16)  # v / 257 is 0, 1, ..., 255
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def saved(image: Image.Image, kind: str = "PNG", **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def with_chunk(file: io.BytesIO, name: bytes, content: bytes) -> io.BytesIO:
    """A PNG file with one more chunk, before the pixels."""
    data = file.getvalue()
    place = data.index(b"IDAT") - 4
    check = struct.pack(">I", zlib.crc32(name + content))
    chunk = struct.pack(">I", len(content)) + name + content + check
    return io.BytesIO(data[:place] + chunk + data[place:])


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# --- shades -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_256_levels(kind: str) -> None:
    found = read_rgb(saved(Image.fromarray(RAMP), kind))
    assert found.shape == (4, 256, 3)
    assert (found == np.arange(256, dtype=np.uint8)[None, :, None]).all()


def test_grey_of_16_bits_is_rounded() -> None:
    numbers = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = read_rgb(saved(Image.fromarray(numbers)))[..., 0]
    assert (found == np.round(numbers / 257)).all()  # no number lies half way: 257 is odd


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_without_a_white_are_refused(kind: type) -> None:
    image = Image.fromarray(np.ones((4, 4), kind))
    with pytest.raises(ValueError, match=r"which of its numbers is white \(mode [IF]\)"):
        read_rgb(saved(image, "TIFF"))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(mode, kind) for mode in ("L", "1", "LA", "P", "RGBA") for kind in ("PNG", "TIFF")]
    + [("CMYK", "TIFF")],
)
def test_every_opaque_mode_is_read_as_pillow_shows_it(mode: str, kind: str) -> None:
    image = (GREY if mode in ("L", "1", "LA") else RGB).convert(mode)
    assert (read_rgb(saved(image, kind)) == np.asarray(image.convert("RGB"))).all()


# --- transparency -------------------------------------------------------------------------------


def see_through(mode: str) -> Image.Image:
    image = RGB.convert(mode)
    image.putpixel((0, 0), (*image.getpixel((0, 0))[:-1], 254))
    return image


TRANSPARENT = {
    "an alpha channel": saved(see_through("RGBA")),
    "grey and alpha": saved(see_through("LA")),
    "a colour": saved(RGB, transparency=RGB.getpixel((0, 0))),
    "a grey": saved(GREY, transparency=GREY.getpixel((0, 0))),
    "an entry of a palette": saved(RGB.quantize(8), transparency=RGB.quantize(8).getpixel((0, 0))),
    "a grey of 16 bits": with_chunk(saved(Image.fromarray(RAMP)), b"tRNS", struct.pack(">H", 257)),
}
OPAQUE = {
    "an alpha channel": saved(RGB.convert("RGBA")),
    "a colour that is not there": saved(RGB.point(lambda v: v // 2), transparency=(255, 255, 255)),
    "a grey of 16 bits that is not there": with_chunk(
        saved(Image.fromarray(RAMP)), b"tRNS", struct.pack(">H", 258)
    ),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_an_image_that_lets_something_through_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="has transparent pixels; lay it over a background"):
        read_rgb(TRANSPARENT[name])


@pytest.mark.parametrize("name", OPAQUE)
def test_the_pixels_are_asked_and_not_the_mode(name: str) -> None:
    found = read_rgb(OPAQUE[name])
    assert found.shape[2] == 3
    if name == "an alpha channel":
        assert (found == COLOURS).all()


# --- orientation, frames, colours ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_photo_on_its_side_is_turned(kind: str) -> None:
    upright = read_rgb(saved(RGB, kind))
    assert upright.shape == (48, 32, 3)
    for orientation, expected in ((3, np.rot90(upright, 2)), (6, np.rot90(upright, -1))):
        found = read_rgb(saved(RGB, kind, exif=turned(orientation)))
        assert (found == expected).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF"])
def test_several_frames_are_refused_and_one_is_not(kind: str) -> None:
    more = saved(RGB, kind, save_all=True, append_images=[RGB.rotate(180)])
    with pytest.raises(ValueError, match="has several frames; save the one"):
        read_rgb(more)
    assert read_rgb(saved(RGB, kind)).shape == (48, 32, 3)


def test_what_stands_behind_a_photo_is_left_alone() -> None:
    file = saved(RGB, "MPO", save_all=True, append_images=[RGB.rotate(180)])
    assert (read_rgb(file) == read_rgb(saved(RGB, "JPEG"))).all()


def profile_with_swapped_colours() -> bytes:
    """The sRGB profile with the columns of red and blue exchanged."""
    swapped = SRGB.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")
    assert swapped != SRGB
    return swapped


def test_an_embedded_profile_is_applied() -> None:
    assert (read_rgb(saved(RGB, icc_profile=SRGB)) == COLOURS).all()
    found = read_rgb(saved(RGB, icc_profile=profile_with_swapped_colours()))
    # One step for the transform, which works with 16-bit fractions.
    assert np.abs(found.astype(int) - COLOURS[..., ::-1]).max() <= 1


def test_a_profile_of_another_kind_of_image_is_ignored() -> None:
    found = read_rgb(saved(GREY, icc_profile=profile_with_swapped_colours()))
    assert (found == np.asarray(GREY.convert("RGB"))).all()


def test_a_damaged_profile_is_told() -> None:
    with pytest.raises(ValueError, match="profile"):
        read_rgb(saved(RGB, icc_profile=b"no profile at all"))


@pytest.mark.parametrize(("stated", "fine"), [(45455, True), (100000, False)])
def test_a_gamma_that_not_all_viewers_apply_is_refused(stated: int, fine: bool) -> None:
    file = with_chunk(saved(RGB), b"gAMA", struct.pack(">I", stated))
    if fine:
        assert (read_rgb(file) == COLOURS).all()
    else:
        with pytest.raises(ValueError, match="states a gamma of 1"):
            read_rgb(file)


def test_a_damaged_file_and_a_missing_one_are_told(tmp_path: Path) -> None:
    whole = saved(RGB).getvalue()
    for content in (whole[:200], b"no image", b"", b"\x89PNG broken", b"GIF89a"):
        (tmp_path / "broken.png").write_bytes(content)
        for file in (io.BytesIO(content), tmp_path / "broken.png"):
            with pytest.raises(ValueError, match=r".") as caught:
                read_rgb(file)
            assert "0x" not in str(caught.value)  # no address of an object in memory
    with pytest.raises(ValueError, match="damaged, or of a format that is not known here"):
        read_rgb(io.BytesIO(b"no image"))
    with pytest.raises(ValueError, match="No such file"):
        read_rgb(tmp_path / "none.png")
