"""Texts as a transformer reads them: tokenizers, loaded without running code, and padding."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rewards.base import RewardError
from rewards.pretrained.locate import Weights, find_weights

Side = Literal["left", "right"]
Row = Mapping[str, list[int]]  # name of an input -> a number per token

# Any of these will do; slow tokenizers are converted.
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
TOKENIZER_FILES = (
    *_VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",  # says which class an old tokenizer is of
)
# Which of these there are depends on the version of transformers that saved the model.
PROCESSOR_FILES = (
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_READS_LAST_PLACE = ("xlnet",)  # whether or not there is padding in it
_SHOWN = 60  # characters of a text in an error


def find_tokenizer(model: str, *, revision: str | None = None) -> Weights:
    """Find the files of a tokenizer alone; fetches those of a hub model that are not in the cache.

    Args:
        model: Named as a model is, see ``rewards.pretrained.locate``.
        revision: Branch, tag or commit of a hub model; ``main`` by default.

    Raises:
        RewardError: If there is none, or it cannot be fetched; says what to do.
        ValueError: As ``check_name``.
    """
    return find_weights(
        model,
        revision=revision,
        required=(),
        optional=TOKENIZER_FILES,
        one_of=_VOCABULARIES,
        tensors=False,
    )


def load_tokenizer(files: Weights) -> Any:
    """Return the tokenizer of a model, a ``PreTrainedTokenizerBase``.

    Args:
        files: Its files, located with ``optional=TOKENIZER_FILES``.

    Raises:
        RewardError: If there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    # Without a vocabulary transformers would make an empty one.
    if not any(files.has(name) for name in _VOCABULARIES):
        raise RewardError(
            f"The model `{files.model}` has no tokenizer in {files.folder}: one of "
            f"{', '.join(_VOCABULARIES)}. Put the one there that the model was trained with."
        )
    try:
        return AutoTokenizer.from_pretrained(
            files.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the libraries below have no common base class
        raise RewardError(
            f"The tokenizer in {files.folder} cannot be loaded ({type(error).__name__}: {error}). "
            f"Fetch the model anew, or save its tokenizer as `tokenizer.json`."
        ) from error


def load_processor(kind: Any, files: Weights) -> Any:
    """Return the processor of a vision-language model, whose chat template works.

    Args:
        kind: Its class, or ``AutoProcessor``.
        files: Its files, located with ``optional=PROCESSOR_FILES``.

    Raises:
        RewardError: If something is missing or damaged.
    """
    from transformers import ProcessorMixin

    try:
        processor = kind.from_pretrained(
            files.folder, local_files_only=True, trust_remote_code=False
        )
        # Without a class for the whole, transformers gives the tokenizer alone.
        if not isinstance(processor, ProcessorMixin):
            raise ValueError(f"found {type(processor).__name__} in the place of a processor")
        chat_text(processor, "")
    except (OSError, ValueError) as error:
        raise RewardError(
            f"The tokenizer, image processor or chat template in {files.folder} is missing "
            f"or damaged ({type(error).__name__}: {error}). Fetch the model anew."
        ) from error
    return processor


def chat_text(processor: Any, question: str, **options: Any) -> str:
    """Return what a model reads that is shown an image, asked a question, and is to answer.

    Args:
        processor: The model's processor.
        question: The text behind the image.
        options: Variables of the chat template.
    """
    content = [{"type": "image"}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}]
    text: str = processor.apply_chat_template(turns, add_generation_prompt=True, **options)
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """How texts become tensors for one model."""

    model: str  # its name, for messages
    tokenizer: Any
    inputs: tuple[str, ...]  # names of the tensors that the model takes
    start: int | None  # token that stands for a text without any
    pad: int | None  # token to pad with; None: nothing is padded
    known: int  # tokens that the model has embeddings of
    longest: float  # tokens that are read

    def read(self, *segments: str) -> tuple[Row, int]:
        """Return what the model is given of a text, or of two segments.

        Returns:
            The row without padding, and how many tokens there were before it was cut.

        Raises:
            RewardError: If there is no token to read, or one that the model does not know.
        """
        encoded = self.tokenizer(*segments, verbose=False)
        length = len(encoded["input_ids"])
        if length > self.longest:
            encoded = self.tokenizer(*segments, truncation=True, max_length=int(self.longest))
        row = {name: list(encoded[name]) for name in self.inputs if name in encoded}
        if not row["input_ids"]:
            if self.start is None:
                raise RewardError(
                    f"The tokenizer of `{self.model}` makes no token of {segments}, and has none "
                    f"for the beginning of a text. Have the prompt read before the text."
                )
            row = {name: [int(name == "attention_mask")] for name in row}
            row["input_ids"] = [self.start]
        if max(row["input_ids"]) >= self.known:
            raise RewardError(
                f"The tokenizer of `{self.model}` makes the token {max(row['input_ids'])} of "
                f"{segments[-1][:_SHOWN]!r}, and the model knows {self.known} tokens. Put the "
                f"tokenizer there that the model was trained with."
            )
        return row, length

    def groups(self, rows: Sequence[Row]) -> Iterable[list[int]]:
        """Return the indices of the rows that may stand in one tensor: of one length, or all."""
        groups: dict[int, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            groups[len(row["input_ids"]) if self.pad is None else 0].append(index)
        return groups.values()

    def stack(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return the rows as tensors ``[n, tokens]``, padded on the right; the mask is 0 there."""
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": 0 if self.pad is None else self.pad}
        return {
            name: torch.tensor(
                [row[name] + [fill.get(name, 0)] * (width - len(row[name])) for row in rows]
            )
            for name in rows[0]
        }


def reader_of(model: Any, files: Weights, *, longest: int | None, truncation_side: Side) -> Reader:
    """Return how a model of transformers reads texts.

    Args:
        model: The model; its weights are not looked at, so it may stand on the meta device.
        files: Its files, among them those of its tokenizer.
        longest: Tokens that are read; by default as many as model and tokenizer allow.
        truncation_side: Which end of a longer text is cut off.

    Raises:
        RewardError: If there is no tokenizer, the model has not so many positions, or the token
            that it takes for padding is none of its own.
    """
    tokenizer = load_tokenizer(files)
    tokenizer.truncation_side = truncation_side
    positions = _positions(model)
    if longest is not None and longest > positions:
        raise RewardError(
            f"The model `{files.model}` reads at most {positions} tokens. "
            f"Found `max_length = {longest}`."
        )
    known = len(model.get_input_embeddings().weight)
    start = tokenizer.bos_token_id
    return Reader(
        model=files.model,
        tokenizer=tokenizer,
        inputs=accepted(model, _INPUTS),
        start=tokenizer.eos_token_id if start is None else start,
        pad=_padding(model.config.get_text_config(), known),
        known=known,
        longest=min(positions, tokenizer.model_max_length) if longest is None else longest,
    )


def accepted(module: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Return those of the names that the module's ``forward`` has parameters of."""
    parameters = inspect.signature(module.forward).parameters
    return tuple(name for name in names if name in parameters)


def _padding(config: Any, known: int) -> int | None:
    pad: int | None = config.pad_token_id
    if pad is None or pad < 0 or config.model_type in _READS_LAST_PLACE:
        return None
    if pad >= known:
        raise RewardError(
            f"The token for padding, `pad_token_id` = {pad} in `config.json`, should be one of the "
            f"{known} that the model knows. If it was added without resizing the embeddings, set "
            f"it to null."
        )
    return pad


def _positions(model: Any) -> float:
    """Return how many tokens the model has positions for; infinite if nothing says so."""
    facts = model.config.get_text_config().to_dict()
    named = [facts.get(key) for key in ("max_position_embeddings", "n_positions")]
    tables = [
        # Those of RoBERTa begin after the one of padding.
        part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
        for name, part in model.named_modules()
        if isinstance(part, nn.Embedding) and name.endswith("position_embeddings")
    ]
    return min((count for count in [*named, *tables] if count), default=math.inf)
