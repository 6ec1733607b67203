"""The tokenizers: same ids after a round trip through files, and quoted words spelled by letter."""

import pytest

from tiny_pipeline.scenes import WORDS, all_shapes, all_signs
from tiny_pipeline.tokenizers import GRAMMAR, MAX_LENGTH, clip_tokenizer, t5_tokenizer

PROMPTS = [scene.prompt for scene in [*all_shapes(), *all_signs()]]
TOKENIZERS = {
    "clip": clip_tokenizer,
    "clip_2": lambda: clip_tokenizer("!"),
    "t5": t5_tokenizer,
}
SPECIAL = {"clip": 2, "clip_2": 2, "t5": 1}  # tokens that every prompt gets


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_survive_a_round_trip(name: str, tmp_path) -> None:
    tokenizer = TOKENIZERS[name]()
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path, local_files_only=True)
    assert again.model_max_length == MAX_LENGTH
    options = {"padding": "max_length", "max_length": MAX_LENGTH}
    ids = tokenizer(PROMPTS, **options).input_ids
    assert again(PROMPTS, **options).input_ids == ids
    assert {len(row) for row in ids} == {MAX_LENGTH}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_grammar_is_whole_and_signs_are_spelled(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    for word in GRAMMAR:
        assert len(tokenizer(word).input_ids) == 1 + SPECIAL[name]
    before = len(tokenizer("a red sign that says").input_ids)
    space = name == "t5"  # Unigram writes the space before the quote as a piece of its own
    for word in WORDS:
        spelled = len(tokenizer(f'a red sign that says "{word}"').input_ids)
        assert spelled == before + space + 2 + len(word)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_hold_nothing_unknown(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    for prompt, ids in zip(PROMPTS, tokenizer(PROMPTS).input_ids, strict=True):
        inner = ids[SPECIAL[name] - 1 : -1]
        assert tokenizer.unk_token_id not in inner, prompt
