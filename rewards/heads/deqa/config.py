"""Sizes and constants of DeQA-Score, as the ``config.json`` beside the weights gives them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.base import RewardError

# "USER: How would you rate the quality of this image?\n" and, after the image,
# "\nASSISTANT: The quality of the image is", as LLaMA-2's tokenizer splits them.
_BEFORE = (1, 3148, 1001, 29901, 1128, 723, 366, 6554, 278, 11029, 310, 445, 1967, 29973, 13)
_AFTER = (29871, 13, 22933, 9047, 13566, 29901, 450, 11029, 310, 278, 1967, 338)
_LEVELS = (15129, 1781, 6534, 6460, 4319)  # excellent, good, fair, poor, bad

# What the architecture leaves open and this implementation does not.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSizes:
    """The vision transformer; names as in ``visual_config.visual_model``."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int  # pixels
    patch_size: int  # pixels
    layer_norm_eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AbstractorSizes:
    """The visual abstractor; names as in ``visual_config.visual_abstractor``."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_learnable_queries: int
    layer_norm_eps: float  # the one inside the MLP; the others have 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class DeqaConfig:
    """Everything that tells one DeQA model from another, except the weights.

    Raises:
        ValueError: If sizes contradict each other or ids lie outside the vocabulary.
    """

    vision: VisionSizes
    abstractor: AbstractorSizes
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float = 10000.0
    before: tuple[int, ...] = _BEFORE  # token ids of the prompt before the image
    after: tuple[int, ...] = _AFTER  # and after it
    level_ids: tuple[int, ...] = _LEVELS  # the five levels, best first

    def __post_init__(self) -> None:
        parts: dict[str, VisionSizes | AbstractorSizes | DeqaConfig] = {
            "vision model": self.vision,
            "abstractor": self.abstractor,
            "language model": self,
        }
        for part, sizes in parts.items():
            if sizes.hidden_size % sizes.num_attention_heads:
                raise ValueError(
                    f"`hidden_size` of the {part} should be a multiple of `num_attention_heads`. "
                    f"Found {sizes.hidden_size} and {sizes.num_attention_heads}."
                )
        if self.vision.image_size % self.vision.patch_size:
            raise ValueError(
                f"`image_size` should be a multiple of `patch_size`. "
                f"Found {self.vision.image_size} and {self.vision.patch_size}."
            )
        if self.abstractor.hidden_size != self.vision.hidden_size:
            # Queries and image tokens go through the same key and value projections.
            raise ValueError(
                f"`hidden_size` of the abstractor should be that of the vision model "
                f"({self.vision.hidden_size}). Found {self.abstractor.hidden_size}."
            )
        if self.abstractor.hidden_size % 4:
            raise ValueError(
                f"`hidden_size` of the abstractor should be a multiple of 4 (sine and cosine of "
                f"two coordinates). Found {self.abstractor.hidden_size}."
            )
        if (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"`hidden_size / num_attention_heads` should be even (rotary positions). "
                f"Found {self.hidden_size // self.num_attention_heads}."
            )
        if len(self.level_ids) != 5 or not self.after:
            raise ValueError(
                f"There should be five levels and a prompt after the image. "
                f"Found {len(self.level_ids)} `level_ids` and {len(self.after)} ids."
            )
        wrong = [i for i in self.before + self.after + self.level_ids if i >= self.vocab_size]
        if wrong:
            raise ValueError(
                f"Token ids should be below `vocab_size = {self.vocab_size}`. Found {wrong}."
            )

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.vision.image_size // self.vision.patch_size

    @property
    def image_tokens(self) -> slice:
        """Positions of the visual tokens in the sequence: the queries and an end token."""
        start = len(self.before)
        return slice(start, start + self.abstractor.num_learnable_queries + 1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeqaConfig:
        """Read the content of a ``config.json``.

        Args:
            values: As published; beside that, ``prompt_ids`` (two lists: before and after the
                image) and ``level_ids`` (best first) may replace the ids of LLaMA-2's vocabulary.

        Raises:
            ValueError: If an entry is missing, has a wrong type or asks for something that this
                implementation does not do.
        """
        for key, expected in _FIXED.items():
            _expect(values, key, expected)
        _expect(values, "num_key_value_heads", values.get("num_attention_heads"))
        visual = _mapping(values, "visual_config")
        vision = _mapping(visual, "visual_model")
        abstractor = _mapping(visual, "visual_abstractor")
        _expect(vision, "hidden_act", "quick_gelu")
        prompt = _ids(values.get("prompt_ids", (_BEFORE, _AFTER)))
        if len(prompt) != 2:
            raise ValueError(
                f"`prompt_ids` should be two lists: the ids before the image and those after it. "
                f"Found {len(prompt)}."
            )
        config = cls(
            vision=VisionSizes(**_numbers(VisionSizes, vision)),
            abstractor=AbstractorSizes(**_numbers(AbstractorSizes, abstractor)),
            before=prompt[0],
            after=prompt[1],
            level_ids=_ids([values.get("level_ids", _LEVELS)])[0],
            **_numbers(cls, values),
        )
        _expect(abstractor, "grid_size", config.grid)
        _expect(abstractor, "encoder_hidden_size", config.vision.hidden_size)
        return config


def read_config(path: Path) -> DeqaConfig:
    """Read a ``config.json``.

    Raises:
        RewardError: If the file is missing, is no JSON or describes no DeQA model.
    """
    try:
        return DeqaConfig.from_dict(_mapping({path.name: json.loads(path.read_text())}, path.name))
    except (OSError, ValueError) as error:
        raise RewardError(f"`{path}` describes no DeQA model: {error}") from error


def _expect(values: Mapping[str, Any], key: str, expected: Any) -> None:
    # What is missing or null has this value in the published code, at the published sizes.
    if values.get(key) not in (None, expected):
        raise ValueError(f"`{key}` should be {expected!r}. Found {values[key]!r}.")


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    mapping = values.get(key)
    if not isinstance(mapping, Mapping):
        raise ValueError(f"`{key}` should be a mapping. Found {mapping!r}.")
    return mapping


def _ids(lists: Any) -> list[tuple[int, ...]]:
    whole = isinstance(lists, Sequence) and all(
        isinstance(ids, Sequence) and all(type(i) is int and i >= 0 for i in ids) for ids in lists
    )
    if not whole:
        raise ValueError(f"Token ids should be lists of integers from 0 on. Found {lists!r}.")
    return [tuple(ids) for ids in lists]


def _numbers(record: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        if field.type not in ("int", "float"):  # annotations are strings here
            continue
        value: Any = values.get(field.name)
        if value is None and field.default is not dataclasses.MISSING:
            value = field.default
        kinds = (int,) if field.type == "int" else (int, float)
        if type(value) not in kinds or not value > 0:
            raise ValueError(f"`{field.name}` should be a positive {field.type}. Found {value!r}.")
        numbers[field.name] = value
    return numbers
