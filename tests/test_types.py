"""Records at boundaries refuse what does not fit, and select and concatenate are inverse."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moa_diffusion.types import Request, RewardMatrix, Rollout, concatenate


def rollout(n: int = 4, t: int = 2, **changes) -> Rollout:
    fields = {
        "requests": tuple(Request(prompt=f"p{i}", group=i // 2, seed=i) for i in range(n)),
        "log_probs": torch.arange(n * t).reshape(n, t).float(),
        "mask": torch.ones(n, t, dtype=torch.bool),
        "trace": {"latents": torch.arange(n).float()[:, None, None].repeat(1, 3, 5)},
        "images": torch.arange(n).float()[:, None, None, None].expand(n, 3, 2, 2) / n,
    }
    return Rollout(**(fields | changes))


def matrix(**changes) -> RewardMatrix:
    fields = {
        "names": ("a", "b"),
        "values": torch.zeros(2, 4).double(),
        "groups": torch.tensor([0, 0, 1, 1]),
        "prompts": ("x", "x", "y", "y"),
    }
    return RewardMatrix(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_probs": torch.zeros(3, 2)}, r"`log_probs` should have .* Found \(3, 2\) for 4"),
        ({"log_probs": torch.zeros(4)}, r"Found \(4,\)"),
        ({"mask": torch.ones(4, 3, dtype=torch.bool)}, r"`mask` .* Found \(4, 3\) and \(4, 2\)"),
        ({"images": None}, "exactly one of `images` and `texts`.* Found none"),
        ({"texts": ("a",) * 4}, "exactly one of `images` and `texts`.* Found both"),
        ({"bare": True}, "neither if it is `bare`. Found one"),
        ({"trace": {"latents": torch.zeros(3, 4)}}, r"`latents` .* n = 4. Found shape \(3, 4\)"),
    ],
)
def test_rollout_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        rollout(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.zeros(3, 4)}, r"K = 2. Found \(3, 4\)"),
        ({"values": torch.zeros(4)}, r"K = 2. Found \(4,\)"),
        ({"groups": torch.zeros(3)}, "length N = 4"),
        ({"prompts": ("x",)}, r"length N = 4. Found \(4,\) and 1"),
        ({"values": torch.tensor([[0.0, 1, 2, float("inf")]] * 2)}, "Found an infinity"),
    ],
)
def test_reward_matrix_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        matrix(**changes)


def test_reward_matrix_takes_nan():
    assert matrix(values=torch.full((2, 4), float("nan"))).values.isnan().all()


def test_select_takes_rows_in_the_order_asked_for():
    part = rollout().select(torch.tensor([2, 0]))
    assert len(part) == 2
    assert [request.seed for request in part.requests] == [2, 0]
    assert part.log_probs.tolist() == [[4, 5], [0, 1]]
    assert part.trace["latents"][:, 0, 0].tolist() == [2, 0]
    assert part.images[:, 0, 0, 0].tolist() == [0.5, 0]


def test_select_may_leave_the_outputs_behind():
    """Training reads latents and log-probs; the images of a micro-batch are 25 MB."""
    part = rollout().select(torch.tensor([2, 0]), outputs=False)
    assert part.images is part.texts is None
    assert part.trace["latents"][:, 0, 0].tolist() == [2, 0]


@pytest.mark.parametrize("texts", [None, ("a", "b", "c", "d")])
def test_concatenate_undoes_select(texts):
    whole = rollout() if texts is None else rollout(images=None, texts=texts)
    again = concatenate([whole.select(torch.tensor([0])), whole.select(torch.tensor([1, 2, 3]))])
    assert again.requests == whole.requests
    assert again.texts == whole.texts
    assert torch.equal(again.log_probs, whole.log_probs)
    assert torch.equal(again.mask, whole.mask)
    assert torch.equal(again.trace["latents"], whole.trace["latents"])
    assert texts is not None or torch.equal(again.images, whole.images)


@pytest.mark.parametrize("record", [rollout(), matrix(), Request(prompt="x")])
def test_records_are_frozen(record):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, dataclasses.fields(record)[0].name, None)
