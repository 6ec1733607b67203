"""What travels between the ``remote`` head and the reward server: PNG files and JSON.

A request, the body of ``POST /score``: a length (4 bytes, big-endian), so many bytes of JSON, which
are a ``ScoreRequest``, then the PNG files one after the other.

    {"format": 1, "head": "ocr", "prompts": ["..."], "metadata": [{}], "images": [81234]}

The answer is JSON: a ``Reply``, or with a status of 400 or more an ``ErrorReply``.

    {"identity": {"head": "ocr", "digest": "...", ...}, "scores": [0.5, null],
     "applies": [true, false], "extra": {"column": ["...", "..."]}}
    {"error": {"kind": "head_failed", "cause": "...", "head": "ocr", "samples": [3]}}

Nothing is unpickled, images lose nothing, and no JSON here holds NaN or an infinity.
"""

from __future__ import annotations

import itertools
import json
import math
import reprlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypeVar

import numpy as np
import torch
from PIL.ImageFile import ImageFile
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)
from torch import Tensor

from rewards.base import RewardBatch, Scores
from rewards.identity import Identity
from rewards.serving import checked_png

FileT = TypeVar("FileT")
MessageT = TypeVar("MessageT", bound=BaseModel)
ResultT = TypeVar("ResultT")

FORMAT = 1
CONTENT_TYPE = "application/x-reward-batch"
SECONDS_HEADER = "Reward-Seconds"  # how long the client goes on waiting
LONGEST_TEXT = 100_000  # characters of a prompt, and of a text to score
_LENGTH = struct.Struct(">I")
_LARGEST_SCORE = torch.finfo(torch.float32).max
_SHOWN = 60  # bytes that are quoted in an error


class WireError(ValueError):
    """What came over the wire is not what this module describes."""


def _same_format(value: Any) -> int:
    if value != FORMAT:
        raise ValueError(
            f"client and server should be of one version, and this side speaks format {FORMAT}"
        )
    return FORMAT


def _bounded(text: str) -> str:
    # By hand: pydantic cannot measure texts with half a surrogate pair, which JSON can hold.
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"a text should have at most {LONGEST_TEXT} characters, not {len(text)}")
    return text


Format = Annotated[int, BeforeValidator(_same_format)]
Text = Annotated[str, AfterValidator(_bounded)]
Score = Annotated[
    float, Field(strict=True, allow_inf_nan=False, ge=-_LARGEST_SCORE, le=_LARGEST_SCORE)
]


class ScoreRequest(BaseModel, frozen=True):
    """N samples to score: everything but the images."""

    format: Format
    head: str  # name on the server
    prompts: list[Text] = Field(min_length=1)  # N
    metadata: list[dict[str, Any]] = []  # N, or empty
    texts: list[Text] | None = None  # N; either these
    images: list[Annotated[int, Field(strict=True, gt=0)]] | None = None  # or N sizes in bytes

    @property
    def kind(self) -> str:
        """What is to be scored: ``images`` or ``texts``."""
        return "images" if self.texts is None else "texts"

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.texts is None) == (self.images is None):
            raise ValueError("exactly one of `images` and `texts` should be given")
        lists = {"metadata": self.metadata or None, "texts": self.texts, "images": self.images}
        for key, value in lists.items():
            if value is not None and len(value) != len(self.prompts):
                raise ValueError(f"`{key}` should be a list of {len(self.prompts)}, like `prompts`")
        return self


class Reply(BaseModel, frozen=True):
    """The scores of N samples.

    A score is None where the objective does not apply, and ``applies`` says so once more: ``null``
    alone is also what a careless encoder makes of a failed computation.
    """

    identity: Identity
    scores: list[Score | None]  # N
    applies: list[Annotated[bool, Field(strict=True)]]  # N
    extra: dict[str, list[Any]]  # N by column


class Problem(BaseModel, frozen=True):
    """Why a request has no scores."""

    kind: str
    cause: str
    samples: list[Annotated[int, Field(strict=True, ge=0)]] = []  # positions within the request


class ErrorReply(BaseModel, frozen=True):
    """What a server says instead of a reply."""

    error: Problem


class Served(Identity, frozen=True):
    """A head on a server."""

    ready: bool


class Health(BaseModel, frozen=True):
    """What a server says of itself."""

    format: Format
    heads: dict[str, Served]  # by name
    limits: dict[str, int] = {}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """N samples as they came, whose images take a quarter of what a ``RewardBatch`` does.

    Raises:
        ValueError: As ``RewardBatch``, but for the images' values: all that 8 bits hold are
            valid.
    """

    prompts: Sequence[str]  # N
    metadata: Sequence[Mapping[str, Any]] = ()  # N, or empty
    images: Tensor | None = None  # [N, 3, H, W] uint8
    texts: Sequence[str] | None = None  # N

    def __post_init__(self) -> None:
        stand_in = None if self.images is None else torch.zeros(len(self.images), 3, 1, 1)
        self._batch(stand_in)

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self) -> RewardBatch:
        """Return what a head scores."""
        return self._batch(None if self.images is None else self.images.float().div(255))

    def _batch(self, images: Tensor | None) -> RewardBatch:
        return RewardBatch(
            prompts=self.prompts, metadata=self.metadata, images=images, texts=self.texts
        )


def pack(head: str, batch: RewardBatch, arrays: np.ndarray | None, indices: range) -> bytes:
    """Return the request that asks for the scores of some samples.

    Args:
        head: Name of the head on the server.
        batch: The whole batch.
        arrays: Its images, ``[N, H, W, 3]`` uint8; None for texts.
        indices: The samples to ask for.
    """
    header: dict[str, Any] = {
        "format": FORMAT,
        "head": head,
        "prompts": [batch.prompts[i] for i in indices],
    }
    if any(batch.metadata[i] for i in indices):
        header["metadata"] = [dict(batch.metadata[i]) for i in indices]
    files = []
    if arrays is None:
        header["texts"] = [batch.require_texts()[i] for i in indices]
    else:
        files = [checked_png.encode(arrays[i]) for i in indices]
        header["images"] = [len(file) for file in files]
    text = dump(header)
    return b"".join([_LENGTH.pack(len(text)), text, *files])


def unpack(body: bytes) -> tuple[ScoreRequest, list[memoryview]]:
    """Read a request, which says how much work it is, and find its PNG files.

    Raises:
        WireError: If it is malformed.
    """
    if len(body) < _LENGTH.size:
        raise WireError("The body should begin with a length.")
    start = _LENGTH.size + _LENGTH.unpack_from(body)[0]
    if start > len(body):
        raise WireError("The body is shorter than its header says.")
    request = checked(ScoreRequest, body[_LENGTH.size : start])
    ends = list(itertools.accumulate(request.images or (), initial=start))
    if ends[-1] != len(body):
        raise WireError("The body should end with the last image.")
    view = memoryview(body)
    return request, [view[begin:end] for begin, end in itertools.pairwise(ends)]


def open_images(files: Sequence[memoryview]) -> list[ImageFile]:
    """Return the images of a request, which are not decompressed for that.

    Raises:
        WireError: If one is no RGB PNG file of 8 bits.
    """
    return [_of_image(index, checked_png.open_image, file) for index, file in enumerate(files)]


def decode(request: ScoreRequest, opened: Sequence[ImageFile]) -> Samples:
    """Return the samples of a request whose images are open.

    Raises:
        WireError: If an image cannot be decoded, or sizes differ.
    """
    decoded = [_of_image(index, checked_png.decode, one) for index, one in enumerate(opened)]
    for index, pixels in enumerate(decoded):
        if pixels.shape != decoded[0].shape:
            raise WireError(f"Image {index} has another size than the first.")
    return Samples(
        prompts=request.prompts,
        metadata=request.metadata,
        images=torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2) if decoded else None,
        texts=request.texts,
    )


def _of_image(index: int, read: Callable[[FileT], ResultT], file: FileT) -> ResultT:
    try:
        return read(file)
    except ValueError as error:
        raise WireError(f"Image {index} {error}") from error


def pack_reply(identity: Identity, scores: Scores) -> bytes:
    """Return the reply to a request, from scores that the head has checked."""
    values = scores.values.double().tolist()
    applies = [not math.isnan(value) for value in values]
    return dump(
        {
            "identity": identity.model_dump(),
            "scores": [value if ok else None for value, ok in zip(values, applies, strict=True)],
            "applies": applies,
            "extra": {column: list(cells) for column, cells in scores.extra.items()},
        }
    )


def unpack_reply(body: bytes, count: int) -> tuple[Identity, Scores]:
    """Read the reply to a request of ``count`` samples.

    Raises:
        WireError: If it is malformed, has another number of scores, or holds a score that is
            neither a finite float32 nor ``null`` where the objective does not apply.
    """
    reply = checked(Reply, body)
    sizes = {"scores": len(reply.scores), "applies": len(reply.applies)}
    sizes |= {f"extra.{column}": len(cells) for column, cells in reply.extra.items()}
    for key, size in sizes.items():
        if size != count:
            raise WireError(f"`{key}` should be a list of {count}. Found a list of {size}.")
    for index, (score, applies) in enumerate(zip(reply.scores, reply.applies, strict=True)):
        if (score is not None) != applies:
            raise WireError(
                f"Score {index} should be a number that applies, or null that does not. "
                f"Found {score} with `applies` = {applies}."
            )
    values = [math.nan if score is None else score for score in reply.scores]
    scores = Scores(values=torch.tensor(values, dtype=torch.float64), extra=reply.extra)
    return reply.identity, scores


def joined(parts: Sequence[Scores]) -> Scores:
    """Return the scores of several batches as those of one.

    A column that a batch lacks is None in its rows.
    """
    columns = dict.fromkeys(column for part in parts for column in part.extra)
    extra = {
        column: [
            cell for part in parts for cell in part.extra.get(column, [None] * len(part.values))
        ]
        for column in columns
    }
    return Scores(values=torch.cat([part.values for part in parts]), extra=extra)


def sliced(scores: Scores, start: int, stop: int) -> Scores:
    """Return the scores of samples ``start`` to ``stop``.

    Args:
        scores: The scores of a whole batch.
        start: The first sample.
        stop: The sample behind the last one.
    """
    values: Tensor = scores.values[start:stop]
    return Scores(
        values=values, extra={name: list(cells)[start:stop] for name, cells in scores.extra.items()}
    )


def dump(value: Any) -> bytes:
    """Return a value as JSON in UTF-8.

    Raises:
        ValueError: If JSON cannot hold the value: NaN, an infinity, or an object of a class.
    """
    try:
        return json.dumps(value, allow_nan=False).encode()
    except TypeError as error:
        raise ValueError(str(error)) from error


def checked(kind: type[MessageT], text: bytes) -> MessageT:
    """Read a message.

    Raises:
        WireError: If the text is not JSON, where NaN and infinities are none, or no such message;
            says in one sentence what is wrong first.
    """
    try:
        # Not pydantic's own parser, which refuses half a surrogate pair.
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise WireError(f"This is not JSON: {error}. It begins with {text[:_SHOWN]!r}.") from error
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = f"`{'.'.join(map(str, first['loc']))}`" if first["loc"] else "The message"
        problem = first["msg"].removeprefix("Value error, ")
        raise WireError(
            f"{place} is wrong: {problem}. Found {reprlib.repr(first['input'])}."
        ) from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
