"""What a reward head is: a batch of samples in, one number per sample out, higher is better.

A head says three things and nothing else: a finite number is a score, ``NaN`` means "this objective
does not apply to this sample", and everything that went wrong is a ``RewardError``. A failure never
becomes a score.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards.blame import cause_of
from rewards.pixels import check_images

Kind = Literal["images", "texts"]  # what the samples in a batch are
Scored = Literal["images", "texts", "both"]  # "both": a batch of either

_SHOWN_SAMPLES = 5
_SHOWN_CHARACTERS = 80


class RewardError(RuntimeError):
    """A reward head could not score a batch.

    Args:
        cause: What went wrong, in words.
        head: Name of the head; empty when it is not known yet (``RewardHead`` fills it in).
        samples: Index in the batch and prompt of every sample concerned; empty when the failure
            cannot be pinned on samples.
    """

    def __init__(
        self, cause: str, *, head: str = "", samples: Sequence[tuple[int, str]] = ()
    ) -> None:
        self.cause = cause
        self.head = head
        self.samples = tuple((int(index), str(prompt)) for index, prompt in samples)
        super().__init__(self._message())

    def _message(self) -> str:
        message = f'Reward head "{self.head}" failed' if self.head else "A reward head failed"
        if self.samples:
            shown = [f"#{index} {_shorten(prompt)}" for index, prompt in self.samples]
            if len(shown) > _SHOWN_SAMPLES:
                rest = len(shown) - _SHOWN_SAMPLES
                shown = [*shown[:_SHOWN_SAMPLES], f"and {rest} more"]
            plural = "s" if len(self.samples) > 1 else ""
            message += f" on sample{plural} {', '.join(shown)}"
        return f"{message}: {self.cause}"

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call the constructor with the finished message and lose the fields.
        return _rebuild_error, (self.cause, self.head, self.samples)


def _rebuild_error(cause: str, head: str, samples: Sequence[tuple[int, str]]) -> RewardError:
    return RewardError(cause, head=head, samples=samples)


def _shorten(prompt: str) -> str:
    if len(prompt) > _SHOWN_CHARACTERS:
        prompt = prompt[: _SHOWN_CHARACTERS - 3] + "..."
    return repr(prompt)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RewardBatch:
    """N samples to score: images or texts, with the prompts they were made from.

    Raises:
        ValueError: If lengths differ, if not exactly one of ``images`` and ``texts`` is given, or
            if ``images`` has the wrong shape, type or range.
    """

    prompts: Sequence[str]  # N
    metadata: Sequence[Mapping[str, Any]] = ()  # N, or empty: no sample has any
    images: Tensor | None = None  # [N, 3, H, W] float32 in [0, 1], sRGB
    texts: Sequence[str] | None = None  # N

    def __post_init__(self) -> None:
        size = len(self.prompts)
        for name, texts in (("prompts", self.prompts), ("texts", self.texts or ())):
            if isinstance(texts, str):
                raise ValueError(f"`{name}` should be a sequence of strings. Found one string.")
            for index, text in enumerate(texts):
                if not isinstance(text, str):
                    raise ValueError(
                        f"`{name}[{index}]` should be a string. Found {type(text).__name__}."
                    )
        if not self.metadata:
            object.__setattr__(self, "metadata", tuple({} for _ in range(size)))
        if len(self.metadata) != size:
            raise ValueError(
                f"`metadata` should have one entry per prompt ({size}). Found {len(self.metadata)}."
            )
        for index, entry in enumerate(self.metadata):
            if not isinstance(entry, Mapping):
                raise ValueError(
                    f"`metadata[{index}]` should be a mapping. Found {type(entry).__name__}."
                )
        if (self.images is None) == (self.texts is None):
            finding = "neither" if self.images is None else "both"
            raise ValueError(
                f"Exactly one of `images` and `texts` should be given. Found {finding}."
            )
        if self.images is not None:
            check_images(self.images, size)
        if self.texts is not None and len(self.texts) != size:
            raise ValueError(
                f"`texts` should have one entry per prompt ({size}). Found {len(self.texts)}."
            )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def kind(self) -> Kind:
        """What the samples are."""
        return "texts" if self.images is None else "images"

    def require_images(self) -> Tensor:
        """Return the images, ``[N, 3, H, W]`` float32 in [0, 1].

        Raises:
            ValueError: If the batch holds texts.
        """
        if self.images is None:
            raise ValueError("This head scores images. Found a batch of texts.")
        return self.images

    def require_texts(self) -> Sequence[str]:
        """Return the N texts.

        Raises:
            ValueError: If the batch holds images.
        """
        if self.texts is None:
            raise ValueError("This head scores texts. Found a batch of images.")
        return self.texts

    def uint8(self) -> Tensor:
        """Quantise the images as a PNG file would: round(255 x).

        Returns:
            Tensor ``[N, 3, H, W]``, uint8, on the device of the images.

        Raises:
            ValueError: If the batch holds texts.
        """
        return self.require_images().detach().mul(255.0).round().to(torch.uint8)

    def arrays(self) -> np.ndarray:
        """Return the quantised images as an array ``[N, H, W, 3]``, uint8, RGB, contiguous."""
        return np.ascontiguousarray(self.uint8().permute(0, 2, 3, 1).cpu().numpy())

    def to_pil(self) -> list[Image.Image]:
        """Return the quantised images as N PIL images in mode RGB."""
        return [Image.fromarray(array) for array in self.arrays()]

    def samples(self, indices: Sequence[int]) -> list[tuple[int, str]]:
        """Return index and prompt of the given samples, as ``RewardError`` takes them."""
        return [(int(index), self.prompts[int(index)]) for index in indices]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """What a head says of N samples: a number each, and whatever else the scores table should hold.

    Raises:
        ValueError: If a column of ``extra`` has not one entry per sample.
    """

    values: Tensor  # [N] floating; NaN = the objective does not apply; higher is better
    extra: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # column -> N JSON values

    def __post_init__(self) -> None:
        for column, cells in self.extra.items():
            if isinstance(cells, str) or len(cells) != len(self.values):
                finding = "a string" if isinstance(cells, str) else len(cells)
                raise ValueError(
                    f"`extra[{column!r}]` should have one entry per sample ({len(self.values)}). "
                    f"Found {finding}."
                )


class RewardHead(ABC):
    """One objective: scores a batch, one number per sample, higher is better.

    A subclass sets the class attributes, implements ``score``, and imports heavy libraries inside
    its constructor. Call the head itself, not ``score``: the call checks what ``score`` returned.

    Attributes:
        name: Name of the objective in logs and errors; settable on an instance.
        unit: Unit of the scores, e.g. "kB" or "1 - edit distance / length".
        requires: What a prompt must have for the head to apply, e.g. ``("quoted text",)``. Samples
            without it score ``NaN``.
        scores: What it scores; other batches are refused before ``score`` is called. The default
            leaves that to ``score``.
        neutral_options: Constructor arguments that say where and how fast the head computes, but
            not what: servers that differ in them alone give the same scores.
    """

    name: str = ""
    unit: str = ""
    requires: tuple[str, ...] = ()
    scores: Scored = "both"
    neutral_options: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def score(self, batch: RewardBatch) -> Tensor | Scores:
        """Score a batch of at least one sample.

        Returns:
            Floating tensor ``[N]``, any device; ``NaN`` where the objective does not apply. Or
            ``Scores``, to add columns to the scores table.
        """

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Score a batch and check the result.

        Returns:
            Float32 tensor ``[N]`` on the CPU; ``NaN`` where the objective does not apply.

        Raises:
            RewardError: If the head scores something else, or ``score`` raises, or returns an
                infinity, a wrong shape or a wrong type.
        """
        return self.evaluate(batch).values

    def evaluate(self, batch: RewardBatch) -> Scores:
        """Do as calling the head does, and add the columns of the scores table.

        Raises:
            RewardError: As calling the head.
        """
        self.expect(batch.kind)
        if len(batch) == 0:
            return Scores(values=torch.empty(0))
        try:
            with torch.no_grad():
                returned = self.score(batch)
        except RewardError as error:
            if error.head:
                raise
            raise RewardError(error.cause, head=self._label, samples=error.samples) from error
        except Exception as error:
            cause = cause_of(error)
            # A batch of one leaves no doubt about the sample.
            samples = batch.samples([0]) if len(batch) == 1 else ()
            raise RewardError(cause, head=self._label, samples=samples) from error
        scores = returned if isinstance(returned, Scores) else Scores(values=returned)
        values = self._checked(scores.values, batch)
        return Scores(values=values, extra=self._checked_columns(scores.extra, batch))

    def expect(self, kind: Kind) -> None:
        """Check that the head scores such samples: to ask before anything is loaded or drawn.

        Raises:
            RewardError: If it does not.
        """
        if self.scores not in (kind, "both"):
            raise RewardError(
                f"This head scores {self.scores}. Found a batch of {kind}.", head=self._label
            )

    def check_prompts(  # noqa: B027 - most heads can use any
        self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> None:
        """Check that the head can use the prompts: to ask before anything is loaded or drawn.

        Args:
            prompts: N prompts that samples will be drawn from.
            metadata: Metadata of the N prompts.

        Raises:
            RewardError: If it cannot, whatever the samples.
        """

    def remarks(self, prompts: Sequence[str]) -> list[str]:
        """Return what users should know of the scores of samples drawn from these prompts.

        To ask when the head is loaded; a sentence or two for each kind of prompt that the head
        judges in part, or not at all.
        """
        return []

    def load(self) -> None:  # noqa: B027 - most heads hold nothing
        """Load what the head needs, so that the first batch need not wait for it.

        Raises:
            RewardError: If weights are missing or damaged, or a server does not answer.
        """

    def offload(self) -> None:  # noqa: B027 - most heads hold nothing
        """Free the accelerator's memory until the next batch; what was loaded stays in memory."""

    def provenance(self) -> Mapping[str, str]:
        """Return what scores depend on beside options: weights, revision, digest, engine version.

        Saved with every run and every scores table. Complete once the head has scored or loaded.
        """
        return {}

    def close(self) -> None:  # noqa: B027 - most heads hold nothing
        """Free what the head holds (worker processes, models). May be called more than once."""

    @property
    def _label(self) -> str:
        return self.name or type(self).__name__

    @property
    def _origin(self) -> str:
        """A sentence about the code whose scores are wrong, after a space, if a user wrote it."""
        return ""

    def _checked(self, rewards: Tensor, batch: RewardBatch) -> Tensor:
        if not isinstance(rewards, Tensor):
            raise RewardError(
                f"The scores should be a tensor. Found {type(rewards).__name__}.", head=self._label
            )
        if rewards.shape != (len(batch),):
            # Which sample lacks a score cannot be told, so all of them are named.
            raise RewardError(
                f"The scores should have shape [{len(batch)}]. Found {list(rewards.shape)}.",
                head=self._label,
                samples=batch.samples(range(len(batch))),
            )
        if not rewards.is_floating_point():
            raise RewardError(
                f"The scores should be floating point. Found {rewards.dtype}.", head=self._label
            )
        result = rewards.detach().to(device="cpu", dtype=torch.float32)
        infinite = result.isinf().nonzero().flatten().tolist()
        if infinite:
            raise RewardError(
                f"The scores should be finite or NaN. Found {float(result[infinite[0]])}."
                f"{self._origin}",
                head=self._label,
                samples=batch.samples(infinite),
            )
        return result

    def _checked_columns(
        self, extra: Mapping[str, Sequence[Any]], batch: RewardBatch
    ) -> dict[str, list[Any]]:
        checked: dict[str, list[Any]] = {}
        for column, cells in extra.items():
            if not isinstance(column, str) or not column:
                raise RewardError(
                    f"The name of a column should be text. Found {column!r}.{self._origin}",
                    head=self._label,
                )
            checked[column] = []
            for index, cell in enumerate(cells):
                try:
                    text = json.dumps(cell, allow_nan=False, default=_python_scalar)
                except (TypeError, ValueError) as error:
                    raise RewardError(
                        f"The column `{column}` should hold JSON values. Found {cell!r} ({error})."
                        f"{self._origin}",
                        head=self._label,
                        samples=batch.samples([index]),
                    ) from error
                checked[column].append(json.loads(text))
        return checked


def _python_scalar(value: Any) -> Any:
    """Return what JSON is given in the place of a NumPy scalar."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON value")
