"""Dialogues as token ids, and back to text."""

from __future__ import annotations

import torch

from moa_diffusion.policies.chat import Dialogue


def test_a_completion_keeps_the_space_in_front_of_its_first_word() -> None:
    """Tokenizers in the manner of SentencePiece write it only where something is before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "\u2581This", "\u2581film", "\u2581was", "\u2581great"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<s>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    metaspace = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    dialogue = Dialogue(metaspace, chat=False, max_prompt_tokens=9, max_new_tokens=9)
    ids = torch.tensor([[4, 5, 1]])
    found = dialogue.texts(["This film"], ids, torch.ones_like(ids, dtype=torch.bool))
    assert found == (" was great",)
