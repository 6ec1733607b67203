"""A byte-level BPE tokenizer learnt from letters: few entries, any text.

``transformers.AutoTokenizer`` loads what is saved. A text begins with ``BOS``; what ends a letter,
``EOS``, is left to the caller, as with other causal language models. Padding stands on the left, as
generation needs it.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from tiny_letters import grammar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 600
CONTEXT = 192  # tokens; the longest prompt and letter that there can be take 172
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
_LETTERS = 8000  # that the merges are counted on


def new_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Learn the merges from letters for the training prompts.

    Args:
        seed: Seed of the letters.

    Returns:
        A tokenizer of ``VOCABULARY`` entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(f"tokenizer {seed}")
    train, _ = grammar.situations()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    drawn = (grammar.draw(rng, train) for _ in range(_LETTERS))
    texts = (f"{situation.prompt} {letter}" for situation, letter in drawn)
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {EOS} $B",
        special_tokens=[(mark, backend.token_to_id(mark)) for mark in (BOS, EOS)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
