"""Heads that run a pretrained model: loading, devices, precision, batches and sharing.

A head of this kind names its files, builds the module, and scores a micro-batch; ``ModelHead`` does
the rest:

    class Brightness(ModelHead):
        def __init__(self, model: str = "owner/name", **options: Unpack[ModelOptions]) -> None:
            super().__init__(model=model, **options)

        def _build(self, weights: Weights) -> nn.Module:
            return load_pretrained(SomeModel, weights, dtype=self.dtype)

        def _score_batch(self, module, images, prompts) -> Tensor:
            return module(normalise(images).to(self.device, self.dtype)).squeeze(-1)

A head that scores texts says ``scores = "texts"`` and is given them in the place of the images.
"""

from __future__ import annotations

import os
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from rewards.base import RewardBatch, RewardError, RewardHead, Scored, Scores
from rewards.blame import cause_of
from rewards.pretrained.locate import Weights, check_name, find_weights

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelOptions(TypedDict, total=False):
    """Options that all heads with a pretrained model have.

    Args:
        revision: Branch, tag or commit of a hub model; null takes its main branch.
        device: A torch device, or ``auto``: this process's GPU (by ``LOCAL_RANK``), else ``mps``,
            else the CPU.
        batch_size: Number of samples in one forward pass, at least 1.
        sha256: Expected SHA-256 digest of the weights; null expects none.
    """

    revision: str | None
    device: str
    batch_size: int
    sha256: str | None


class ModelHead(RewardHead):
    """A head that scores images, or texts, with a pretrained model.

    The model is loaded by ``load`` or with the first batch, by whichever thread comes first, and
    stands on the device until ``offload`` or ``close``. Heads of one process that build the same
    module from the same files, in the same precision, on the same device, share it; it is freed
    when the last of them is closed, and ``offload`` of one is ``offload`` for all until one scores.

    Scores do not depend on ``batch_size`` beyond rounding, nor on an autocast around the call.

    A subclass implements ``_build`` and ``_score_batch``, and sets ``required`` and ``optional``,
    and ``scores`` where that is not images. What ``_build`` makes depends on the files, ``dtype``
    and ``_recipe`` alone.

    Args:
        model: Folder, file, ``package://NAME/PATH``, or hub model; see
            ``rewards.pretrained.locate``.
        dtype: Precision of the model: one of ``DTYPES``.
        revision: See ``ModelOptions``.
        device: See ``ModelOptions``.
        batch_size: See ``ModelOptions``.
        sha256: See ``ModelOptions``; the digest is that of ``Weights.digest``.

    Raises:
        ValueError: If a parameter is wrong or names a folder or device that is not there.
    """

    scores: Scored = "images"
    required: Sequence[str] = ("config.json",)  # files beside the weights
    optional: Sequence[str] = ()  # files of use if the hub has them
    neutral_options = ("device", "batch_size", "sha256")

    def __init__(
        self,
        *,
        model: str,
        dtype: Dtype = "float32",
        revision: str | None = None,
        device: str = "auto",
        batch_size: int = 16,
        sha256: str | None = None,
    ) -> None:
        check_name(model, revision=revision)
        if dtype not in DTYPES:
            raise ValueError(
                f"Parameter `dtype` should be one of {', '.join(DTYPES)}. "
                f"Found `dtype = {dtype!r}`."
            )
        if batch_size < 1:
            raise ValueError(
                f"Parameter `batch_size` should be at least 1. Found `batch_size = {batch_size}`."
            )
        self.model = model
        self.revision = revision
        self.dtype = DTYPES[dtype]
        self.device = pick_device(device)
        self.batch_size = batch_size
        self.sha256 = sha256
        self._shared: _Shared | None = None
        self._provenance: dict[str, str] = {}
        self._lock = threading.Lock()

    @abstractmethod
    def _build(self, weights: Weights) -> nn.Module:
        """Load the module in ``self.dtype``, on the CPU. Runs once for heads that share it."""

    def _recipe(self) -> Hashable:
        """Return what heads have in common whose ``_build`` makes the same of the same files."""
        return type(self)._build

    def _prepare(self, weights: Weights) -> None:
        """Load what each head has of its own, e.g. a tokenizer."""

    @abstractmethod
    def _score_batch(self, module: Any, samples: Any, prompts: Sequence[str]) -> Tensor | Scores:
        """Score a micro-batch.

        Args:
            module: What ``_build`` returned, on ``self.device``.
            samples: Images ``[n, 3, H, W]``, uint8, on the device of the batch; or n texts.
            prompts: The n prompts.

        Returns:
            Finite scores ``[n]``, or ``Scores`` with further columns.
        """

    def _applies(self, prompt: str) -> bool:
        """Return whether the objective applies to samples of a prompt.

        It is asked when the model is loaded.
        """
        return True

    def score(self, batch: RewardBatch) -> Scores:
        """Score a batch, ``batch_size`` samples at a time; NaN where the objective does not apply.

        Raises:
            RewardError: If the model cannot be loaded, memory runs out, or a score is not finite.
        """
        # [N, 3, H, W], or N texts
        samples = batch.require_texts() if self.scores == "texts" else batch.uint8()
        shared = self._loaded()
        applies = {prompt: self._applies(prompt) for prompt in dict.fromkeys(batch.prompts)}
        chosen = [row for row, prompt in enumerate(batch.prompts) if applies[prompt]]
        values = torch.full((len(batch),), torch.nan)
        extra: dict[str, list[Any]] = {}
        # One head at a time: another thread must not move the module meanwhile.
        with shared.lock:
            shared.move(self.device)
            for start in range(0, len(chosen), self.batch_size):
                rows = chosen[start : start + self.batch_size]
                part = self._score_rows(shared.module, batch, samples, rows)
                values[rows] = part.values
                for column, cells in part.extra.items():
                    column_of_all = extra.setdefault(column, [None] * len(batch))
                    for row, cell in zip(rows, cells, strict=True):
                        column_of_all[row] = cell
        return Scores(values=values, extra=extra)

    def load(self) -> None:
        """Load the model and put it on the device.

        Raises:
            RewardError: If files are missing, damaged or not the expected ones, or the device has
                no room.
        """
        try:
            shared = self._loaded()
            with shared.lock:
                shared.move(self.device)
        except RewardError as error:
            if error.head:
                raise
            raise RewardError(error.cause, head=self._label, samples=error.samples) from error
        except Exception as error:
            raise RewardError(cause_of(error), head=self._label) from error

    def offload(self) -> None:
        """Move the model to the CPU's memory; the next batch brings it back."""
        shared = self._shared
        if shared is not None:
            with shared.lock:
                shared.move(torch.device("cpu"))

    def provenance(self) -> Mapping[str, str]:
        """Return model and precision; once loaded, also the revision and digests of the files."""
        requested = {"model": self.model, "dtype": str(self.dtype).removeprefix("torch.")}
        if self.revision is not None:
            requested["revision"] = self.revision
        return {**requested, **self._provenance}

    def close(self) -> None:
        """Let go of the model; the next batch loads it again."""
        with self._lock:
            self._shared = None

    def _loaded(self) -> _Shared:
        with self._lock:
            if self._shared is None:
                weights = find_weights(
                    self.model,
                    revision=self.revision,
                    required=self.required,
                    optional=self.optional,
                )
                key = (self._recipe(), weights.folder, weights.files, self.dtype, self.device)
                shared = _share(key, lambda: self._built(weights))
                if self.sha256 is not None and not shared.reread:  # another head has loaded it
                    shared.digest, shared.reread = weights.digest(), True
                weights.expect(self.sha256, shared.digest)
                self._prepare(weights)
                self._provenance = {**weights.origin(), "sha256": shared.digest}
                self._shared = shared
            return self._shared

    def _built(self, weights: Weights) -> _Shared:
        reread = self.sha256 is not None
        digest = weights.digest(reread=reread)
        weights.expect(self.sha256, digest)  # before anything is made of the files
        return _Shared(self._build(weights).eval().requires_grad_(False), digest, reread=reread)

    def _score_rows(
        self,
        module: nn.Module,
        batch: RewardBatch,
        samples: Tensor | Sequence[str],
        rows: Sequence[int],
    ) -> Scores:
        what = "text" if self.scores == "texts" else "image"
        prompts = [batch.prompts[row] for row in rows]
        part_of = samples[rows] if isinstance(samples, Tensor) else [samples[row] for row in rows]
        try:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                returned = self._score_batch(module, part_of, prompts)
        except torch.OutOfMemoryError as error:
            raise RewardError(
                f"No memory left on {self.device} for {len(rows)} {what}s at once. Lower "
                f"`batch_size`, or choose a smaller `dtype` or another `device`.",
                samples=batch.samples(rows),
            ) from error
        part = returned if isinstance(returned, Scores) else Scores(values=returned)
        values = part.values.to(device="cpu", dtype=torch.float32)
        if values.shape != (len(rows),):
            raise RewardError(
                f"The model should give one score per {what} ({len(rows)}). "
                f"Found the shape {list(values.shape)}.",
                samples=batch.samples(rows),
            )
        finite = values.isfinite()
        bad = [row for row, fine in zip(rows, finite.tolist(), strict=True) if not fine]
        if bad:
            raise RewardError(
                f"The model's scores should be finite. Found {values[~finite][0]:g}. Half "
                f"precision can overflow: try `dtype: float32`. Else the weights are damaged.",
                samples=batch.samples(bad),
            )
        return Scores(values=values, extra=part.extra)


def pick_device(device: str) -> torch.device:
    """Return the device that a name means for this process.

    Args:
        device: A torch device. ``auto`` is ``cuda`` if there is a GPU, else ``mps``, else ``cpu``;
            ``cuda`` is the GPU with this process's ``LOCAL_RANK`` (0 without; modulo the number of
            GPUs, as some launchers show each process only its own).

    Raises:
        ValueError: If there is no such device on this machine.
    """
    name = device
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"Parameter `device` should be auto or a torch device. Found `device = {device!r}`."
        ) from error
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        if name == "cuda" and count:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count)
        if count == 0 or chosen.index >= count:
            raise ValueError(
                f"Parameter `device` names a GPU, of which torch sees {count}. "
                f"Found `device = {device!r}`."
            )
    elif chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            f"Parameter `device` names an Apple GPU, and torch sees none. "
            f"Found `device = {device!r}`."
        )
    return chosen


class _Shared:
    """A loaded module and where it stands; held by the heads that use it."""

    def __init__(self, module: nn.Module, digest: str, *, reread: bool) -> None:
        self.module = module
        self.digest, self.reread = digest, reread  # see `Weights.digest`
        self.device = torch.device("cpu")
        self.lock = threading.Lock()

    def move(self, device: torch.device) -> None:
        """Move the module; the caller holds the lock."""
        if device == self.device:
            return
        left, self.device = self.device, device
        try:
            self.module.to(device)
        except torch.OutOfMemoryError as error:
            self.module.to("cpu")  # some of it may have been moved
            self.device = torch.device("cpu")
            raise RewardError(
                f"The model does not fit on {device}. Choose a smaller `dtype`, another `device`, "
                f"or offload what else stands there."
            ) from error
        if left.type == "cuda":
            torch.cuda.empty_cache()  # or the memory stays with this process's allocator


_sharing = threading.Lock()
_modules: weakref.WeakValueDictionary[Hashable, _Shared] = weakref.WeakValueDictionary()


def _share(key: Hashable, build: Callable[[], _Shared]) -> _Shared:
    with _sharing:  # two heads that load at once must not load twice
        shared = _modules.get(key)
        if shared is None:
            shared = _modules[key] = build()
        return shared
