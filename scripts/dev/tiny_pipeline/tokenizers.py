"""Tokenizers for the tiny text encoders, built from the vocabulary of the scenes alone.

As in Stable Diffusion 3, two encoders read byte-level BPE with end-of-word marks (CLIP) and one
reads Unigram pieces (T5). Every word of the prompts' grammar is one token (but "an", which would
also join the letters of MAN); the quoted word is spelled letter by letter, so that a word never
seen can still be read. CLIP folds case, T5 keeps it.
"""

from typing import TYPE_CHECKING

from tiny_pipeline.scenes import COLOURS, SHAPES, WORDS

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, T5TokenizerFast

GRAMMAR = ("a", "on", "background", "sign", "that", "says", *COLOURS, *SHAPES)
MAX_LENGTH = 16  # tokens; the longest prompt of the scenes takes 14

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<pad>"


def clip_tokenizer(pad_token: str = END) -> "CLIPTokenizer":
    """Return a byte-level BPE tokenizer whose merges spell the words of ``GRAMMAR`` alone.

    Args:
        pad_token: SD3's first CLIP pads with the end token, its second with ``!``.

    Returns:
        A tokenizer of about 600 entries that pads to ``MAX_LENGTH``.
    """
    from transformers import CLIPTokenizer

    symbols = [*_byte_symbols()]
    merges: list[tuple[str, str]] = []
    for word in GRAMMAR:
        merges += [pair for pair in _merges(word) if pair not in merges]
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate([*tokens, START, END])}
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=MAX_LENGTH
    )


def t5_tokenizer() -> "T5TokenizerFast":
    """Return a Unigram tokenizer: the words of ``GRAMMAR``, and single printable ASCII characters.

    Returns:
        A tokenizer of about 120 entries. Its ``model_max_length`` bounds nothing inside the
        pipeline, which pads this encoder's prompt to ``max_sequence_length``.
    """
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -2.0) for word in GRAMMAR if word != "a"]
    pieces += [("▁", -3.0), ("▁a", -2.0)]
    pieces += [(chr(code), -4.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=MAX_LENGTH)


def _byte_symbols() -> list[str]:
    """Return the 256 printable stand-ins for bytes that byte-level BPE uses."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _merges(word: str) -> list[tuple[str, str]]:
    """Return the merges that build ``word``.

    They build it from its end, or from its start where a sign's word ends alike.
    """
    parts = [*word[:-1], f"{word[-1]}</w>"]
    backwards = not any(sign.lower().endswith(word[-2:]) for sign in WORDS)
    merges = []
    while len(parts) > 1:
        at = len(parts) - 2 if backwards else 0
        merges.append((parts[at], parts[at + 1]))
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    return merges
