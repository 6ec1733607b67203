"""OCR engines: a picture in, the lines of text in it out.

An engine is a class with `packages` (what must be installed), a constructor that loads its models,
and `read`. A new one is such a class and an entry in `ENGINES`. This file is also loaded by worker
processes, which have neither torch nor the package at hand: it imports the standard library and
NumPy only, and an engine imports its own library in its constructor.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Engine(Protocol):
    """What `OcrHead` needs of an OCR engine."""

    packages: tuple[str, ...]  # names to import; all come with `pip install "moa-diffusion[ocr]"`

    def __init__(self, *, detect: bool, detection_side: int) -> None: ...

    def read(self, image: np.ndarray) -> list[str]:
        """Reads `[H, W, 3]` uint8 RGB; returns the lines from top to bottom, or none."""
        ...


class RapidOcr:
    """RapidOCR with its own PP-OCR models on ONNX Runtime, one thread; works offline.

    Args:
        detect: Whether to look for lines of text first; else the picture is read as one line.
        detection_side: The detector sees the picture shrunk to this longer side, never enlarged.
            The recogniser sees the lines at full resolution in any case.
    """

    packages: tuple[str, ...] = ("rapidocr", "onnxruntime")

    def __init__(self, *, detect: bool, detection_side: int) -> None:
        from rapidocr import RapidOCR

        self._engine: Any = RapidOCR(
            params={
                # A picture without text is no news; rapidocr warns about every single one.
                "Global.log_level": "error",
                "Global.use_det": detect,
                "Global.use_cls": False,  # text that is upside down is not legible
                "Global.text_score": 0.0,  # doubtful readings count: the score is a distance
                "Det.limit_type": "max",
                "Det.limit_side_len": detection_side,
                # Lines are padded to at least this width. The default of 320 makes a short word
                # cost three times as much and reads it no better.
                "Rec.rec_img_shape": [3, 48, 48],
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def read(self, image: np.ndarray) -> list[str]:
        """Reads one picture; see `Engine`."""
        bgr = np.ascontiguousarray(image[:, :, ::-1])  # the order of OpenCV
        return list(self._engine(bgr).txts or ())


ENGINES: dict[str, type[Engine]] = {"rapidocr": RapidOcr}
