"""Marks for the language model and the classifiers, on prompts that none of them has learnt."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from scipy.stats import spearmanr
from torch import Tensor

from moa_diffusion.tiny import rules
from tiny_letters import grammar
from tiny_letters.classifiers import RULES, mangled
from tiny_letters.pretrain import encode, pad, token_losses

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

Drawn = list[tuple[grammar.Situation, str]]


def load_language_model(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Return the language model in a folder and its tokenizer, without network."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return cast("LlamaForCausalLM", model), cast("PreTrainedTokenizerBase", tokenizer)


def held_out_letters(count: int, seed: int) -> Drawn:
    """Draw letters by the grammar for the held-out prompts."""
    _, held_out = grammar.situations()
    rng = random.Random(f"exam {seed}")
    return [grammar.draw(rng, held_out) for _ in range(count)]


@torch.no_grad()
def sample_letters(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> Drawn:
    """Return what the model writes for the held-out prompts, taken in turn, at temperature 1.

    Args:
        model: The language model that writes.
        tokenizer: Tokenizer of the model.
        count: Number of letters.
        seed: Seed of torch's global generator, which ``generate`` draws from; its state is put
            back.
    """
    _, held_out = grammar.situations()
    asked = [held_out[index % len(held_out)] for index in range(count)]
    tokens = tokenizer([each.prompt for each in asked], padding=True, return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = model.generate(**tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    answers = ids[:, tokens.input_ids.shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return list(zip(asked, texts, strict=True))


@torch.no_grad()
def writing(folder: Path, count: int = 512, seed: int = 0) -> dict[str, float]:
    """Return how well the model knows the grammar.

    Args:
        folder: Folder of the language model.
        count: Letters drawn from the grammar, and as many from the model.
        seed: Seed of both.

    Returns:
        ``entropy`` and ``cross_entropy`` of a letter in nats, the grammar's own and the model's
        (their difference is the divergence of the model from the grammar); ``perplexity`` of a
        token, and ``perplexity_of_grammar``, the least possible; ``letters``, the share of the
        model's samples that the grammar can have written; mean and deviation of mood, politeness
        and words of both.
    """
    model, tokenizer = load_language_model(folder)
    drawn = held_out_letters(count, seed)
    sampled = sample_letters(model, tokenizer, count, seed)
    surprises, lengths = zip(*(_surprise(model, tokenizer, each) for each in drawn), strict=True)
    entropy = -statistics.fmean(grammar.log_probability(t, situation) for situation, t in drawn)
    cross_entropy, tokens = statistics.fmean(surprises), statistics.fmean(lengths)
    members = statistics.fmean(grammar.is_letter(text, situation) for situation, text in sampled)
    marks = {
        "entropy": entropy,
        "cross_entropy": cross_entropy,
        "perplexity": torch.tensor(cross_entropy / tokens).exp().item(),
        "perplexity_of_grammar": torch.tensor(entropy / tokens).exp().item(),
        "letters": members,
    }
    for whose, texts in (("grammar", drawn), ("model", sampled)):
        for name, rule in (RULES | {"words": rules.words}).items():
            values = [float(rule(text)) for _, text in texts]
            marks[f"{name}_mean_of_{whose}"] = statistics.fmean(values)
            marks[f"{name}_deviation_of_{whose}"] = statistics.stdev(values)
    return marks


def _surprise(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    drawn: tuple[grammar.Situation, str],
) -> tuple[float, int]:
    """Return the surprise of letter and end in nats, without the prompt's, and token counts."""
    ids = pad(encode(tokenizer, [drawn]), tokenizer.pad_token_id)
    prompt = len(tokenizer(drawn[0].prompt).input_ids)
    losses = token_losses(model, ids, tokenizer.pad_token_id)[0, prompt - 1 :]
    return losses.sum().item(), len(losses)


@torch.no_grad()
def scores(folder: Path, texts: Sequence[str]) -> Tensor:
    """Return the last logit that a classifier gives to each text.

    Args:
        folder: Folder of the classifier.
        texts: N texts; more than its tokenizer's ``model_max_length`` is cut off.

    Returns:
        ``[N]``.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = tokenizer([*texts], truncation=True, padding=True, return_tensors="pt")
    logits: Tensor = model.eval()(**tokens).logits
    return logits[:, -1]


def reading(
    folder: Path, language_model: Path, count: int = 512, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Return the rank correlation of each classifier with its rule.

    Rules give many texts the same value, and classifiers do not, so 1 cannot be reached: ``most``
        is
    what the rule itself reaches with a breath of noise on it.

    Args:
        folder: Holds a folder for each trait.
        language_model: Folder of the language model whose samples are read.
        count: Texts of each sort.
        seed: Seed of the texts.

    Returns:
        By trait: over ``letters`` of the grammar, ``mangled`` ones, ``samples`` of the model, and
            ``most``
        on the last.
    """
    _, held_out = grammar.situations()
    rng = random.Random(f"mangled {seed}")
    sorts = {
        "letters": [text for _, text in held_out_letters(count, seed)],
        "mangled": [mangled(rng, held_out) for _ in range(count)],
        "samples": [
            text for _, text in sample_letters(*load_language_model(language_model), count, seed)
        ],
    }
    marks: dict[str, dict[str, float]] = {}
    for trait, rule in RULES.items():
        truths = {sort: torch.tensor([rule(t) for t in texts]) for sort, texts in sorts.items()}
        marks[trait] = {
            sort: float(spearmanr(scores(folder / trait, texts), truths[sort]).statistic)
            for sort, texts in sorts.items()
        }
        breath = torch.rand(count, generator=torch.Generator().manual_seed(seed))
        most = spearmanr(truths["samples"] + 1e-3 * breath, truths["samples"])
        marks[trait]["most"] = float(most.statistic)
    return marks
