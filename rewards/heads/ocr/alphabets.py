"""What OCR engines can answer with: their own lists of characters, read where they keep them."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from rewards.heads.ocr.engines import RapidOcr, import_easyocr
from rewards.heads.ocr.target_text import readable

# Of a `.traineddata` file of Tesseract:
_UNICHARSET = 21  # of the parts of a `.traineddata` file, the characters of its network
_MOST_PARTS = 64  # there are 24; a larger number is none of such a file
_NO_CHARACTERS = ("NULL", "Joined", "|Broken|0|1")  # the space, and states of the network


@cache
def rapidocr() -> str:
    """Return all characters that RapidOCR's recogniser can answer with; equal for all heads."""
    return RapidOcr(detect=False).alphabet()


def tesseract(file: Path) -> str | None:
    """Return all characters that Tesseract can answer with by a ``.traineddata`` file.

    Such a file is a number of parts, their places, and the parts; that of the characters is a text
    with a line for each, after their number. The layout is that of ``TessdataManager`` and
    ``UNICHARSET`` in Tesseract 4 and 5.

    Returns:
        None for a file without such a part, as that for finding the orientation, or of another
        layout.
    """
    data = file.read_bytes()
    count = int.from_bytes(data[:4], "little")
    if not _UNICHARSET < count < _MOST_PARTS or len(data) < 4 + 8 * count:
        return None
    places = struct.unpack_from(f"<{count}q", data, 4)
    start = places[_UNICHARSET]
    if start < 0:
        return None
    end = min((place for place in places if place > start), default=len(data))
    _, *lines = data[start:end].decode().splitlines()
    characters = [line.partition(" ")[0] for line in lines]
    return "".join(text for text in characters if text not in _NO_CHARACTERS)


def who_reads(characters: Iterable[str]) -> str:
    """Return what to set so that characters are read, as far as installed engines tell."""
    wanted = set(characters)
    codes: list[str] = []
    if importlib.util.find_spec("easyocr") is not None:
        package = import_easyocr()
        folder = Path(package.__file__).parent / "character"
        files = {code: folder / f"{code}_char.txt" for code in package.config.all_lang_list}
        codes = [
            code
            for code, file in files.items()  # it lists some codes for which it has no file
            if file.is_file() and wanted <= readable(file.read_text(encoding="utf-8-sig"))
        ]
    if not codes:
        return "`engine: tesseract` may read them, with the file of their language."
    return (
        f"`engine: easyocr` reads them with `engine_options: {{languages: [CODE]}}`, CODE one of "
        f"{', '.join(codes)}; `engine: tesseract` may, with the file of their language."
    )
