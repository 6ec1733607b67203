"""What engines can write, read from their own files."""

from __future__ import annotations

import pytest

from rewards.heads.ocr import alphabets


@pytest.mark.parametrize("content", [b"", b"English", b"\x18\0\0\0" + b"\xff" * 8 * 24])
def test_a_file_of_another_layout_tells_nothing(tmp_path, content):
    (tmp_path / "x.traineddata").write_bytes(content)
    assert alphabets.tesseract(tmp_path / "x.traineddata") is None
