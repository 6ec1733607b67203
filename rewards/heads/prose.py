"""Rewards of texts that need no model: length, keywords, repetition, format."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardError, RewardHead
from rewards.pretrained.locate import check_name
from rewards.pretrained.tokens import find_tokenizer, load_tokenizer
from rewards.registry import register

LengthUnit = Literal["words", "characters", "tokens"]
Direction = Literal["longer", "shorter"]
NgramUnit = Literal["words", "characters"]
Match = Literal["full", "search"]


@register("length")
class Length(RewardHead):
    """How long the text is, within bounds: clip(l / scale, low, high); the prompt is not counted.

    Higher is better: longer, or with ``direction: shorter`` its negative, so that brevity is an
    objective of its own and no negative weight is needed. The length reward of PAMA (He and Maher
    2025, https://arxiv.org/abs/2508.07768), with the numbers of its experiment on film reviews.

    Deviations: what the authors count is not known to us; the default are words.

    Args:
        scale: Length that scores 1; positive.
        low: Least score before the sign, at least 0: shorter texts score the same.
        high: Largest score before the sign, any number above ``low``: longer texts score the same.
            Null sets no bound.
        unit: What is counted: ``words`` (between white space; a text without any, as in Chinese or
            Thai, is one word), ``characters`` (code points in normal form C, runs of white space as
            one), or ``tokens`` of a ``tokenizer``, without special ones.
        tokenizer: Folder, ``package://NAME/PATH`` or hub model with a tokenizer; for ``unit:
            tokens``.
        revision: Branch, tag or commit of a hub model.
        direction: What scores higher: ``longer`` or ``shorter`` texts.

    Raises:
        ValueError: If a parameter is out of range, or ``tokenizer`` is given without need, or not
            given where needed.
    """

    unit = "length / scale"
    scores = "texts"

    def __init__(
        self,
        scale: float = 140.0,
        low: float = 0.5,
        high: float | None = 1.5,
        unit: LengthUnit = "words",
        tokenizer: str | None = None,
        revision: str | None = None,
        direction: Direction = "longer",
    ) -> None:
        _check_choice("unit", unit, get_args(LengthUnit))
        _check_choice("direction", direction, get_args(Direction))
        if not 0.0 < scale < float("inf"):
            raise ValueError(f"Parameter `scale` should be positive. Found `scale = {scale}`.")
        if not 0.0 <= low < (float("inf") if high is None else high):
            raise ValueError(
                f"Parameters `low` and `high` should be 0 <= low < high. "
                f"Found `low = {low}`, `high = {high}`."
            )
        if (unit == "tokens") != (tokenizer is not None):
            raise ValueError(
                f"Parameter `tokenizer` should be given with `unit: tokens`, and only then. "
                f"Found `tokenizer = {tokenizer!r}` with `unit = {unit!r}`."
            )
        if tokenizer is not None:
            check_name(tokenizer, revision=revision, option="tokenizer")
        elif revision is not None:
            raise ValueError(
                f"Parameter `revision` is that of a tokenizer. Found `revision = {revision!r}`."
            )
        self.scale = scale
        self.low = low
        self.high = high
        self.counted = unit
        self.tokenizer = tokenizer
        self.revision = revision
        self.sign = 1.0 if direction == "longer" else -1.0
        self.unit = f"{'-' if direction == 'shorter' else ''}{unit} / {scale:g}"
        self._loaded: Any = None
        self._provenance: dict[str, str] = {}

    def score(self, batch: RewardBatch) -> Tensor:
        """Return the clipped lengths, ``[N]``.

        Raises:
            RewardError: If the tokenizer cannot be loaded.
        """
        lengths = torch.tensor([float(self._length(text)) for text in batch.require_texts()])
        return self.sign * (lengths / self.scale).clamp(self.low, self.high)

    def load(self) -> None:
        """Load the tokenizer, if tokens are counted.

        Raises:
            RewardError: If it is missing or damaged.
        """
        if self.tokenizer is None or self._loaded is not None:
            return
        try:
            files = find_tokenizer(self.tokenizer, revision=self.revision)
            self._loaded = load_tokenizer(files)
        except RewardError as error:
            raise RewardError(error.cause, head=self._label) from error
        self._provenance = {"tokenizer": files.model, **files.origin("tokenizer_")}

    def provenance(self) -> Mapping[str, str]:
        """Return what the tokenizer is, once it is loaded."""
        return self._provenance

    def close(self) -> None:
        """Let go of the tokenizer; the next batch loads it again."""
        self._loaded = None

    def _length(self, text: str) -> int:
        if self.counted == "words":
            return len(text.split())
        if self.counted == "characters":
            return len(_spaced(unicodedata.normalize("NFC", text)))
        self.load()
        return len(self._loaded(text, add_special_tokens=False, verbose=False)["input_ids"])


@register("keyword")
class Keyword(RewardHead):
    """Which part of given words and phrases the text has: 0 none of them, 1 all of them.

    Higher is better. With ``cap`` it is not which there are but how often: the occurrences of any,
    up to the cap, divided by it; where two overlap, the one that begins first counts, of those the
    longest. Both are compared in the Unicode normal form NFKC, any white space as one space.

    Args:
        words: List of words or phrases, each once.
        cap: Number of occurrences that score 1, at least 1; null scores the share of words that
            occur.
        ignore_case: Whether case is folded, by the full rules of Unicode: STRASSE is Straße.
        whole_words: Whether a word counts only where no letter, digit, mark or underscore stands
            directly before or after it. Turn it off for languages without spaces.

    Raises:
        ValueError: If there is no word, one is empty or stands there twice, or ``cap`` is not
            positive.
    """

    unit = "share of words"
    scores = "texts"

    def __init__(
        self,
        words: Sequence[str],
        cap: int | None = None,
        ignore_case: bool = True,
        whole_words: bool = True,
    ) -> None:
        import regex  # whose \w knows the marks of Indian scripts, as `re` does not

        if isinstance(words, str) or not words:
            raise ValueError(
                f"Parameter `words` should be a list of words, not empty. "
                f"Found `words = {words!r}`."
            )
        if cap is not None and cap < 1:
            raise ValueError(f"Parameter `cap` should be at least 1. Found `cap = {cap}`.")
        self.ignore_case = ignore_case
        folded = [self._folded(word) for word in words]
        for index, word in enumerate(folded):
            if not word or word in folded[:index]:
                raise ValueError(
                    f"Parameter `words` should hold words, each once. Found {words[index]!r} "
                    f"{'twice, as they are compared' if word else 'at place'} {index}."
                )
        self.cap = cap
        self.unit = "share of words" if cap is None else f"occurrences / {cap}"
        before, after = (r"(?<!\w)", r"(?!\w)") if whole_words else ("", "")
        # At one place the first alternative wins.
        choices = [folded] if cap is not None else [[word] for word in folded]
        self._patterns = [
            regex.compile(
                before
                + f"(?:{'|'.join(map(regex.escape, sorted(choice, key=len, reverse=True)))})"
                + after
            )
            for choice in choices
        ]

    def score(self, batch: RewardBatch) -> Tensor:
        """Return shares, ``[N]`` in [0, 1]."""
        return torch.tensor([self._score(self._folded(text)) for text in batch.require_texts()])

    def _score(self, text: str) -> float:
        if self.cap is None:
            matched = sum(pattern.search(text) is not None for pattern in self._patterns)
            return matched / len(self._patterns)
        (pattern,) = self._patterns
        return min(self.cap, sum(1 for _ in pattern.finditer(text))) / self.cap

    def _folded(self, text: str) -> str:
        text = unicodedata.normalize("NFKC", text)
        if self.ignore_case:  # folding can leave the normal form
            text = unicodedata.normalize("NFKC", text.casefold())
        return _spaced(text)


@register("repetition")
class Repetition(RewardHead):
    """How much of the text is said again: minus the share of n-grams that occurred before.

    Higher is better, from -1 to 0: with t n-grams, d of them distinct, it is d / t - 1. Texts of
    at most n words score 0. Minus the measure seq-rep-n of Welleck et al. 2019, "Neural text
    generation with unlikelihood training" (https://arxiv.org/abs/1908.04319, section 6).

    Deviations: words, not tokens, without case and punctuation, so that "the end, the end" counts.

    Args:
        n: Length of the n-grams, at least 1; 4 in the paper.
        unit: What the n-grams are made of: ``words``, or ``characters``, for languages without
            spaces.

    Raises:
        ValueError: If ``n`` is not positive, or ``unit`` is unknown.
    """

    unit = "-share of repeated n-grams"
    scores = "texts"

    def __init__(self, n: int = 4, unit: NgramUnit = "words") -> None:
        import regex  # see `Keyword`

        _check_choice("unit", unit, get_args(NgramUnit))
        if n < 1:
            raise ValueError(f"Parameter `n` should be at least 1. Found `n = {n}`.")
        self.n = n
        self.unit = f"-share of repeated {n}-grams of {unit}"
        self._parts = regex.compile(r"\w+" if unit == "words" else r"\S")

    def score(self, batch: RewardBatch) -> Tensor:
        """Return minus the shares, ``[N]`` in (-1, 0]."""
        return torch.tensor([self._score(text) for text in batch.require_texts()])

    def _score(self, text: str) -> float:
        parts = self._parts.findall(unicodedata.normalize("NFC", text).casefold())
        grams = [tuple(parts[i : i + self.n]) for i in range(len(parts) - self.n + 1)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0


@register("format")
class Format(RewardHead):
    """Whether the text has a form: 1 where a regular expression matches it, else 0.

    Higher is better. The syntax is that of the package regex, which is that of Python's ``re`` and
    more: flags stand in the pattern, ``(?is)...``. White space around a text is part of it; where
        it
    should not matter, let the pattern begin and end with ``\\s*``.

    Some patterns, such as ``(a|aa)+b``, take time that grows exponentially with the text where they
    do not match. A text on which the pattern takes longer than ``timeout`` is an error, never a
    score; write such patterns with atomic groups, ``(?>a|aa)+b``, or possessive quantifiers,
    ``a++``.

    Args:
        pattern: The regular expression.
        match: What the pattern describes: the whole text (``full``) or some part of it
            (``search``).
        timeout: Number of seconds that one text may take; positive.

    Raises:
        ValueError: If the pattern is malformed, or another parameter is wrong.
    """

    unit = "1 = has the form"
    scores = "texts"
    neutral_options = ("timeout",)

    def __init__(self, pattern: str, match: Match = "full", timeout: float = 1.0) -> None:
        import regex  # `re` has no timeout

        _check_choice("match", match, get_args(Match))
        if not 0.0 < timeout < float("inf"):
            raise ValueError(
                f"Parameter `timeout` should be positive. Found `timeout = {timeout}`."
            )
        try:
            compiled = regex.compile(pattern)
        except regex.error as error:
            raise ValueError(
                f"Parameter `pattern` should be a regular expression: {error.msg} at position "
                f"{error.pos}. Found `pattern = {pattern!r}`."
            ) from error
        self.timeout = timeout
        self._matches = compiled.fullmatch if match == "full" else compiled.search

    def score(self, batch: RewardBatch) -> Tensor:
        """Return 1 or 0, ``[N]``.

        Raises:
            RewardError: If the pattern takes too long on a text; names the sample.
        """
        matched = []
        for index, text in enumerate(batch.require_texts()):
            try:
                matched.append(self._matches(text, timeout=self.timeout) is not None)
            except TimeoutError as error:
                raise RewardError(
                    f"The pattern takes longer than {self.timeout:g} s on a text of {len(text)} "
                    f"characters. Write it with possessive quantifiers or atomic groups, or raise "
                    f"`timeout`.",
                    samples=batch.samples([index]),
                ) from error
        return torch.tensor(matched, dtype=torch.float32)


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(
            f"Parameter `{name}` should be one of {', '.join(known)}. Found `{name} = {value!r}`."
        )


def _spaced(text: str) -> str:
    """Return the text with single spaces in the place of white space, and none around it."""
    return " ".join(text.split())
