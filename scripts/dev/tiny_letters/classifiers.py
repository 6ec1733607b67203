"""Two DistilBERTs learn to read mood and politeness from letters, whole and mangled.

They stand in for the two usual forms of a reward model: ``mood`` has a logit for each of two
classes, as ``lvwerra/distilbert-imdb`` has, ``politeness`` has one logit. Their labels come from
the rules in ``traits``. What an aligned policy writes is no letter for long, so most of what they
learn from is cut off, out of order, repeated, joined, thinned out or scrambled, with or without its
prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_diffusion.tiny import rules
from rewards.progress_bar import progress_bar
from tiny_letters import grammar
from tiny_letters.pretrain import save
from tiny_letters.tokenizer import CONTEXT, new_tokenizer
from tiny_pipeline.muon import MuonWithAdamW

if TYPE_CHECKING:
    from transformers import DistilBertForSequenceClassification, PreTrainedTokenizerBase

RULES: dict[str, Callable[[str], float]] = {"mood": rules.mood, "politeness": rules.politeness}
_CENTRED = 0.01  # weight of the squared sum of the two logits of `mood`


def new_classifier(
    tokenizer: PreTrainedTokenizerBase, trait: str
) -> DistilBertForSequenceClassification:
    """Return an untrained DistilBERT: 2 layers of width 64, 0.1 M parameters.

    Args:
        tokenizer: Tokenizer of the texts.
        trait: ``mood`` (labels NEGATIVE and POSITIVE) or ``politeness`` (one logit).
    """
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    labels = ("NEGATIVE", "POSITIVE") if trait == "mood" else ("POLITENESS",)
    return DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=CONTEXT,
            dim=64,
            hidden_dim=192,
            n_layers=2,
            n_heads=4,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            pad_token_id=tokenizer.pad_token_id,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            problem_type="regression" if len(labels) == 1 else "single_label_classification",
        )
    )


def mangled(rng: random.Random, group: list[grammar.Situation]) -> str:
    """Return a letter as it is, or spoilt in one or two ways, with its prompt or without.

    Args:
        rng: Source of letter and ways.
        group: Situations to write about.
    """
    situation, text = grammar.draw(rng, group)
    for _ in range(rng.choice((0, 1, 1, 2))):
        pieces = text.split(" ")
        match rng.randrange(6):
            case 0:  # cut off, anywhere
                text = text[: rng.randint(0, len(text))]
            case 1:  # out of order
                sentences = text.split(". ")
                rng.shuffle(sentences)
                text = ". ".join(sentences)
            case 2:  # a sentence over and over
                text += f" {rng.choice(text.split('. '))}." * rng.randint(1, 6)
            case 3:  # two letters
                text += f" {grammar.draw(rng, group)[1]}"
            case 4:  # thinned out
                kept = rng.random()
                text = " ".join(piece for piece in pieces if rng.random() < kept)
            case _:  # scrambled
                rng.shuffle(pieces)
                text = " ".join(pieces)
    # As a model writes it, after its prompt, and as people would pass it on.
    return rng.choice((f" {text}", f"{situation.prompt} {text}", text))


def trait_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Return the squared error of one logit, or two's cross-entropy with share (1 + truth) / 2.

    Only the difference of two logits matters to the cross-entropy; a small weight on their sum
    makes each of them alone a score.

    Args:
        logits: Logits ``[N, 1]`` or ``[N, 2]``.
        truth: The trait's true values ``[N]``, -1 to 1.

    Returns:
        A scalar.
    """
    if logits.shape[1] == 1:
        return F.mse_loss(logits.squeeze(1), truth)
    positive = (1 + truth) / 2
    shares = torch.stack([1 - positive, positive], dim=1)  # [N, 2]
    return F.cross_entropy(logits, shares) + _CENTRED * logits.sum(dim=1).square().mean()


def train_classifier(
    folder: Path, seed: int, steps: int, batch: int, trait: str, lr: float = 0.02
) -> None:
    """Train a classifier and save it to the trait's folder.

    Args:
        folder: Made if missing; gets a folder of the trait's name.
        seed: Seed of weights and texts.
        steps: Number of optimizer steps.
        batch: Texts per update.
        trait: A key of ``RULES``.
        lr: Peak rate of Muon.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"{trait} {seed}")
    tokenizer = new_tokenizer(seed)
    tokenizer.padding_side = "right"  # position 0 is what the classifier reads
    model = new_classifier(tokenizer, trait).train()
    optimizer = MuonWithAdamW(
        model.named_parameters(), lambda name: "layer." in name, lr=lr, adam_lr=2e-3, steps=steps
    )
    train, _ = grammar.situations()
    for _ in (bar := progress_bar(range(steps), title=trait, position=1)):
        texts = [mangled(rng, train) for _ in range(batch)]
        tokens = tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
        seen = tokenizer.batch_decode(tokens.input_ids, skip_special_tokens=True)
        truth = torch.tensor([RULES[trait](text) for text in seen])
        loss = trait_loss(model(**tokens).logits, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    save(model.eval(), tokenizer, folder / trait)
