"""What a text classifier, or a reward model, of transformers says of a text."""

from __future__ import annotations

import logging
import string
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor, nn

from rewards.base import RewardError
from rewards.pretrained.base import Dtype, ModelHead, ModelOptions
from rewards.pretrained.locate import Weights
from rewards.pretrained.tensors import load_pretrained
from rewards.pretrained.tokens import TOKENIZER_FILES, Reader, Side, accepted, reader_of
from rewards.registry import register
from rewards.suggestions import did_you_mean

Output = Literal["logit", "probability"]

_TEMPLATE = "{prompt}{text}"
# Constants that old files hold among the weights.
_OLD_BUFFERS = ("position_ids", ".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
_SHOWN = 60  # characters of a text in a warning

_log = logging.getLogger(__name__)


@register("classifier")
class Classifier(ModelHead):
    """One output of a text classifier or reward model of transformers, for prompt and text.

    Higher is better. Any model that ``AutoModelForSequenceClassification`` loads will do, so the
    scale is the model's own: a logit, or with ``output: probability`` 0 to 1. Two that papers use:

        sentiment:  # a review that goes on from the prompt; as in TRL and PAMA
          {head: classifier, model: lvwerra/distilbert-imdb, logit: POSITIVE}
        harmless:  # answers to questions; its model card gives both as two segments
          {head: classifier, model: Ray2333/gpt2-large-harmless-reward_model, pair: true}

    A text is read as transformers reads it alone: padding stands on the right, is masked, and has
    the token that the model's ``config.json`` calls padding, whatever the tokenizer says. Where the
    config names none, texts of one length are scored together without any, and the score is read
    at the last token, as transformers does for a single text. So scores do not depend on
    ``batch_size`` beyond rounding.

    Where a prompt is so long that nothing of the text is read, all texts score the same;
    ``remarks`` counts such prompts.

    A text without any token, which only a template without the prompt allows, is read as the
    tokenizer's token for the beginning of a text, else for its end.

    The published weights named here were not at hand: that scores equal those of transformers was
    tested on small models of the same classes with random weights. No code that comes with a model
    is run, so one with classes of its own is refused.

    Args:
        model: Folder with ``config.json``, weights and tokenizer, ``package://NAME/PATH``, or hub
            model.
        logit: Which output is the score: its index, at least 0, or its label in ``config.json``.
            May be left out where there is one only.
        output: What is read: the ``logit``, or the ``probability``: the softmax over all labels;
            the sigmoid where there is one, or where the config says that several may apply
            (``multi_label_classification``).
        template: What the model reads, with the places ``{prompt}`` and ``{text}``; ``{text}``
            alone leaves the prompt out, and doubled braces stand for braces. ``{prompt}{text}`` by
            default. Special tokens may be written out, ``<|user|>{prompt}<|assistant|>{text}``;
            those that a policy writes into its text are then understood as such too.
        pair: Whether prompt and text are given as two segments instead, with what the tokenizer
            puts between them.
        max_length: Number of tokens that are read, special ones included, at least 1; by default
            as many as model and tokenizer allow. What is longer is cut, and a warning says so once.
        truncation_side: Which end is cut off: ``right`` or ``left``; of a pair, from the longer.
        dtype: Precision: ``float32``, ``bfloat16`` or ``float16``.
        options: See ``ModelOptions``.

    Raises:
        ValueError: If a parameter is wrong.
    """

    unit = "logit, or probability"
    scores = "texts"
    optional = TOKENIZER_FILES

    def __init__(
        self,
        model: str,
        logit: int | str | None = None,
        output: Output = "logit",
        template: str | None = None,
        pair: bool = False,
        max_length: int | None = None,
        truncation_side: Side = "right",
        dtype: Dtype = "float32",
        **options: Unpack[ModelOptions],
    ) -> None:
        for name, value, known in (
            ("output", output, get_args(Output)),
            ("truncation_side", truncation_side, get_args(Side)),
        ):
            if value not in known:
                raise ValueError(
                    f"Parameter `{name}` should be one of {', '.join(known)}. "
                    f"Found `{name} = {value!r}`."
                )
        if pair and template is not None:
            raise ValueError(
                f"Parameter `template` should be left out with `pair`, which gives prompt and text "
                f"as they are. Found `template = {template!r}`."
            )
        if max_length is not None and max_length < 1:
            raise ValueError(
                f"Parameter `max_length` should be at least 1. Found `max_length = {max_length}`."
            )
        super().__init__(model=model, dtype=dtype, **options)
        self.logit = logit
        self.output = output
        self.template = _TEMPLATE if template is None else check_template(template)
        self.pair = pair
        self.max_length = max_length
        self.truncation_side = truncation_side
        self.unit = output
        self._reader: Reader | None = None
        self._index = 0
        self._label_read = ""
        self._exclusive = True  # whether labels exclude each other
        self._warned = False

    def provenance(self) -> Mapping[str, str]:
        """Return model and precision; once loaded, also label, revision and digest."""
        read = {} if self._reader is None else {"label": self._label_read}
        return {**super().provenance(), **read}

    def remarks(self, prompts: Sequence[str]) -> list[str]:
        """Say how many prompts leave no room for the text.

        Raises:
            RewardError: If the model cannot be loaded.
        """
        self._loaded()
        assert self._reader is not None  # `_prepare` ran
        full = [prompt for prompt in prompts if not self._reads_text(prompt)]
        if not full:
            return []
        return [
            f"{len(full)} of {len(prompts)} prompts fill the {self._reader.longest} tokens that "
            f"the model reads: nothing of a text is read, and all score the same. The first "
            f"begins {full[0][:_SHOWN]!r}. Set `truncation_side: left`, or a `template` without "
            f"{{prompt}}."
        ]

    def _reads_text(self, prompt: str) -> bool:
        """Return whether the score depends on the text.

        It does not if the prompt before the text fills the room.
        """
        assert self._reader is not None  # `_prepare` ran
        short, long = (self._segments(prompt, text) for text in ("a", "a b c"))
        row, length = self._reader.read(*short)
        # Cheap in the usual case: the two are tokenised only where one of them is cut.
        return length <= self._reader.longest or row != self._reader.read(*long)[0]

    def _segments(self, prompt: str, text: str) -> tuple[str, ...]:
        """Return what the tokenizer is given."""
        return (prompt, text) if self.pair else (self.template.format(prompt=prompt, text=text),)

    def _recipe(self) -> Hashable:
        return build_classifier

    def _build(self, weights: Weights) -> nn.Module:
        return build_classifier(weights, self.dtype)

    def _prepare(self, weights: Weights) -> None:
        sketch = _sketch(weights)
        self._index, self._label_read = find_output(self.logit, sketch.config.id2label)
        self._exclusive = sketch.config.problem_type != "multi_label_classification"
        self._reader = reader_of(
            sketch, weights, longest=self.max_length, truncation_side=self.truncation_side
        )

    def _score_batch(self, module: Any, samples: Sequence[str], prompts: Sequence[str]) -> Tensor:
        reader = self._reader
        assert reader is not None  # `_prepare` ran before the first batch
        rows = []
        for prompt, text in zip(prompts, samples, strict=True):
            row, length = reader.read(*self._segments(prompt, text))
            if length > reader.longest:
                self._warn_of_cut(length, text)
            rows.append(row)
        options = dict.fromkeys(accepted(module, ("use_cache",)), False)
        scores = torch.empty(len(rows), dtype=torch.float64)
        for indices in reader.groups(rows):
            tensors = reader.stack([rows[index] for index in indices])
            on_device = {name: tensor.to(self.device) for name, tensor in tensors.items()}
            logits = module(**on_device, **options).logits  # [m, labels]
            scores[indices] = self._read(logits.double().cpu())
        return scores

    def _read(self, logits: Tensor) -> Tensor:
        """Turn logits ``[m, labels]`` into scores ``[m]``."""
        if self.output == "probability":
            several = self._exclusive and logits.shape[-1] > 1
            logits = logits.softmax(-1) if several else logits.sigmoid()
        return logits[:, self._index]

    def _warn_of_cut(self, length: int, text: str) -> None:
        if not self._warned:
            assert self._reader is not None  # it has read the text
            self._warned = True
            _log.warning(
                'Reward head "%s" reads %d tokens and cuts the %s end off a text of %d: %r. '
                "Further ones are cut without a warning.",
                self._label,
                self._reader.longest,
                self.truncation_side,
                length,
                text[:_SHOWN],
            )


def check_template(template: str, *, needed: str | None = "text") -> str:
    """Return the template if it has the place that is needed, and no others but ``{prompt}``.

    Args:
        template: A format string of ``str.format``.
        needed: Name of the place; None needs none.

    Raises:
        ValueError: Otherwise.
    """
    wanted = "no place but {prompt}"
    if needed is not None:
        wanted = f"the place {{{needed}}}, and no other but {{prompt}}"
    try:
        places = [place[1:] for place in string.Formatter().parse(template) if place[1] is not None]
    except ValueError as error:
        raise ValueError(
            f"Parameter `template` should have {wanted}; other braces are doubled ({error}). "
            f"Found `template = {template!r}`."
        ) from error
    # Nothing but plain names: `{text.x}`, `{text!r}` and `{text:>9}` would change what is read.
    names = [name for name, spec, kind in places if not spec and kind is None]
    if len(names) < len(places) or not {needed} - {None} <= set(names) <= {"prompt", needed}:
        raise ValueError(
            f"Parameter `template` should have {wanted}. Found `template = {template!r}`."
        )
    return template


def build_classifier(weights: Weights, dtype: torch.dtype) -> nn.Module:
    """Return a model for sequence classification, on the CPU.

    Raises:
        RewardError: If the weights are damaged or do not fit, or transformers has no such class.
    """
    kind = type(_sketch(weights))
    model: Any = load_pretrained(kind, weights, dtype=dtype, ignore=_OLD_BUFFERS)
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        # No token is padding then, and none has to be: see `Classifier`. With None, transformers
        # would take one text at a time.
        config.pad_token_id = -1
    return model


def _sketch(weights: Weights) -> Any:
    """Return the model without weights, on the meta device.

    Its class is the one that its ``config.json`` names.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(
            weights.folder, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except Exception as error:  # the libraries below have no common base class
        raise RewardError(
            f"The `config.json` in {weights.folder} describes no text classifier of this version "
            f"of transformers ({type(error).__name__}: {error})."
        ) from error


def find_output(logit: int | str | None, labels: Mapping[int, str]) -> tuple[int, str]:
    """Return which output of a model is the score.

    Args:
        logit: Its index or label; None will do where there is one only.
        labels: Labels by index.

    Returns:
        Index and label.

    Raises:
        RewardError: If there is none such, or more than one.
    """
    known = ", ".join(f"{index} ({label})" for index, label in sorted(labels.items()))
    if logit is None:
        if len(labels) == 1:
            return next(iter(labels.items()))
        raise RewardError(f"The model has several outputs. Set `logit` to one of {known}.")
    matching = [index for index, label in labels.items() if logit in (index, label)]
    if len(matching) != 1:
        hint = did_you_mean(logit, list(labels.values())) if isinstance(logit, str) else ""
        raise RewardError(
            f"The model should have one output that is `logit = {logit!r}`. It has {known}.{hint}"
        )
    return matching[0], labels[matching[0]]
