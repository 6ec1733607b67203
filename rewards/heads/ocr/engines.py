"""OCR engines: an image in, the lines of text in it out.

An engine is a class with ``packages`` (what must be installed), a constructor that loads its
models, and ``read``; the keyword arguments of its constructor are its options. A new one is such a
class and an entry in ``ENGINES``; what it needs before it can be built stands in ``plans.py``. This
file is also loaded by worker processes, which have neither torch nor the package at hand: it
imports the standard library and NumPy only, and an engine imports its own library in its methods.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_PROGRAM_SECONDS = 60.0  # an image takes Tesseract 0.1 to 1 s


class Engine(Protocol):
    """What ``OcrHead`` needs of an OCR engine.

    Its constructor takes ``detect``, ``detection_side`` if that means something to it, and whatever
    else it has options for; all of them but ``detect`` have defaults.
    """

    packages: tuple[str, ...]  # names to import

    def __init__(self, *, detect: bool) -> None: ...

    def read(self, image: np.ndarray) -> list[str]:
        """Read ``[H, W, 3]`` uint8 RGB; return the lines from top to bottom, or none."""
        ...


class RapidOcr:
    """RapidOCR with its own PP-OCR models on ONNX Runtime, one thread; works offline.

    Its recogniser reads text whichever way up: a word upside down or on its side counts as read.

    Args:
        detect: Whether to look for lines of text first; else the image is read as one line.
        detection_side: The detector sees the image shrunk to this longer side, never enlarged.
            The recogniser sees the lines at full resolution in any case.
    """

    packages: tuple[str, ...] = ("rapidocr", "onnxruntime")

    def __init__(self, *, detect: bool, detection_side: int = 320) -> None:
        from rapidocr import RapidOCR

        self._detect = detect
        self._engine: Any = RapidOCR(
            params={
                # An image without text is no news; rapidocr warns about every single one.
                "Global.log_level": "error",
                "Global.use_det": detect,
                # The classifier that turns lines upright: the recogniser reads them as they are.
                "Global.use_cls": False,
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
        """Read one image; see ``Engine``."""
        bgr = np.ascontiguousarray(image[:, :, ::-1])  # the order of OpenCV
        return list(self._engine(bgr, use_det=self._detect).txts or ())

    def alphabet(self) -> str:
        """Return all characters that the recogniser can answer with."""
        if self._engine.text_rec is None:  # newer versions load it with the first line
            self._engine(np.full((48, 48, 3), 255, np.uint8), use_det=False)
        _blank, *characters = self._engine.text_rec.postprocess_op.character
        return "".join(characters)


class EasyOcr:
    """EasyOCR: CRAFT finds the lines and a CRNN reads them, on a GPU or on the CPU.

    Its weights, about 100 MB for English, are fetched once from its releases on GitHub. They are
    used in full precision: on the CPU, EasyOCR would quantise them through an interface that torch
    is about to drop.

    Args:
        detect: Whether to look for lines of text first; else the image is read as one line.
        detection_side: The detector sees the image shrunk to this longer side, never enlarged.
        languages: EasyOCR's codes, e.g. ``en``, or ``ch_sim`` and ``en``; they choose the
            recogniser.
        device: A torch device. In a configuration also ``auto``: this process's GPU if there is
            one.
        model_dir: Folder of the weights; by default EasyOCR's own, ``~/.EasyOCR/model`` unless the
            environment variable EASYOCR_MODULE_PATH names another parent.
        download_enabled: Whether weights that are not there are fetched.

    Raises:
        FileNotFoundError: If weights are damaged, or not there and not to be fetched.
    """

    packages: tuple[str, ...] = ("easyocr",)

    def __init__(
        self,
        *,
        detect: bool,
        detection_side: int = 2560,
        languages: Sequence[str] = ("en",),
        device: str = "auto",
        model_dir: str | None = None,
        download_enabled: bool = True,
    ) -> None:
        self._detect, self._side = detect, detection_side
        self._device = self._place = device
        folder = easyocr_folder(model_dir)
        with contained():
            self._reader: Any = import_easyocr().Reader(
                list(languages),
                gpu=False if device == "cpu" else device,
                model_storage_directory=str(folder),
                user_network_directory=str(folder),  # it makes one at home otherwise
                download_enabled=download_enabled,
                detector=detect,
                quantize=False,
                verbose=False,
            )
        if device != "cpu":
            # EasyOCR wraps the models for all GPUs at once; such a model starts on the first only.
            self._reader.recognizer = self._reader.recognizer.module
            if detect:
                self._reader.detector = self._reader.detector.module

    def read(self, image: np.ndarray) -> list[str]:
        """Read one image; see ``Engine``."""
        import cv2

        self._move(self._device)
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        height, width = grey.shape
        level: list[Any] = [[0, width, 0, height]]  # boxes
        tilted: list[Any] = []
        with contained():
            if self._detect:
                # Not `readtext`: it takes an array for BGR, but shows it to the detector as RGB.
                detected = self._reader.detect(image, canvas_size=self._side, reformat=False)
                (level,), (tilted,) = detected
            return list(self._reader.recognize(grey, level, tilted, detail=0, reformat=False))

    def offload(self) -> None:
        """Free the GPU's memory until the next image."""
        import torch

        if self._device != "cpu":
            self._move("cpu")
            torch.cuda.empty_cache()

    def _move(self, place: str) -> None:
        if place != self._place:
            self._reader.recognizer.to(place)
            if self._detect:
                self._reader.detector.to(place)
            self._place = place


def import_easyocr() -> Any:
    """Return the module, imported without traces in this process."""
    with contained():
        import easyocr
    return easyocr


def easyocr_folder(model_dir: str | None) -> Path:
    """Return where EasyOCR keeps its weights; see the option ``model_dir``."""
    if model_dir is not None:
        return Path(model_dir).expanduser()
    return Path(import_easyocr().config.MODULE_PATH) / "model"


@contextmanager
def contained() -> Iterator[None]:
    """Undo what EasyOCR does to its surroundings; drop its warnings about its own code."""
    path, cache = list(sys.path), os.environ.get("LRU_CACHE_CAPACITY")
    with warnings.catch_warnings():
        # It asks for pinned memory without a GPU, and tries to quantise even if told not to.
        warnings.filterwarnings("ignore", message="'pin_memory' argument", category=UserWarning)
        warnings.filterwarnings("ignore", message=r"torch\.ao\.quantization is deprecated")
        try:
            yield
        finally:
            sys.path[:] = path  # it adds a folder for networks of the user's own
            # It shrinks oneDNN's cache of kernels to one, for everything in this process.
            if cache is None:
                os.environ.pop("LRU_CACHE_CAPACITY", None)
            else:
                os.environ["LRU_CACHE_CAPACITY"] = cache


class Tesseract:
    """The program Tesseract: one process per image, one thread.

    The image goes in and the text comes out through pipes. (The package pytesseract would run
    the same program, with two temporary files per image.)

    Args:
        detect: Whether to look for text first; else the image is read as one line (mode 7).
        languages: Tesseract's codes, e.g. ``eng``, or ``deu`` and ``eng``.
        psm: Page segmentation mode with ``detect``, in [3, 13] and not 7; 11 looks for text
            anywhere.
        min_side: Longer side, in pixels, to which a smaller image is enlarged, because letters
            below about 20 pixels are read badly; at least 1.
        program: Name or path of the program.
        model_dir: Folder with the ``.traineddata`` files; by default the program's own.

    Raises:
        RuntimeError: If the program fails, at reading.
    """

    packages: tuple[str, ...] = ("PIL",)

    def __init__(
        self,
        *,
        detect: bool,
        languages: Sequence[str] = ("eng",),
        psm: int = 11,
        min_side: int = 256,
        program: str = "tesseract",
        model_dir: str | None = None,
    ) -> None:
        self._min_side = min_side
        self._command = [
            *tesseract_command(program, model_dir),
            *("stdin", "stdout"),
            *("-l", "+".join(languages)),
            *("--psm", str(psm if detect else 7)),
            *("--dpi", "72"),  # images have none, and it would guess one from the letters
        ]

    def read(self, image: np.ndarray) -> list[str]:
        """Read one image; see ``Engine``."""
        height, width, _ = image.shape
        if max(height, width) < self._min_side:
            image = _enlarged(image, self._min_side / max(height, width))
            height, width, _ = image.shape
        ppm = b"P6 %d %d 255\n" % (width, height) + image.tobytes()
        lines = run_program(self._command, ppm).splitlines()
        return [line.strip() for line in lines if line.strip()]


def tesseract_command(program: str, model_dir: str | None) -> list[str]:
    """Return the first words of every call of Tesseract."""
    return [program, *(("--tessdata-dir", model_dir) if model_dir is not None else ())]


def run_program(command: Sequence[str], data: bytes = b"") -> str:
    """Run a program, Tesseract on one thread, and return what it prints.

    Args:
        command: The program and its arguments.
        data: What it reads from standard input.

    Raises:
        RuntimeError: If it fails.
        subprocess.TimeoutExpired: If it takes more than a minute.
    """
    environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
    done = subprocess.run(
        command, input=data, capture_output=True, env=environment, timeout=_PROGRAM_SECONDS
    )
    if done.returncode != 0:
        output = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"`{' '.join(command)}` ended with status {done.returncode}: {output}")
    return done.stdout.decode()


def _enlarged(image: np.ndarray, factor: float) -> np.ndarray:
    from PIL import Image

    height, width, _ = image.shape
    size = (round(width * factor), round(height * factor))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


ENGINES: dict[str, type[Engine]] = {
    "rapidocr": RapidOcr,
    "easyocr": EasyOcr,
    "tesseract": Tesseract,
}
