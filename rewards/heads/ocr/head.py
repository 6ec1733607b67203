"""Legibility: does the image show the text that the prompt quotes?"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rewards.base import RewardBatch, RewardError, RewardHead, Scores
from rewards.blame import cause_of
from rewards.heads.ocr.alphabets import who_reads
from rewards.heads.ocr.engines import Engine
from rewards.heads.ocr.plans import plan_engine
from rewards.heads.ocr.pool import PoolError, WorkerPool
from rewards.heads.ocr.target_text import (
    Quotes,
    check_quotes,
    comparable,
    has_lone_mark,
    has_words,
    legibility,
    quote_marks,
    quoted_target,
    quoted_texts,
    readable,
)
from rewards.registry import register

_MOST_WORKERS = 8
_SHOWN = 12  # characters in a remark

_log = logging.getLogger(__name__)


@register("ocr")
class OcrHead(RewardHead):
    """How legibly the image shows the text quoted in the prompt: 0 not at all, 1 exactly.

    Higher is better. The image is read by an OCR engine; both texts are normalised (NFKC, case
    folded, no white space), and the score is

        1 - d / len(target)

    where d is 0 if the target is a substring of what was read, else the edit distance capped at
    len(target). The OCR reward of Flow-GRPO (Liu et al. 2025, https://arxiv.org/abs/2505.05470).
    Of several quoted texts the first is the target, as there.

    NaN, and not read, is a prompt without quoted text, one whose target has neither a letter nor a
    digit, and one whose target holds a character that the engine does not read: a perfect image
    would score less than another that happens to look like letters it knows. ``remarks``, and a
    warning, tell of those, of text in other quotes than ``quotes`` and of quotes that nothing
    closes. The scores table shows the target and what was read.

    The engines:

    - ``rapidocr`` reads on the CPU with models of its own, without network: Chinese, Japanese and
    the letters of Western Europe (ISO 8859-1). It lists more, which it takes for one another.
    - ``easyocr`` is made for a GPU and fetches its weights once; on a CPU it takes seconds.
    - ``tesseract`` is a program to install. It is made for scanned pages and reads nothing in
    noise. By its English file it reads no letter but those of ASCII.

    Args:
        engine: Name of the OCR engine: ``rapidocr``, ``easyocr`` or ``tesseract``.
        quotes: Which quotes hold the target: ``double`` (ASCII), ``curly``, ``single`` or ``any``,
            which also reads guillemets, corner brackets and quotes that open at the foot of the
            line. A mark directly after a letter or digit opens nothing, as in 5".
        substring_ok: Whether further text in the image goes unpunished.
        detect: Whether the engine looks for lines of text first. Without, the image is read as
            one line: twice as fast on images of one word in large letters, useless on others.
        detection_side: Longer side, in pixels, to which a larger image is shrunk for finding
            lines, at least 32; they are read at full resolution. By default 320 for rapidocr, to be
            raised for text below 1/25 of the height, and 2560 for easyocr; tesseract has no such
            thing.
        engine_options: Options of the engine, e.g. ``{languages: [en, fr], device: cpu}`` for
            easyocr or ``{psm: 6}`` for tesseract.
        workers: Number of processes, at least 0; 0 reads in this process. By default the number of
            cores divided by the processes of this job on this machine, at most 8. An engine on a
            GPU reads in this process: others would each hold the models, and take turns all the
            same.
        timeout: Number of seconds within which a batch must be read; positive. Without workers it
            is checked between images.

    Raises:
        ValueError: If a parameter is out of range, or names weights that are not there.
        ImportError: If the engine's packages or program are not installed.
    """

    unit = "1 - edit distance / length"
    requires = ("quoted text",)
    scores = "images"
    neutral_options = ("workers", "timeout")

    def __init__(
        self,
        engine: str = "rapidocr",
        quotes: Quotes = "double",
        substring_ok: bool = True,
        detect: bool = True,
        detection_side: int | None = None,
        engine_options: Mapping[str, Any] | None = None,
        workers: int | None = None,
        timeout: float = 300.0,
    ) -> None:
        if detection_side is not None and detection_side < 32:
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
        self.quotes = check_quotes(quotes)
        self.substring_ok = substring_ok
        self.timeout = timeout
        self._plan = plan_engine(
            engine, detect=detect, detection_side=detection_side, options=engine_options or {}
        )
        if workers and self._plan.on_gpu:
            raise ValueError(
                f"Parameter `workers` should be 0 for an engine on a GPU. "
                f"Found `workers = {workers}`."
            )
        if workers is None:
            workers = 0 if self._plan.on_gpu else _default_workers()
        self.workers = workers
        self._fetched = False
        self._warned = False
        self._engine: Engine | None = None
        kind = self._plan.kind
        file = Path(inspect.getfile(kind))
        self._pool = WorkerPool(file, kind.__name__, self._plan.options, max(1, workers))

    def score(self, batch: RewardBatch) -> Scores:
        """Return the legibility, ``[N]``; NaN where the prompt quotes nothing that can be read.

        The column ``read`` is None for those samples, and ``target`` where nothing is quoted.

        Raises:
            RewardError: If the engine fails, dies or is late; names the samples.
        """
        batch.require_images()
        targets = [quoted_target(prompt, self.quotes) or "" for prompt in batch.prompts]
        positions = [index for index, target in enumerate(targets) if has_words(target)]
        if not self._warned:
            for remark in self.remarks(list(dict.fromkeys(batch.prompts))):
                self._warned = True
                _log.warning('Reward head "%s": %s', self._label, remark)
        positions = [index for index in positions if not self._unreadable(targets[index])]
        values = torch.full((len(batch),), torch.nan)
        texts: list[str | None] = [None] * len(batch)
        for index, text in zip(positions, self.read(batch, positions), strict=True):
            values[index] = legibility(text, targets[index], substring_ok=self.substring_ok)
            texts[index] = text
        wanted = [target if comparable(target) else None for target in targets]
        return Scores(values=values, extra={"target": wanted, "read": texts})

    def remarks(self, prompts: Sequence[str]) -> list[str]:
        """Say which prompts score NaN, or are judged by the first of their texts, and why.

        Raises:
            RewardError: If the engine does not start.
        """
        found = {prompt: quoted_target(prompt, self.quotes) or "" for prompt in prompts}
        bare = [prompt for prompt, target in found.items() if not target]
        others = {prompt: marks for prompt in bare if (marks := quote_marks(prompt))}
        lone = [prompt for prompt in bare if prompt not in others and has_lone_mark(prompt)]
        wordless = [
            p for p, target in found.items() if comparable(target) and not has_words(target)
        ]
        missing = {
            prompt: characters
            for prompt, target in found.items()
            if has_words(target) and (characters := self._unreadable(target))
        }
        several = [
            p for p in prompts if len(set(map(comparable, quoted_texts(p, self.quotes))) - {""}) > 1
        ]
        remarks = []
        if missing:
            letters = dict.fromkeys(letter for some in missing.values() for letter in some)
            shown = " ".join(list(letters)[:_SHOWN]) + (" ..." if len(letters) > _SHOWN else "")
            remarks.append(
                f"{len(missing)} of {len(prompts)} prompts quote characters that the OCR engine "
                f'"{self._plan.engine}" cannot read as it is set ({shown}), first '
                f"{found[next(iter(missing))]!r}: they score NaN. "
                f"{who_reads(letters, self._plan.engine)}"
            )
        if others:
            marks = " ".join(dict.fromkeys(others.values()))
            remarks.append(
                f"{len(others)} of {len(prompts)} prompts have text in other quotes ({marks}) than "
                f"`quotes: {self.quotes}` reads, first {next(iter(others))!r}: they score NaN. "
                f"`quotes: any` reads them."
            )
        if lone:
            remarks.append(
                f"{len(lone)} of {len(prompts)} prompts have a quotation mark without its partner, "
                f"first {lone[0]!r}: they score NaN. Close it, with a space or a mark around the "
                f"quoted text."
            )
        if wordless:
            remarks.append(
                f"{len(wordless)} of {len(prompts)} prompts quote neither a letter nor a digit, "
                f"first {found[wordless[0]]!r}: they score NaN."
            )
        if several:
            remarks.append(
                f"{len(several)} of {len(prompts)} prompts quote more than one text, first "
                f"{several[0]!r}: only the first of its texts counts."
            )
        self._warned = self._warned or bool(remarks)
        return remarks

    def read(self, batch: RewardBatch, indices: Sequence[int]) -> list[str]:
        """Read the images at the given indices; return the text of each, lines joined by LF.

        Raises:
            RewardError: See ``score``.
        """
        if not indices:
            return []
        try:
            lines = self._read(list(batch.arrays()[list(indices)]))
        except PoolError as error:
            concerned = batch.samples([indices[position] for position in error.indices])
            raise RewardError(error.cause, head=self.name, samples=concerned) from error
        return ["\n".join(words) for words in lines]

    def load(self) -> None:
        """Fetch the weights and start the engine, in all worker processes.

        Raises:
            RewardError: If the engine does not start, or fails on a blank image.
        """
        blank = np.full((64, 64, 3), 255, np.uint8)
        try:
            self._read([blank] * max(1, self.workers))
        except PoolError as error:
            raise RewardError(error.cause, head=self.name) from error

    def offload(self) -> None:
        """Move an engine from the GPU to the CPU until the next batch."""
        if self._engine is not None:
            self._plan.offload(self._engine)

    def provenance(self) -> dict[str, str]:
        """Return the engine, the versions of its packages, and the SHA-256 of its weights."""
        return {"engine": self._plan.engine} | self._plan.provenance()

    def close(self) -> None:
        """End the worker processes and drop the engine; the next batch starts them again."""
        self._pool.close()
        self._engine = None

    def _unreadable(self, target: str) -> list[str]:
        """Return the characters of a target, as compared, that the engine cannot answer with."""
        characters = comparable(target)
        if not characters or self._readable is None:
            return []
        return [character for character in characters if character not in self._readable]

    @cached_property
    def _readable(self) -> frozenset[str] | None:
        """The characters that the engine can answer with; None: it does not tell."""
        try:
            alphabet = self._plan.alphabet()
        except Exception as error:  # whatever an engine's libraries raise
            raise RewardError(f"The OCR engine did not start: {cause_of(error)}") from error
        return None if alphabet is None else readable(alphabet)

    def _read(self, images: Sequence[np.ndarray]) -> list[list[str]]:
        if not self._fetched:
            try:
                self._plan.fetch()
            except RuntimeError as error:
                raise PoolError(str(error), []) from error
            self._fetched = True
        if self.workers == 0:
            return self._read_here(images)
        return self._pool.read(images, self.timeout)

    def _read_here(self, images: Sequence[np.ndarray]) -> list[list[str]]:
        if self._engine is None:
            try:
                self._engine = self._plan.kind(**self._plan.options)
            except Exception as error:
                cause = f"{type(error).__name__}: {error}"
                raise PoolError(f"The OCR engine did not start: {cause}", []) from error
        deadline = time.monotonic() + self.timeout
        lines: list[list[str]] = []
        for position, image in enumerate(images):
            if time.monotonic() > deadline:
                raise PoolError(
                    f"{len(images) - position} of {len(images)} images were not read within "
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
