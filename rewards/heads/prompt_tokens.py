"""Prompts as a model with a tokenizer reads them: as far as it has room, and blank ones not."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Unpack

from torch import Tensor

from rewards.heads.ocr.target_text import comparable, quoted_target
from rewards.pretrained.base import Dtype, ModelHead, ModelOptions

_log = logging.getLogger(__name__)


class PromptHead(ModelHead):
    """A head whose model reads the prompt, as many tokens of it as it has room for.

    ``remarks`` counts the prompts that are cut. When that removes quoted text, which the image
    ought to show, a warning names the prompt, once. A prompt of nothing but white space asks for
    nothing, and scores NaN.

    A subclass sets ``_tokenizer`` in ``_prepare``, and implements ``_longest``. Where that is no
    tokenizer of transformers, it has its own ``_token_ids`` and ``_part_read`` too.

    Args:
        model: See ``ModelHead``.
        dtype: See ``ModelHead``.
        options: See ``ModelOptions``.
    """

    def __init__(self, *, model: str, dtype: Dtype, **options: Unpack[ModelOptions]) -> None:
        super().__init__(model=model, dtype=dtype, **options)
        self._tokenizer: Any = None
        self._warned: set[str] = set()

    @abstractmethod
    def _longest(self, module: Any) -> int:
        """Return how many tokens of a prompt are read, the special ones included."""

    def _token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of prompts, whole, special ones included."""
        if not prompts:
            return []
        token_ids: list[list[int]] = self._tokenizer(list(prompts), verbose=False).input_ids
        return token_ids

    def _part_read(self, prompt: str, longest: int) -> str:
        """Return as much of a prompt as its first ``longest`` tokens hold."""
        # Characters of the prompt: the tokens may hold less of it, such as letters without accents.
        places = self._tokenizer(
            prompt, truncation=True, max_length=longest, return_offsets_mapping=True
        ).offset_mapping
        return prompt[: max(end for _, end in places)]

    def remarks(self, prompts: Sequence[str]) -> list[str]:
        """Say how many prompts are cut, and how many say nothing.

        Raises:
            RewardError: If the model cannot be loaded.
        """
        longest = self._longest(self._loaded().module)
        lengths = [len(ids) for ids in self._token_ids(prompts)]
        cut = [i for i, length in enumerate(lengths) if length > longest]
        blank = [prompt for prompt in prompts if not self._applies(prompt)]
        remarks = []
        if cut:
            remarks.append(
                f"{len(cut)} of {len(prompts)} prompts have more than the {longest} tokens that "
                f"the model reads, up to {max(lengths)}: what follows does not count. The first is "
                f"{prompts[cut[0]]!r}."
            )
        if blank:
            remarks.append(f"{len(blank)} of {len(prompts)} prompts are blank: they score NaN.")
        return remarks

    def _applies(self, prompt: str) -> bool:
        return bool(prompt.strip())

    def _read(self, module: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``attention_mask`` of prompts, ``[n, longest]``, on the device.

        They are padded on the right, where the mask is 0.
        """
        longest = self._longest(module)
        self._warn_of_cuts(prompts, longest)
        tokens = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        return {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def _warn_of_cuts(self, prompts: Sequence[str], longest: int) -> None:
        for prompt in dict.fromkeys(prompts):
            target = quoted_target(prompt, "any")
            if target is None or prompt in self._warned:
                continue
            (ids,) = self._token_ids([prompt])
            if len(ids) <= longest:
                continue
            if comparable(target) not in comparable(self._part_read(prompt, longest)):
                self._warned.add(prompt)
                _log.warning(
                    'Reward head "%s" reads %d tokens and cuts the quoted text %r off the prompt '
                    "%r. Shorten the prompt, or quote earlier.",
                    self._label,
                    longest,
                    target,
                    prompt,
                )
