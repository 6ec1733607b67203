"""How well an image fits its prompt as a vision-language model answers a question about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from rewards.base import RewardError, Scores
from rewards.heads.classifier import check_template
from rewards.pretrained.base import Dtype, ModelHead, ModelOptions
from rewards.pretrained.locate import Weights
from rewards.pretrained.tensors import load_pretrained
from rewards.pretrained.tokens import PROCESSOR_FILES, accepted, chat_text, load_processor
from rewards.registry import register

_QUESTION = 'Does this figure show "{prompt}"? Please answer Yes or No.'


@register("vqascore")
class VqaScoreHead(ModelHead):
    """Probability of the answer "Yes" to a question about the image and its prompt.

    Higher is better. VQAScore (Lin et al. 2024, https://arxiv.org/abs/2404.01291) asks a
    vision-language model whether the image shows the prompt. The score is the softmax over the
    whole vocabulary at the first token of the reply, read at the first token of ``answer``.
    Question, answer and reading are those of the authors' code for Qwen3-VL
    (https://github.com/linzhiqiu/t2v_metrics). The scores table also gets ``reply``, the likeliest
    first token: where it is never the answer, question or answer do not suit the model.

    Any model will do that ``AutoModelForImageTextToText`` of transformers loads, that writes on
    from its input, and whose processor has a chat template; and any question, so this is also an
    objective of one's own:

        sharp: {head: vqascore, template: "Is this photo of {prompt} in focus? Answer Yes or No."}
        empty: {head: vqascore, template: "Is there a person in this picture?", answer: "No"}

    Heads that ask one model share its weights. A model that may think first is told not to, as the
    authors do with Qwen3.5. A blank prompt scores NaN where the template has the place
    ``{prompt}``; there a prompt that holds a special token of the model, such as ``<image>``, is an
    error, and ``remarks`` counts such prompts. No prompt is cut: prompts of one length are scored
    together, without padding, so scores do not depend on ``batch_size`` beyond rounding.

    The default weights have 2 billion parameters, 4.3 GB in half precision, under the Apache
    licence 2.0; others differ: that of Qwen2.5-VL-3B forbids commercial use. In bfloat16 logits
    from 16 to 32 lie 1/8 apart, which moves a probability of 0.5 by 0.03; ``dtype: float32`` has
    finer steps.

    Deviations: CLIP-FlanT5-XXL, the paper's own model, is no class of transformers and is left
    out. The authors have images for Qwen resized by the package qwen-vl-utils; here the model's
    processor does it, and leaves images whose sides are multiples of 32 from 256 to 4,096 pixels
    as they are. A penalty on repetition that a model's ``generation_config.json`` sets counts in
    the authors' code, and not here.

    The published weights were not at hand: that this head computes what the authors' code computes
    was tested on small models of three classes with random weights. No code that comes with a
    model is run, so one with classes of its own is refused.

    Args:
        model: Folder with ``config.json``, weights, tokenizer and processor, or hub model.
        template: The question, with the place ``{prompt}``; without it, it is about the image
            alone. Doubled braces stand for braces.
        answer: The answer whose first token is read, as the tokenizer splits it alone. With a
            model whose turn begins right behind a colon, as SmolVLM's, it begins with a space.
        against: Another answer, ``"No"``: the score is then the share of ``answer`` in the
            probability of the two, so words beside them do not count. None of the authors' by
            default.
        dtype: Precision; the default weights are published in bfloat16.
        options: See ``ModelOptions``.

    Raises:
        ValueError: If a parameter is wrong or names a folder or device that is not there.
    """

    unit = "probability, 0 to 1"
    required = ("config.json", "tokenizer.json", "tokenizer_config.json")
    optional = PROCESSOR_FILES

    def __init__(
        self,
        model: str = "Qwen/Qwen3-VL-2B-Instruct",
        template: str = _QUESTION,
        answer: str = "Yes",
        against: str | None = None,
        dtype: Dtype = "bfloat16",
        **options: Unpack[ModelOptions],
    ) -> None:
        if not template.strip():
            raise ValueError(
                f"Parameter `template` should ask a question. Found `template = {template!r}`."
            )
        super().__init__(model=model, dtype=dtype, **options)
        self.template = check_template(template, needed=None)
        self.answer = answer
        self.against = against
        self._asks_for_prompt = template.format(prompt="") != template.format(prompt="a")
        self._processor: Any = None
        self._tokens: list[int] = []  # of the answer, and of the one against it
        self._special: list[str] = []

    def provenance(self) -> Mapping[str, str]:
        """Return model, precision and question; once loaded, also the revision and digests."""
        against = {} if self.against is None else {"against": self.against}
        return {
            **super().provenance(),
            "template": self.template,
            "answer": self.answer,
            **against,
        }

    def remarks(self, prompts: Sequence[str]) -> list[str]:
        """Say how many prompts are blank, and how many cannot be scored.

        Raises:
            RewardError: If the model cannot be loaded.
        """
        self._loaded()
        blank = sum(not self._applies(prompt) for prompt in prompts)
        remarks = [f"{blank} of {len(prompts)} prompts are blank: they score NaN."] if blank else []
        marked = [prompt for prompt in prompts if self._special_in(prompt)]
        if marked:
            remarks.append(
                f"{len(marked)} of {len(prompts)} prompts hold a special token of the model: "
                f"scoring one is an error. The first is {marked[0]!r}, with "
                f"{self._special_in(marked[0])[0]!r}."
            )
        return remarks

    def _applies(self, prompt: str) -> bool:
        return not self._asks_for_prompt or bool(prompt.strip())

    def _special_in(self, prompt: str) -> list[str]:
        """Return the special tokens that the prompt brings into the question."""
        if not self._asks_for_prompt:
            return []
        return [token for token in self._special if token in prompt]

    def _build(self, weights: Weights) -> nn.Module:
        from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, __version__

        try:
            config = AutoConfig.from_pretrained(
                weights.folder, local_files_only=True, trust_remote_code=False
            )
            kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        except (OSError, ValueError, KeyError) as error:
            raise RewardError(
                f"The `config.json` in {weights.folder} describes no vision-language model of "
                f"transformers {__version__} ({type(error).__name__}: {error}). Name another "
                f"model, or update transformers where a later version has it."
            ) from error
        if config.is_encoder_decoder:
            raise RewardError(
                f"The model `{weights.model}` should write on from its input. Found "
                f"{kind.__name__}, which has an encoder and a decoder."
            )
        model: Any = load_pretrained(kind, weights, dtype=self.dtype)
        model.config.get_text_config().use_cache = False  # one pass needs none
        return model

    def _prepare(self, weights: Weights) -> None:
        from transformers import AutoProcessor

        processor = load_processor(AutoProcessor, weights)
        tokens = {}
        for option, answer in (("answer", self.answer), ("against", self.against)):
            if answer is None:
                continue
            ids = processor.tokenizer(answer, add_special_tokens=False).input_ids
            if not ids or ids[0] == processor.tokenizer.unk_token_id:
                raise RewardError(
                    f"Parameter `{option}` should begin with a token of `{weights.model}`. "
                    f"Found `{option} = {answer!r}`, of which its tokenizer makes {ids}."
                )
            tokens[option] = ids[0]
        if tokens["answer"] == tokens.get("against"):
            raise RewardError(
                f"The tokenizer of `{weights.model}` should tell `answer` and `against` apart by "
                f"their first token. Found `answer = {self.answer!r}` and "
                f"`against = {self.against!r}`, which both begin with the token "
                f"{tokens['answer']}."
            )
        self._processor, self._tokens = processor, list(tokens.values())
        # Most are missing in `all_special_tokens` where the tokenizer's config does not list them.
        added = processor.tokenizer.added_tokens_decoder.values()
        self._special = [token.content for token in added if token.special]
        text = self._text("")
        if text.rstrip().endswith("<think>"):
            raise RewardError(
                f"The model `{weights.model}` thinks before it answers, as its chat template ends "
                f"with {text[-20:]!r}. Name one whose first token is the answer."
            )

    def _text(self, prompt: str) -> str:
        """Return what the model reads: the question, and the beginning of its own turn.

        Raises:
            RewardError: If the prompt holds a special token, which would be an image, or an end.
        """
        special = self._special_in(prompt)
        if special:
            raise RewardError(
                f"A prompt should hold no special token of `{self.model}`, which would be read as "
                f"such. Found {special[0]!r} in {prompt!r}. Write the prompt without it."
            )
        known = "enable_thinking" in str(self._processor.chat_template)
        options = {"enable_thinking": False} if known else {}
        return chat_text(self._processor, self.template.format(prompt=prompt), **options)

    def _score_batch(self, module: Any, images: Tensor, prompts: Sequence[str]) -> Scores:
        images = images.cpu()
        texts = [self._text(prompt) for prompt in prompts]
        tokenizer = self._processor.tokenizer
        # Tokenizers that begin a text with a token of their own must not do so twice.
        begun = tokenizer.bos_token is not None and texts[0].startswith(tokenizer.bos_token)
        special: Mapping[str, bool] = {"add_special_tokens": False} if begun else {}
        last = dict.fromkeys(accepted(module, ("logits_to_keep",)), 1)
        order: list[int] = []
        parts: list[Tensor] = []
        for rows in _of_one_length(tokenizer(texts).input_ids):
            inputs = self._processor(
                text=[texts[row] for row in rows],
                images=[[images[row]] for row in rows],
                return_tensors="pt",
                **special,
            ).to(self.device, self.dtype)
            logits = module(**inputs, **last).logits[:, -1].float()  # [m, V]
            order += rows
            # As float32, which holds indices below 2^24 as they are, one copy brings both.
            parts.append(torch.stack([self._read(logits), logits.argmax(-1).float()]))  # [2, m]
        values, replies = torch.cat(parts, dim=-1).cpu()[:, torch.tensor(order).argsort()]
        return Scores(
            values=values,
            extra={"reply": [tokenizer.decode([token]) for token in replies.long().tolist()]},
        )

    def _read(self, logits: Tensor) -> Tensor:
        """Turn logits ``[m, V]`` into the probability of the answer, ``[m]``."""
        if self.against is None:
            return logits.softmax(-1)[:, self._tokens[0]]
        return logits[:, self._tokens].softmax(-1)[:, 0]


def _of_one_length(rows: Sequence[Sequence[int]]) -> Iterable[list[int]]:
    """Return the indices of the rows, those of one length together."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[len(row)].append(index)
    return groups.values()
