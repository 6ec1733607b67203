"""Plain functions as reward heads: of images or texts, a batch or one, blocking or async."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardError, RewardHead, Scores
from rewards.blame import cause_of
from rewards.coroutines import LoopRunner, gather
from rewards.parameters import function_name, parameters_of
from rewards.source import source_of

CONCURRENCY = 8  # samples under way at a time, by default


class FunctionHead(RewardHead):
    """A plain function as a reward head.

    A batch function is ``f(images, prompts, **metadata) -> list[float]``, or an array, or a tensor:
    N numbers, higher is better, ``NaN`` where the objective does not apply. ``images`` is the
    tensor ``[N, 3, H, W]`` in [0, 1], ``prompts`` the list of N prompts. To add columns to the
    scores table it returns ``Scores(values=..., extra={column: N JSON values})``. A function that
    scores texts is ``f(texts, prompts, **metadata)``, with the list of N texts.

    With ``per_image`` it is ``f(image, prompt, **metadata) -> float``, called once per sample with
    ``image [3, H, W]``, or ``f(text, prompt, **metadata) -> float``. To add columns it returns
    ``(score, {column: JSON value})``; a sample for which it returns none gets null in them.

    What a parameter is given, its name says, and not its place: the samples go to ``images``,
    ``image``, ``pictures`` or ``picture``, or to ``texts``, ``text``, ``completions``,
    ``completion``, ``responses`` or ``response``; the prompts to ``prompts`` or ``prompt``, which
    may be left out. So TRL's ``f(prompts, completions, **kwargs)`` will do. Where none of these
    names is there, common others are known, as in ``f(question, answer)`` or ``f(captions,
    generated)``: see ``rewards.parameters``. A function of which no parameter stands for the
    samples is refused.

    A metadata key is passed when the function names it as a further parameter, or for every key
    when it has ``**metadata``: to a batch function as a list of N values, ``None`` for a sample
    without the key (if no sample has it, the parameter's default holds); with ``per_image`` as the
    sample's value. A sample without a key that a parameter without a default names is an error; of
    a set of prompts ``check_prompts`` tells it before anything is drawn.

    Either kind may be an ``async def``. Its coroutines run on one event loop that the head keeps,
    so a client with open connections may serve all batches. Nothing here limits how long they take:
    give what waits on a network a timeout.

    Args:
        function: Scores a batch, or with ``per_image`` one sample; plain or ``async``.
        name: Name of the objective; the function's own name by default.
        unit: Unit of the scores.
        requires: What a prompt must have for the function to return something else than ``NaN``.
        options: Fixed values for further parameters of the function; never read from metadata.
        per_image: Whether the function scores one image, or one text, and not a batch.
        concurrency: With ``per_image`` and an async function, how many samples of a batch may be
            under way at a time.

    Raises:
        ValueError: If the function has no parameter for the samples or claims the name of an option
            of the head, an option names no further parameter of it, or ``concurrency`` is not a
            positive integer.
    """

    neutral_options = ("concurrency",)

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str = "",
        unit: str = "",
        requires: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
        per_image: bool = False,
        concurrency: int = CONCURRENCY,
    ) -> None:
        self.name = name or function_name(function)
        self.unit = unit
        self.requires = tuple(requires)
        self._parameters = parameters_of(function)
        self.scores = self._parameters.scores
        self.function = function
        self.options = dict(options or {})
        if not isinstance(per_image, bool):
            raise ValueError(f"Parameter `per_image` should be true or false. Found {per_image!r}.")
        self.per_image = per_image
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise ValueError(
                "Parameter `concurrency` should be a positive integer. "
                f"Found `concurrency = {concurrency!r}`."
            )
        self.concurrency = concurrency
        self._source = source_of(function)
        further = self._parameters.further
        unknown = sorted(set(self.options) - set(further))
        if unknown:
            raise ValueError(
                f"Options of `{self.name}` should be among {sorted(further)}. Found {unknown}."
            )
        self._is_async = is_async(function)
        self._loop = LoopRunner()

    def score(self, batch: RewardBatch) -> Scores:
        """Call the function; see the class for what it is given and may return.

        Raises:
            RewardError: If a sample lacks metadata, or the function returns something else than
                numbers; with ``per_image``, for whatever it raises. Names the samples.
        """
        self._check_metadata(batch)
        return self._score_each(batch) if self.per_image else self._score_batch(batch)

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Check that every prompt has the metadata that the function needs.

        Raises:
            RewardError: If one has not; names the function with its file and line, the parameter,
                and the keys that there are. Or if a key may be meant for a parameter that is given
                something else.
        """
        for name in self._parameters.guessed:
            if any(name in entry for entry in metadata):
                raise RewardError(
                    f"The parameter `{name}` of the function {self._parameters.described} may mean "
                    f"the metadata key of that name, or else the samples. Name those `images` or "
                    f"`texts`.",
                    head=self._label,
                )
        for key in self._needed(metadata):
            lacking = [index for index, entry in enumerate(metadata) if key not in entry]
            if not lacking:
                continue
            keys = sorted({key for entry in metadata for key in entry})
            raise RewardError(
                f"The function {self._parameters.described} needs prompts with the metadata "
                f"`{key}` (a .jsonl, .csv or .tsv file has some), or an option of that name. "
                f"{len(lacking)} of {len(metadata)} lack it, first {prompts[lacking[0]]!r}. "
                f"Parameters are filled by their names. Available here: the samples as `images` or "
                f"`texts`, {', '.join(f'`{name}`' for name in ('prompts', *keys))}.",
                head=self._label,
            )

    def provenance(self) -> Mapping[str, str]:
        """Return module and name of the function, and the SHA-256 of the file that it stands in."""
        return self._source

    def close(self) -> None:
        """Close the event loop of an async function; the next batch opens another."""
        self._loop.close()

    def _score_batch(self, batch: RewardBatch) -> Scores:
        samples = list(batch.require_texts()) if batch.images is None else batch.images
        given, named = self._parameters.arguments(
            samples, list(batch.prompts), batch.kind, one=False, keys=self._keys(batch)
        )
        try:
            returned = self.function(*given, **named, **self._columns(batch), **self.options)
            if self._is_async:
                returned = self._loop.run(returned)
            scores = returned.values if isinstance(returned, Scores) else returned
            values = _tensor(scores, batch, self._parameters.described)
        except RewardError as error:
            raise RewardError(f"{error.cause}{self._hint()}", samples=error.samples) from error
        except Exception as error:
            only = [0] if len(batch) == 1 else []  # no doubt which it was
            cause = f"{cause_of(error)}{self._hint()}"
            raise RewardError(cause, samples=batch.samples(only)) from error
        if values.shape != (len(batch),):
            raise RewardError(
                f"The scores should have shape [{len(batch)}]. Found {list(values.shape)}."
                f"{self._origin}{self._hint()}",
                samples=batch.samples(range(len(batch))),
            )
        return Scores(values=values, extra=returned.extra if isinstance(returned, Scores) else {})

    def _score_each(self, batch: RewardBatch) -> Scores:
        samples = batch.require_texts() if batch.images is None else batch.images
        calls, keys = [], self._keys(batch)
        for sample, prompt, entry in zip(samples, batch.prompts, batch.metadata, strict=True):
            given, named = self._parameters.arguments(
                sample, prompt, batch.kind, one=True, keys=keys
            )
            named |= self._keywords(entry) | self.options
            calls.append(partial(self.function, *given, **named))
        if self._is_async:
            pairs = self._loop.run(self._await_each(calls, batch))
        else:
            described = self._parameters.described
            pairs = [_attempt(call, index, batch, described) for index, call in enumerate(calls)]
        columns = list(dict.fromkeys(column for _, cells in pairs for column in cells))
        return Scores(
            values=torch.tensor([value for value, _ in pairs], dtype=torch.float64),
            extra={column: [cells.get(column) for _, cells in pairs] for column in columns},
        )

    async def _await_each(
        self, calls: Sequence[Callable[[], Awaitable[Any]]], batch: RewardBatch
    ) -> list[tuple[float, Mapping[str, Any]]]:
        attempts = [
            partial(_await, call, index, batch, self._parameters.described)
            for index, call in enumerate(calls)
        ]
        try:
            return await gather(attempts, concurrency=self.concurrency)
        except ExceptionGroup as group:
            errors = [error for error in group.exceptions if isinstance(error, RewardError)]
            samples = sorted(sample for error in errors for sample in error.samples)
            raise RewardError(errors[0].cause, samples=samples) from errors[0].__cause__

    @property
    def _origin(self) -> str:
        return f" It comes from the function {self._parameters.described}."

    def _keys(self, batch: RewardBatch) -> set[str]:
        """Return options, and keys of the samples' metadata."""
        return {*self.options, *(key for entry in batch.metadata for key in entry)}

    def _needed(self, metadata: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the parameters that metadata must fill."""
        own = self._parameters
        return [
            key
            for key, default in own.further.items()
            if default is inspect.Parameter.empty
            and key not in self.options
            and (key != own.stand_in or any(key in entry for entry in metadata))
        ]

    def _check_metadata(self, batch: RewardBatch) -> None:
        own = self._parameters
        for name in own.taken(batch.kind, one=self.per_image):
            clashing = [index for index, entry in enumerate(batch.metadata) if name in entry]
            if clashing:
                raise RewardError(
                    f"The metadata key `{name}` has the name of what the function is given anyway. "
                    f"Rename the key, or the parameter, or write `/` after the function's first "
                    f"two parameters.",
                    samples=batch.samples(clashing),
                )
        for key in self._needed(batch.metadata):
            lacking = [index for index, entry in enumerate(batch.metadata) if key not in entry]
            if lacking:
                raise RewardError(
                    f"The function {own.described} needs the metadata key `{key}`, which these "
                    f"samples lack. Parameters are filled by their names: the samples are "
                    f"`images` or `texts`, the prompts `prompts`.",
                    samples=batch.samples(lacking),
                )

    def _hint(self) -> str:
        """Return what a failure of a whole batch may come from."""
        name = self._parameters.singular
        if not name:
            return ""
        return (
            f" The function's parameter `{name}` speaks of one sample, and it was given all of a "
            f"batch: for a function of one sample set `per_image: true`."
        )

    def _keywords(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the function is given of one sample's metadata."""
        own = self._parameters
        return {
            key: value
            for key, value in entry.items()
            if key not in self.options and (own.takes_any or key in own.further)
        }

    def _columns(self, batch: RewardBatch) -> dict[str, list[Any]]:
        """Return what the function is given of all samples' metadata."""
        keys = {key: None for entry in batch.metadata for key in self._keywords(entry)}
        return {key: [entry.get(key) for entry in batch.metadata] for key in keys}


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether calling the function gives a coroutine.

    Objects with an async ``__call__`` are recognised.
    """
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        type(function).__call__
    )


def _attempt(
    call: Callable[[], Any], index: int, batch: RewardBatch, described: str
) -> tuple[float, Mapping[str, Any]]:
    """Score one sample; whatever goes wrong is pinned on it."""
    try:
        return _pair(call(), described)
    except Exception as error:
        raise _failure(error, index, batch) from error


async def _await(
    call: Callable[[], Awaitable[Any]], index: int, batch: RewardBatch, described: str
) -> tuple[float, Mapping[str, Any]]:
    """Do as ``_attempt``, for an async function."""
    try:
        return _pair(await call(), described)
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # from outside: another sample failed
            raise
        raise _failure(error, index, batch) from error
    except Exception as error:
        raise _failure(error, index, batch) from error


def _failure(error: BaseException, index: int, batch: RewardBatch) -> RewardError:
    if isinstance(error, RewardError):
        return RewardError(error.cause, samples=batch.samples([index]))
    return RewardError(cause_of(error), samples=batch.samples([index]))


def _pair(returned: Any, described: str) -> tuple[float, Mapping[str, Any]]:
    """Return a sample's score and its further columns."""
    if not isinstance(returned, tuple):
        return _number(returned, described), {}
    if len(returned) != 2 or not isinstance(returned[1], Mapping):
        kinds = ", ".join(type(part).__name__ for part in returned)
        raise RewardError(
            f"The function {described} should return a number or (number, {{column: value}}). "
            f"Found ({kinds})."
        )
    return _number(returned[0], described), returned[1]


def _number(value: Any, described: str) -> float:
    # Only what is a number: float() and NumPy would read text, and NumPy makes NaN of None, which
    # says "does not apply" where the function perhaps forgot to return.
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.item())
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "biuf":
        return float(value.item())
    if isinstance(value, (Real, np.bool_)):
        return float(value)
    raise RewardError(
        "A score should be a number, NaN where the objective does not apply. "
        f"Found {_shown(value)}. It comes from the function {described}."
    )


def _shown(value: Any) -> str:
    if value is None or isinstance(value, str):
        return repr(value)
    shape = f" of shape {list(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else ""
    return f"{type(value).__name__}{shape}"


def _tensor(values: Any, batch: RewardBatch, described: str) -> Tensor:
    """Return what a batch function returned, as a floating tensor; the caller checks its length."""
    if isinstance(values, Tensor):
        return values if values.is_floating_point() else values.double()
    if isinstance(values, Sequence) and not isinstance(values, (str, bytes)):
        numbers = []
        for index, value in enumerate(values):
            try:
                numbers.append(_number(value, described))
            except RewardError as error:
                samples = batch.samples([index]) if index < len(batch) else ()
                raise RewardError(error.cause, samples=samples) from None
        return torch.tensor(numbers, dtype=torch.float64)
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise RewardError(
            f"The function {described} should return {len(batch)} numbers. Found {_shown(values)}."
        )
    return torch.as_tensor(array.astype(np.float64))
