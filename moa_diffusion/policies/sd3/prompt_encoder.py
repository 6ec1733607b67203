"""Prompt embeddings: computed once per distinct prompt, after which the encoders leave."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa_diffusion.files.writing import replaced
from moa_diffusion.types import ConfigError
from rewards.progress_bar import progress_bar

logger = logging.getLogger(__name__)

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class PromptEncoder:
    """The text side of a Stable Diffusion 3 pipeline behind a cache.

    If the embeddings of all prompts announced to ``prepare`` fit the memory limit, or a disk cache
    is given, they are computed at once and the encoders are dropped. Otherwise the encoders stay
    in main memory and visit the device for prompts that are not kept: once for all that ``expect``
    is told of. Those least recently used are forgotten first, the expected ones not at all.

    Args:
        pipeline: A ``StableDiffusion3Pipeline``; its encoders are taken over.
        device: Where embeddings are computed and returned.
        max_sequence_length: T5 tokens per prompt.
        source: Names the weights (path and revision) in the keys of the disk cache.
        cache_dir: Folder of the disk cache; None keeps embeddings in memory only.
        memory_gb: Limit of the memory cache, in GB (1e9 bytes).
        batch_size: Prompts encoded at a time.
        turn: This process and how many there are: with a disk cache that they share, they begin at
            different prompts and leave out what another one has written.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        device: torch.device,
        max_sequence_length: int,
        source: str,
        cache_dir: Path | None = None,
        memory_gb: float = 8.0,
        batch_size: int = 8,
        turn: tuple[int, int] = (0, 1),
    ) -> None:
        self._pipeline = pipeline
        self._device = device
        self._length = max_sequence_length
        self._source = source
        self._cache_dir = cache_dir
        self._limit = memory_gb * 1e9
        self._batch_size, self._turn = batch_size, turn
        self._memory: dict[str, tuple[Tensor, Tensor]] = {}  # the last used last
        self._pinned = {""}  # guided batches all need it
        self._bytes = 0
        if cache_dir is not None:
            cache_dir.mkdir(parents=True, exist_ok=True)

    @property
    def encoders_loaded(self) -> bool:
        """Whether prompts that were not prepared can still be encoded."""
        return any(getattr(self._pipeline, name) is not None for name in ENCODERS)

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode these and the empty prompt; drop the encoders if everything could be kept."""
        wanted = list(dict.fromkeys(["", *prompts]))
        missing = self._missing(wanted)
        if not missing:
            self._drop()
            return
        with self._on_device():
            entry = self._encode(missing[:1])[missing[0]]
            size = len(wanted) * sum(tensor.nbytes for tensor in entry)
            if self._cache_dir is None and size > self._limit:
                logger.warning(
                    "The embeddings of %d prompts take %.3g GB, more than "
                    "`policy.embeds_memory_gb` = %.3g. The text encoders stay in main memory and "
                    "are moved to the device for new prompts of every rollout. A folder for "
                    "`policy.embeds_dir` lets them be encoded once.",
                    len(wanted),
                    size / 1e9,
                    self._limit / 1e9,
                )
                return
            starts = range(1, len(wanted), self._batch_size)  # the empty prompt is there
            first = self._turn[0] * len(starts) // self._turn[1]
            for start in progress_bar(
                [*starts[first:], *starts[:first]],
                title="encode prompts",
                shown=len(missing) > 200 and self._turn[0] == 0,
            ):
                self._encode(self._missing(wanted[start : start + self._batch_size]))
            self._drop()  # here, so that nothing is copied back first

    def expect(self, prompts: Sequence[str]) -> None:
        """Encode what is not kept of the prompts that come next, in one visit of the encoders."""
        wanted = list(dict.fromkeys(["", *prompts]))
        if self._cache_dir is None:
            self._pinned = set(wanted)
        if missing := self._missing(wanted):
            with self._on_device():
                self._encode(missing)

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return embeddings ``[n, L, D]`` and pooled ones ``[n, E]`` of prompts, on the device."""
        entries = {prompt: self._load(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, entry in entries.items() if entry is None]
        if missing:
            with self._on_device():
                entries.update(self._encode(missing))
        rows = [entries[prompt] for prompt in prompts]
        embeds = torch.stack([row[0] for row in rows if row is not None])
        pooled = torch.stack([row[1] for row in rows if row is not None])
        return embeds.to(self._device), pooled.to(self._device)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Keep the encoders on the device within the block."""
        self._move(self._device)
        try:
            yield
        finally:
            self._move(torch.device("cpu"))

    def _drop(self) -> None:
        for name in ENCODERS:
            setattr(self._pipeline, name, None)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _move(self, device: torch.device) -> None:
        for name in ENCODERS:
            if (encoder := getattr(self._pipeline, name)) is not None:
                encoder.to(device)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
        if prompts and not self.encoders_loaded:
            raise RuntimeError(
                "The text encoders were released after `prepare`; prompts used later should be "
                f"announced there. Found {prompts[0]!r} and {len(prompts) - 1} more."
            )
        entries = {}
        for start in range(0, len(prompts), self._batch_size):
            batch = prompts[start : start + self._batch_size]
            embeds, _, pooled, _ = self._pipeline.encode_prompt(
                prompt=batch,
                prompt_2=None,
                prompt_3=None,
                device=self._device,
                do_classifier_free_guidance=False,
                max_sequence_length=self._length,
            )
            for prompt, e, p in zip(batch, embeds.cpu(), pooled.cpu(), strict=True):
                entries[prompt] = (e.clone(), p.clone())
                self._store(prompt, *entries[prompt])
        return entries

    def _missing(self, prompts: Sequence[str]) -> list[str]:
        """Return those that are neither in memory nor, by name, on the disk."""
        return [
            prompt
            for prompt in prompts
            if prompt not in self._memory
            and ((path := self._path(prompt)) is None or not path.is_file())
        ]

    def _load(self, prompt: str) -> tuple[Tensor, Tensor] | None:
        if prompt in self._memory:
            self._memory[prompt] = self._memory.pop(prompt)
            return self._memory[prompt]
        path = self._path(prompt)
        if path is None or not path.is_file():
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ConfigError(
                f"policy.embeds_dir: the file {path} is damaged ({error}). Delete it; the prompt "
                "is then encoded again."
            ) from error
        self._remember(prompt, tensors["embeds"], tensors["pooled"])
        return tensors["embeds"], tensors["pooled"]

    def _store(self, prompt: str, embeds: Tensor, pooled: Tensor) -> None:
        self._remember(prompt, embeds, pooled)
        path = self._path(prompt)
        if path is None:
            return
        from safetensors.torch import save_file

        # Under a name of its own first: processes may share the folder.
        with replaced(path) as partial:
            save_file({"embeds": embeds, "pooled": pooled}, partial)

    def _remember(self, prompt: str, embeds: Tensor, pooled: Tensor) -> None:
        size = embeds.nbytes + pooled.nbytes
        while self._bytes + size > self._limit:
            oldest = next((known for known in self._memory if known not in self._pinned), None)
            if oldest is None:
                break
            evicted = self._memory.pop(oldest)
            self._bytes -= evicted[0].nbytes + evicted[1].nbytes
        self._memory[prompt] = (embeds, pooled)
        self._bytes += size

    def _path(self, prompt: str) -> Path | None:
        if self._cache_dir is None:
            return None
        key = f"{self._source}\0{self._length}\0{prompt}"
        return self._cache_dir / f"{blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors"
