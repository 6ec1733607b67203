"""Prompts and responses as token ids, with or without the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from moa_diffusion.files.text import shortened
from moa_diffusion.types import ConfigError


class Dialogue:
    """Tokenises prompts and responses apart from each other, and never cuts one short.

    Padding is done here, not by the tokenizer: it needs no padding token, and on which side it
    would pad does not matter. What is padding is said by lengths and masks, never by token ids,
    so that the end of the text may serve as the filler.

    Args:
        tokenizer: The tokenizer of transformers.
        chat: Whether a prompt is a user's turn in the tokenizer's chat template, followed by the
            opening of the assistant's. By default, if there is a template.
        max_prompt_tokens: Limit of a prompt with its template.
        max_new_tokens: Limit of a response with its end.
        stops: Further token ids that end a response.

    Raises:
        ConfigError: If the tokenizer lacks an end-of-text token, or a template that is asked for.

    Attributes:
        end: Id of the token that ends a text.
        stops: Ids of all tokens that end a response, sorted.
        filler: Id of the token at places that do not exist.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat: bool | None,
        max_prompt_tokens: int,
        max_new_tokens: int,
        stops: Collection[int] = (),
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "policy.path: the tokenizer should have an end-of-text token, or no response ever "
                "ends. Name one as `eos_token` in tokenizer_config.json."
            )
        if chat and tokenizer.chat_template is None:
            raise ConfigError(
                "generation.chat: should be false or null, as the tokenizer has no chat template. "
                "Found true."
            )
        self.tokenizer = tokenizer
        self.chat = tokenizer.chat_template is not None if chat is None else chat
        self.max_prompt_tokens, self.max_new_tokens = max_prompt_tokens, max_new_tokens
        self.end: int = tokenizer.eos_token_id
        self.stops = sorted({self.end, *stops})
        pad: int | None = tokenizer.pad_token_id
        self.filler = self.end if pad is None else pad
        self._prompts: dict[str, list[int]] = {}

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of a prompt, at least one.

        Raises:
            ConfigError: If it is too long, or nothing at all.
        """
        if text not in self._prompts:
            self._prompts[text] = self._encode(text)
        return self._prompts[text]

    def _encode(self, text: str) -> list[int]:
        if self.chat:
            rendered = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            ids: list[int] = self.tokenizer(rendered, add_special_tokens=False).input_ids
        else:
            ids = self.tokenizer(text).input_ids
            if ids and ids[-1] == self.end:
                ids = ids[:-1]  # some tokenizers end every text, and the response is to follow
            if not ids and self.tokenizer.bos_token_id is not None:
                ids = [self.tokenizer.bos_token_id]
        if not ids:
            raise ConfigError(f"prompts: the prompt {shortened(text)} has no token to start from.")
        if len(ids) > self.max_prompt_tokens:
            raise ConfigError(
                f"generation.max_prompt_tokens: every prompt should have at most "
                f"{self.max_prompt_tokens} tokens (the limit, or what the model's context leaves "
                f"beside generation.max_new_tokens). Found {len(ids)} in {shortened(text)}. "
                "Shorten it, take it out, or change these numbers."
            )
        return ids

    def response(self, text: str) -> list[int]:
        """Return the token ids of a response, tokenised by itself, and its end.

        Raises:
            ValueError: If it is too long, or a token inside it would have ended it.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        if inside := [i for i in ids if i in self.stops]:
            raise ValueError(
                f"A response should not spell {self.tokenizer.decode(inside[:1])!r}, which ends "
                f"it. Found it in {shortened(text)}."
            )
        ids = [*ids, self.end]
        if len(ids) > self.max_new_tokens:
            raise ValueError(
                f"A response should have at most {self.max_new_tokens} tokens with its end "
                f"(`max_new_tokens`). Found {len(ids)} in {shortened(text)}."
            )
        return ids

    def texts(self, prompts: Sequence[str], ids: Tensor, mask: Tensor) -> tuple[str, ...]:
        """Return the responses without special tokens.

        Args:
            prompts: The n prompts after which they stand: some tokenizers write a space in front of
                a word only where something is before it.
            ids: Token ids ``[n, T]`` of the responses.
            mask: Which tokens belong to the response, ``[n, T]`` bool.
        """
        rows = [row[known].tolist() for row, known in zip(ids.cpu(), mask.cpu(), strict=True)]
        decoded = []
        for prompt, row in zip(prompts, rows, strict=True):
            written = row[:-1] if row[-1] in self.stops else row  # a stop need not be special
            before = [] if self.chat else self.prompt(prompt)[-1:]
            decoded.append(self._decode([*before, *written])[len(self._decode(before)) :])
        return tuple(decoded)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def pad(
        self, rows: Sequence[Sequence[int]], width: int, *, left: bool
    ) -> tuple[Tensor, Tensor]:
        """Return ids ``[n, width]`` int64 and their mask (bool), with the filler on one side.

        Args:
            rows: The n sequences of ids, none longer than ``width``.
            width: Tokens in each row of the result.
            left: Whether the filler goes before the ids, as prompts have it, or behind them.
        """
        ids = torch.full((len(rows), width), self.filler)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(len(row))
            ids[i, place], mask[i, place] = torch.tensor(row), True
        return ids, mask
