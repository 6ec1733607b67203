"""What OCR engines can answer with: their own lists of characters, read where they keep them."""

from __future__ import annotations

import importlib.util
import struct
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from rewards.heads.ocr.engines import RapidOcr, import_easyocr
from rewards.heads.ocr.target_text import readable

# What a `.traineddata` file of Tesseract holds:
_UNICHARSET = 21  # the number of the part that lists the characters of its network
_MOST_PARTS = 64  # there are 24; a larger number is none of such a file
_NO_CHARACTERS = ("NULL", "Joined", "|Broken|0|1")  # the space, and states of the network

# RapidOCR's own model lists more letters than it reads. Of 559 of them, printed in two fonts in
# words of 48 pixels, those of ISO 8859-1 were right at least once but for one of each of these five
# pairs. Of the 63 capitals of Latin Extended-A, 47 were never right (G with breve is C
# with caron, N with acute that with tilde), nor were 27 % of the Greek letters and 93 % of others.
_LISTED_ONLY = frozenset("\u00c6\u00e6\u00cc\u00ec\u00d0\u00f0\u00de\u00fe\u00ff\u0178")
# How Unicode's names of the letters of Chinese and Japanese begin.
_EAST_ASIAN = frozenset(
    ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "BOPOMOFO", "FULLWIDTH")
)


@cache
def rapidocr() -> str:
    """Return all characters that RapidOCR's recogniser reads; equal for all heads.

    Of the letters that it can answer with, those of ISO 8859-1 (but for five), Chinese and
    Japanese; and all else.
    """
    return "".join(filter(_is_read_by_rapidocr, RapidOcr(detect=False).alphabet()))


def _is_read_by_rapidocr(character: str) -> bool:
    if not character.isalpha() or character.isascii():
        return True
    if ord(character) < 0x100:
        return character not in _LISTED_ONLY
    return unicodedata.name(character, "").partition(" ")[0] in _EAST_ASIAN


def tesseract(file: Path) -> str | None:
    """Return all characters that Tesseract reads by a ``.traineddata`` file.

    Those that it can answer with; by English's, of the letters those of ASCII: the file lists some
    of loan words, with an accent, and takes nearly all of them for the letter without it.

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
    known = "".join(text for text in characters if text not in _NO_CHARACTERS)
    if file.stem != "eng":
        return known
    return "".join(text for text in known if text.isascii() or not text.isalpha())


def who_reads(characters: Iterable[str], engine: str) -> str:
    """Return what to set so that characters are read, as far as installed engines tell.

    Args:
        characters: Characters of ``comparable`` texts.
        engine: Name of the engine that does not read them.
    """
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
    another = "" if engine == "tesseract" else "`engine: tesseract` with "
    tesseract = (
        f"{another}`engine_options: {{languages: [CODE]}}`, CODE their language's file of Tesseract"
    )
    if not codes:
        return f"{tesseract}, may read them."
    return (
        f"`engine: easyocr` reads them with `engine_options: {{languages: [CODE]}}`, CODE one of "
        f"{', '.join(codes)}; {tesseract}, may."
    )
