"""Legibility: does the picture show the text that the prompt quotes?"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardError, RewardHead
from rewards.engines import ENGINES, Engine
from rewards.pool import PoolError, WorkerPool
from rewards.registry import register
from rewards.text import check_quotes, comparable, legibility, quoted_target

_MOST_WORKERS = 8


@register("ocr")
class OcrHead(RewardHead):
    """How legibly the picture shows the text quoted in the prompt: 0 not at all, 1 exactly.

    Higher is better. The picture is read by an OCR engine; both texts are normalised (NFKC, case
    folded, no white space), and the score is

        1 - d / len(target)

    where d is 0 if the target is a substring of what was read, else the edit distance capped at
    len(target). The OCR reward of Flow-GRPO (Liu et al. 2025, https://arxiv.org/abs/2505.05470).
    A prompt without quoted text scores NaN and is not read.

    Args:
        engine: One of `rewards.engines.ENGINES`.
        quotes: Which quotes hold the target: `double` (ASCII), `curly`, `single` or `any`.
        substring_ok: Whether further text in the picture goes unpunished.
        detect: Whether the engine looks for lines of text first. Without, the picture is read as
            one line: twice as fast on pictures of one word in large letters, useless on others.
        detection_side: Longer side, in pixels, to which a larger picture is shrunk for finding
            lines; they are read at full resolution. Raise it for text below 1/25 of the height.
        workers: Number of processes; 0 reads in this process. By default the number of cores
            divided by the processes of this job on this machine, at most 8.
        timeout: Seconds within which a batch must be read. Without workers it is checked between
            pictures.

    Raises:
        ValueError: If a parameter is out of range.
        ImportError: If the engine's packages are not installed.
    """

    unit = "1 - edit distance / length"
    requires = ("quoted text",)

    def __init__(
        self,
        engine: str = "rapidocr",
        quotes: str = "double",
        substring_ok: bool = True,
        detect: bool = True,
        detection_side: int = 320,
        workers: int | None = None,
        timeout: float = 300.0,
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(
                f"Parameter `engine` should be one of {', '.join(ENGINES)}. "
                f"Found `engine = {engine!r}`."
            )
        if detection_side < 32:
            raise ValueError(
                f"Parameter `detection_side` should be at least 32. "
                f"Found `detection_side = {detection_side}`."
            )
        if workers is not None and workers < 0:
            raise ValueError(
                f"Parameter `workers` should be at least 0. Found `workers = {workers}`."
            )
        if not timeout > 0:
            raise ValueError(
                f"Parameter `timeout` should be positive. Found `timeout = {timeout}`."
            )
        kind = ENGINES[engine]
        missing = [name for name in kind.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(
                f'The OCR engine "{engine}" needs {" and ".join(missing)}. Install with: '
                f'pip install "moa-diffusion[ocr]"'
            )
        self.quotes = check_quotes(quotes)
        self.substring_ok = substring_ok
        self.timeout = timeout
        self.workers = _default_workers() if workers is None else workers
        self._kind = kind
        self._detect = detect
        self._detection_side = detection_side
        self._engine: Engine | None = None
        self._pool = WorkerPool(
            Path(inspect.getfile(kind)),
            kind.__name__,
            {"detect": detect, "detection_side": detection_side},
            max(1, self.workers),
        )

    def score(self, batch: RewardBatch) -> Tensor:
        """Returns the legibility, `[N]`; NaN where the prompt quotes nothing.

        Raises:
            RewardError: If the engine fails, dies or is late; names the samples.
        """
        batch.require_images()
        targets = [quoted_target(prompt, self.quotes) or "" for prompt in batch.prompts]
        asked = [index for index, target in enumerate(targets) if comparable(target)]
        scores = torch.full((len(batch),), torch.nan)
        for index, text in zip(asked, self.read(batch, asked), strict=True):
            scores[index] = legibility(text, targets[index], substring_ok=self.substring_ok)
        return scores

    def read(self, batch: RewardBatch, indices: Sequence[int]) -> list[str]:
        """Reads the pictures at the given indices; returns the text of each, lines joined by LF.

        Raises:
            RewardError: See `score`.
        """
        if not indices:
            return []
        images = list(batch.arrays()[list(indices)])
        try:
            if self.workers == 0:
                lines = self._read_here(images)
            else:
                lines = self._pool.read(images, self.timeout)
        except PoolError as error:
            concerned = batch.samples([indices[position] for position in error.indices])
            raise RewardError(error.cause, head=self.name, samples=concerned) from error
        return ["\n".join(found) for found in lines]

    def close(self) -> None:
        """Ends the worker processes and drops the engine; the next batch starts them again."""
        self._pool.close()
        self._engine = None

    def _read_here(self, images: Sequence[np.ndarray]) -> list[list[str]]:
        if self._engine is None:
            self._engine = self._kind(detect=self._detect, detection_side=self._detection_side)
        deadline = time.monotonic() + self.timeout
        lines: list[list[str]] = []
        for position, image in enumerate(images):
            if time.monotonic() > deadline:
                raise PoolError(
                    f"{len(images) - position} of {len(images)} pictures were not read within "
                    f"{self.timeout:g} s.",
                    range(position, len(images)),
                )
            try:
                lines.append(self._engine.read(image))
            except Exception as error:
                raise PoolError(f"{type(error).__name__}: {error}", [position]) from error
        return lines


def _default_workers() -> int:
    if sys.platform == "linux":  # the cores that this process may use, not all there are
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun and accelerate
    return max(1, min(_MOST_WORKERS, cores // here))
