"""A Llama of a million parameters learns to write letters: next-token prediction, no more.

Letters are drawn anew for every update, so none is learnt by heart.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.progress_bar import progress_bar
from tiny_letters import grammar
from tiny_letters.tokenizer import CONTEXT, new_tokenizer
from tiny_pipeline.muon import MuonWithAdamW

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

# An update is cut into parts: letters of like length go through the model together, to pad less.
_PARTS = 4


def new_language_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Return an untrained Llama: 4 layers of width 128, 0.9 M parameters, tied embeddings.

    Its generation config samples from the model's own distribution.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    marks = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            **marks,
        )
    )
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=128, **marks
    )
    return model


def encode(
    tokenizer: PreTrainedTokenizerBase, drawn: Sequence[tuple[grammar.Situation, str]]
) -> list[list[int]]:
    """Return the token ids of prompt, letter and end, one list per letter."""
    texts = [f"{situation.prompt} {letter}" for situation, letter in drawn]
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts).input_ids]


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Return rows of ids as ``[N, L]`` int64, padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def token_losses(model: LlamaForCausalLM, ids: Tensor, padding: int) -> Tensor:
    """Return the surprise of every token but the first.

    Args:
        model: Language model that predicts each token.
        ids: Token ids ``[N, L]``, padded on the right, where causal attention needs no mask.
        padding: Id of the padding token; it must not occur in a text.

    Returns:
        ``[N, L - 1]`` in nats, 0 at padding.
    """
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # [N, L - 1, V]
    return F.cross_entropy(
        logits.transpose(1, 2), ids[:, 1:], ignore_index=padding, reduction="none"
    )


def train_language_model(folder: Path, seed: int, steps: int, batch: int, lr: float = 0.02) -> None:
    """Train tokenizer and model on the training prompts and save both to ``folder/lm``.

    Args:
        folder: Folder of the model, made if it is missing.
        seed: Seed of merges, weights and letters.
        steps: Number of optimizer steps.
        batch: Number of letters per optimizer step, at least 4.
        lr: Peak rate of Muon.
    """
    torch.manual_seed(seed)
    tokenizer = new_tokenizer(seed)
    padding = tokenizer.pad_token_id
    model = new_language_model(tokenizer).train()
    optimizer = MuonWithAdamW(
        model.named_parameters(),
        lambda name: "layers." in name,
        lr=lr,
        adam_lr=3e-3,
        steps=steps,
    )
    rng = random.Random(f"letters {seed}")
    train, _ = grammar.situations()
    for _ in (bar := progress_bar(range(steps), title="lm", position=0)):
        rows = encode(tokenizer, [grammar.draw(rng, train) for _ in range(batch)])
        rows.sort(key=len)
        count = sum(len(row) - 1 for row in rows)  # one denominator, or short letters count more
        total = 0.0
        optimizer.zero_grad()
        for part in range(_PARTS):
            ids = pad(rows[part * batch // _PARTS : (part + 1) * batch // _PARTS], padding)
            loss = token_losses(model, ids, padding).sum() / count
            loss.backward()
            total += loss.item()
        optimizer.step()
        bar.set_postfix(nats=f"{total:.3f}", refresh=False)
    save(model.eval(), tokenizer, folder / "lm")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save float16 weights that load as float32 unless another type is asked for."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"dtype": "float32"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
