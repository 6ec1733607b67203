"""What reward heads take of a GPU."""

from __future__ import annotations

import pytest
import torch

from moa_diffusion.planning.judges import judge
from moa_diffusion.scoring import create_head
from rewards.functions import FunctionHead

CLIP = "package://moa_diffusion/tiny/judges/clip"


@pytest.mark.slow
def test_published_models_have_their_published_sizes() -> None:
    # Sizes are published to three digits.
    deqa = judge(create_head("deqa"))
    assert deqa.weights == pytest.approx(16.4e9, rel=0.01)
    assert (deqa.dtype, deqa.note) == ("float16", "")
    assert deqa.flops > 1e12
    pickscore = judge(create_head("pickscore"))
    assert pickscore.weights == pytest.approx(3.94e9, rel=0.01)
    # ViT-H/14 on 224 px: 0.63 B parameters, 257 tokens.
    assert pickscore.flops == pytest.approx(2 * 0.63e9 * 257, rel=0.05)


def test_a_folder_is_counted_and_shared() -> None:
    first, second = (judge(create_head("clipscore", model=CLIP, batch_size=n)) for n in (1, 4))
    assert first.model == second.model
    assert first.weights == second.weights > 0
    assert second.flops == pytest.approx(first.flops)
    assert second.peak > 3 * first.peak


def test_half_precision_takes_half() -> None:
    single, half = (
        judge(create_head("clipscore", model=CLIP, dtype=d)) for d in ("float32", "bfloat16")
    )
    # But for tables of whole numbers, which stay as they are.
    assert half.weights == pytest.approx(single.weights / 2, rel=0.01)
    assert half.model != single.model


def test_what_is_not_counted_is_said() -> None:
    assert "CPU" in judge(create_head("sharpness")).note
    assert "CPU" in judge(create_head("clipscore", model=CLIP), on_cpu=True).note
    assert "time and working memory are not" in judge(create_head("qrealign")).note
    assert judge(create_head("qrealign")).partial
    assert not judge(create_head("clipscore", model=CLIP)).partial
    # Sizes as published, to two digits here and three below.
    assert judge(create_head("qrealign")).weights == pytest.approx(2.2e9, rel=0.05)
    for name, size in {
        "hpsv2": 3.94e9,
        "clip_iqa": 0.408e9,
        "vqascore": 4.26e9,
        "imagereward": 1.78e9,
    }.items():
        assert judge(create_head(name)).weights == pytest.approx(size, rel=0.01)
    unknown = judge(create_head("clipscore", model="someone/clip"))
    assert unknown.weights == 0
    assert "unknown, not counted" in unknown.note


def test_a_reward_of_ones_own_is_unknown() -> None:
    def mine(images: torch.Tensor, prompts: list[str]) -> list[float]:
        return [0.0] * len(prompts)

    assert "unknown, not counted" in judge(FunctionHead(mine)).note
