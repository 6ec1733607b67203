"""What travels between the ``remote`` head and the reward server: PNG files and JSON.

A request, the body of ``POST /score``: a length (4 bytes, big-endian), so many bytes of JSON, then
the PNG files one after the other.

    {"format": 1, "head": "ocr", "prompts": ["..."], "metadata": [{}], "images": [81234]}

``images`` holds the size of each PNG file; a batch of texts has ``texts`` instead. ``metadata`` may
be left out. The reply is JSON:

    {"identity": {"head": "ocr", "digest": "...", ...}, "scores": [0.5, null],
     "applies": [true, false], "extra": {"column": ["...", "..."]}}

A score is ``null`` where the objective does not apply, and ``applies`` says so once more: ``null``
alone is also what a careless encoder makes of a failed computation. A refusal has a status of 400
or more and the body ``{"error": {"kind": ..., "cause": ..., "head": ..., "samples": [...]}}``.

Nothing is unpickled, pictures lose nothing, and no JSON here holds NaN or an infinity.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewards.base import RewardBatch, Scores
from rewards.identity import Identity
from rewards.serving import checked_png

FORMAT = 1
CONTENT_TYPE = "application/x-reward-batch"
SECONDS_HEADER = "Reward-Seconds"  # how long the client goes on waiting
_LENGTH = struct.Struct(">I")
_LARGEST_SCORE = torch.finfo(torch.float32).max


class WireError(ValueError):
    """What came over the wire is not what this module describes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """N samples as they came, whose pictures take a quarter of what a ``RewardBatch`` does.

    Raises:
        ValueError: As ``RewardBatch``, but for the pictures' values: all that 8 bits hold are
            valid.
    """

    prompts: Sequence[str]  # N
    metadata: Sequence[Mapping[str, Any]] = ()  # N, or empty
    pictures: Tensor | None = None  # [N, 3, H, W] uint8
    texts: Sequence[str] | None = None  # N

    def __post_init__(self) -> None:
        stand_in = None if self.pictures is None else torch.zeros(len(self.pictures), 3, 1, 1)
        self._batch(stand_in)

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self) -> RewardBatch:
        """Return what a head scores."""
        return self._batch(None if self.pictures is None else self.pictures.float().div(255))

    def _batch(self, images: Tensor | None) -> RewardBatch:
        return RewardBatch(
            prompts=self.prompts, metadata=self.metadata, images=images, texts=self.texts
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The JSON of a request: everything but the pictures."""

    head: str
    prompts: Sequence[str]  # N
    metadata: Sequence[Mapping[str, Any]]  # N, or empty
    texts: Sequence[str] | None  # N
    images: Sequence[int] | None  # N sizes in bytes
    start: int  # where in the body the first PNG file begins


def pack(head: str, batch: RewardBatch, pictures: np.ndarray | None, indices: range) -> bytes:
    """Return the request that asks for the scores of some samples.

    Args:
        head: Name of the head on the server.
        batch: The whole batch.
        pictures: Its images, ``[N, H, W, 3]`` uint8; None for texts.
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
    if pictures is None:
        header["texts"] = [batch.require_texts()[i] for i in indices]
    else:
        files = [checked_png.encode(pictures[i]) for i in indices]
        header["images"] = [len(file) for file in files]
    text = dump(header)
    return b"".join([_LENGTH.pack(len(text)), text, *files])


def unpack_header(body: bytes) -> Header:
    """Read the JSON of a request, which says how much work it is.

    Raises:
        WireError: If it is malformed.
    """
    if len(body) < _LENGTH.size:
        raise WireError("The body should begin with a length.")
    start = _LENGTH.size + _LENGTH.unpack_from(body)[0]
    if start > len(body):
        raise WireError("The body is shorter than its header says.")
    header = parse(body[_LENGTH.size : start])
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise WireError(f"The header should be a JSON object with `format` = {FORMAT}.")
    head, prompts = header.get("head"), header.get("prompts")
    if not isinstance(head, str) or not isinstance(prompts, list) or not prompts:
        raise WireError("The header should have a text `head` and a list `prompts`, not empty.")
    lists = {key: header.get(key) for key in ("metadata", "texts", "images")}
    for key, value in lists.items():
        if value is not None and (not isinstance(value, list) or len(value) != len(prompts)):
            raise WireError(f"`{key}` should be a list of {len(prompts)}, like `prompts`.")
    sizes = lists["images"]
    if sizes is not None:
        if not all(type(size) is int and size > 0 for size in sizes):
            raise WireError("`images` should hold positive sizes in bytes.")
        if start + sum(sizes) != len(body):
            raise WireError("The body should end with the last picture.")
    return Header(
        head=head,
        prompts=prompts,
        metadata=lists["metadata"] or [],
        texts=lists["texts"],
        images=sizes,
        start=start,
    )


def check_texts(header: Header, max_text: int) -> None:
    """Check how long the prompts and texts of a request are.

    Raises:
        WireError: If one is no text, or has more than ``max_text`` characters.
    """
    for key, texts in (("prompts", header.prompts), ("texts", header.texts or ())):
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise WireError(
                    f"`{key}[{index}]` should be a string. Found {type(text).__name__}."
                )
            if len(text) > max_text:
                raise WireError(
                    f"`{key}[{index}]` should have at most {max_text} characters. "
                    f"Found {len(text)}."
                )


def count_pixels(header: Header, body: bytes, max_pixels: int) -> int:
    """Return the pixels of all pictures of a request, which are not decompressed for that.

    Raises:
        WireError: If one has more than ``max_pixels``, or is no RGB PNG file of 8 bits.
    """
    total = 0
    for index, (begin, end) in enumerate(_places(header)):
        try:
            width, height = checked_png.size(body[begin : min(end, begin + checked_png.HEAD)])
        except ValueError as error:
            raise WireError(f"Picture {index} {error}") from error
        if width * height > max_pixels:
            raise WireError(
                f"Picture {index} should have at most {max_pixels} pixels. "
                f"Found {width} x {height}."
            )
        total += width * height
    return total


def unpack_samples(header: Header, body: bytes) -> Samples:
    """Read the pictures of a request, whose pixels ``count_pixels`` has counted.

    Raises:
        WireError: If one is no RGB picture of 8 bits of the size that was counted, if sizes
            differ, or if a list holds something else.
    """
    pictures = None
    if header.images is not None:
        decoded = []
        for index, (begin, end) in enumerate(_places(header)):
            try:
                decoded.append(checked_png.decode(body[begin:end]))
            except ValueError as error:
                raise WireError(f"Picture {index} {error}") from error
            if decoded[index].shape != decoded[0].shape:
                raise WireError(f"Picture {index} has another size than the first.")
        pictures = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)  # [N, 3, H, W]
    try:
        return Samples(
            prompts=header.prompts, metadata=header.metadata, pictures=pictures, texts=header.texts
        )
    except ValueError as error:
        raise WireError(str(error)) from error


def _places(header: Header) -> list[tuple[int, int]]:
    # Where in the body each file begins and ends.
    ends = list(itertools.accumulate(header.images or (), initial=header.start))
    return list(itertools.pairwise(ends))


def pack_reply(identity: Identity, scores: Scores) -> bytes:
    """Return the reply to a request, from scores that the head has checked."""
    values = scores.values.double().tolist()
    applies = [not math.isnan(value) for value in values]
    return dump(
        {
            "identity": identity.to_json(),
            "scores": [value if ok else None for value, ok in zip(values, applies, strict=True)],
            "applies": applies,
            "extra": {column: list(cells) for column, cells in scores.extra.items()},
        }
    )


def unpack_reply(body: bytes, count: int) -> tuple[Identity, Scores]:
    """Read the reply to a request of ``count`` samples.

    Raises:
        ValueError: If it is malformed, has another number of scores, or holds a score that is
            neither a finite float32 nor ``null`` where the objective does not apply.
    """
    reply = parse(body)
    if not isinstance(reply, dict):
        raise WireError("The reply should be a JSON object.")
    values, applies, extra = (reply.get(key) for key in ("scores", "applies", "extra"))
    for key, entries in (("scores", values), ("applies", applies)):
        if not isinstance(entries, list) or len(entries) != count:
            size = f" of {len(entries)}" if isinstance(entries, list) else ""
            raise WireError(
                f"`{key}` should be a list of {count}. Found {type(entries).__name__}{size}."
            )
    assert isinstance(values, list)
    assert isinstance(applies, list)
    scores = torch.empty(count, dtype=torch.float64)
    for index, (value, applied) in enumerate(zip(values, applies, strict=True)):
        scores[index] = _score(index, value, applied)
    if not isinstance(extra, dict):
        raise WireError("`extra` should be an object.")
    for column, cells in extra.items():
        if not isinstance(cells, list) or len(cells) != count:
            raise WireError(f"`extra.{column}` should be a list of {count}.")
    return Identity.from_json(reply.get("identity")), Scores(values=scores, extra=extra)


def _score(index: int, value: Any, applied: Any) -> float:
    if applied is False and value is None:
        return math.nan
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if applied is not True or not number or not abs(value) <= _LARGEST_SCORE:
        raise WireError(
            f"Score {index} should be a finite number that applies, or null that does not. "
            f"Found {str(value)[:40]} with `applies` = {str(applied)[:40]}."
        )
    return float(value)


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
    """Return the scores of samples ``start`` to ``stop``."""
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


def parse(text: bytes) -> Any:
    """Read JSON.

    Raises:
        WireError: If it is not JSON; NaN and infinities are not.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise WireError(f"This is not JSON: {error}. It begins with {text[:60]!r}.") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
