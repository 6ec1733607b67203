"""Prompt embeddings: how often the encoders visit the device, and what is kept."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moa_diffusion.policies.sd3.prompt_encoder import ENCODERS, PromptEncoder

DEVICE = torch.device("cpu")
ONE = 4 * (3 * 2 + 2)  # bytes of a prompt's embeddings
PROMPTS = [f"prompt {i}" for i in range(12)]


class Encoder:
    """Counts its journeys."""

    def __init__(self) -> None:
        self.moves = 0

    def to(self, device: torch.device) -> None:
        self.moves += 1


class Pipeline:
    """Embeddings that name their prompt by its length and its last character."""

    def __init__(self) -> None:
        self.text_encoder = self.text_encoder_2 = self.text_encoder_3 = Encoder()
        self.encoder, self.batches = self.text_encoder, []

    def encode_prompt(self, prompt: list[str], **_: Any) -> tuple[Tensor, None, Tensor, None]:
        self.batches.append(prompt)
        numbers = torch.tensor([[len(p), ord((p or " ")[-1])] for p in prompt]).float()
        return numbers[:, None].expand(-1, 3, -1), None, numbers, None

    @property
    def visits(self) -> int:
        """Journeys to the device and back, if they came back."""
        return -(-self.encoder.moves // (2 * len(ENCODERS)))


def made(prompts: float, **options: Any) -> tuple[PromptEncoder, Pipeline]:
    """With room for so many prompts in memory."""
    pipeline = Pipeline()
    encoder = PromptEncoder(
        pipeline,
        device=DEVICE,
        max_sequence_length=3,
        source="here",
        memory_gb=prompts * ONE / 1e9,
        **options,
    )
    return encoder, pipeline


def assert_right(encoder: PromptEncoder, prompts: Sequence[str]) -> None:
    embeds, pooled = encoder(prompts)
    expected = torch.tensor([[len(p), ord((p or " ")[-1])] for p in prompts]).float()
    assert torch.equal(pooled, expected)
    assert torch.equal(embeds, expected[:, None].expand(-1, 3, -1))


@pytest.mark.parametrize("room", [1, 6])
def test_a_rollouts_prompts_are_encoded_in_one_visit(
    room: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if memory is smaller than a rollout: it is used a second time, for the update."""
    encoder, pipeline = made(room)
    with caplog.at_level(logging.WARNING):
        encoder.prepare(PROMPTS)
    assert caplog.text.count("policy.embeds_dir") == 1
    assert encoder.encoders_loaded
    before = pipeline.visits
    for rollout in (PROMPTS[:4], PROMPTS[4:8], PROMPTS[8:]):
        encoder.expect(rollout)
        for _ in range(2):
            for start in (0, 2):  # batches, guided
                assert_right(encoder, ["", "", *rollout[start : start + 2]])
    assert pipeline.visits == before + 3
    assert caplog.text.count("policy.embeds_dir") == 1
    assert sum(map(len, pipeline.batches)) == 1 + len(PROMPTS), "each once"


def test_what_is_kept_is_what_was_used_last_and_the_empty_prompt() -> None:
    encoder, pipeline = made(4)
    encoder.prepare(PROMPTS)
    for prompt in PROMPTS[:3]:
        encoder.expect([prompt])
    encoder([PROMPTS[0]])  # used again: the second one is the oldest now
    encoder.expect([PROMPTS[3]])
    count = len(pipeline.batches)
    for prompt in ("", PROMPTS[0], PROMPTS[2], PROMPTS[3]):
        assert_right(encoder, [prompt])
    assert len(pipeline.batches) == count
    assert_right(encoder, [PROMPTS[1]])
    assert len(pipeline.batches) == count + 1


def test_nothing_is_forgotten_where_all_fits(caplog: pytest.LogCaptureFixture) -> None:
    encoder, pipeline = made(len(PROMPTS) + 1)
    with caplog.at_level(logging.WARNING):
        encoder.prepare(PROMPTS)
    assert not encoder.encoders_loaded
    encoder.expect(PROMPTS[:3])
    assert_right(encoder, [*PROMPTS, ""])
    assert pipeline.visits == 1
    assert not caplog.text


def test_files_are_not_read_to_see_whether_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(1, cache_dir=tmp_path)[0].prepare(PROMPTS)
    assert len(list(tmp_path.iterdir())) == 1 + len(PROMPTS)
    encoder, pipeline = made(2, cache_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.load_file", lambda *_: pytest.fail("read"))
        encoder.prepare(PROMPTS)
        encoder.expect(PROMPTS[:4])
    assert not encoder.encoders_loaded
    assert not pipeline.batches
    assert_right(encoder, ["", *PROMPTS])


def test_processes_that_share_a_folder_share_the_work(tmp_path: Path) -> None:
    """The second begins in the middle; while it is at work, the first finishes."""
    first, other = made(1, cache_dir=tmp_path, batch_size=2, turn=(0, 2))
    second, pipeline = made(1, cache_dir=tmp_path, batch_size=2, turn=(1, 2))
    encode = pipeline.encode_prompt

    def meanwhile(prompt: list[str], **options: Any) -> Any:
        found = encode(prompt, **options)
        if len(pipeline.batches) == 3:
            first.prepare(PROMPTS)
        return found

    pipeline.encode_prompt = meanwhile
    second.prepare(PROMPTS)
    assert pipeline.batches[:3] == [[""], PROMPTS[6:8], PROMPTS[8:10]]
    assert len(pipeline.batches) == 3, "all others were there by then"
    done = [prompt for batch in other.batches for prompt in batch]
    assert set(done) == {*PROMPTS} - {*PROMPTS[6:8]}  # what was in work is done twice
    for encoder in (first, second):
        assert not encoder.encoders_loaded
        assert_right(encoder, ["", *PROMPTS])
