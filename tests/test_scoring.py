"""Scoring: NaN passes, failures raise on every process, nothing becomes a zero."""

from __future__ import annotations

import math

import pytest
import torch

from moa_diffusion.distributed import LocalComm
from moa_diffusion.scoring import RewardError, Scorer
from moa_diffusion.types import Request, Rollout
from rewards import RewardHead


class Red(RewardHead):
    """The red channel's mean."""

    closed = 0

    def score(self, batch):
        return batch.require_images()[:, 0].mean((1, 2))

    def close(self):
        self.closed += 1


class Metadata(RewardHead):
    """A value of the prompt's metadata; NaN without one."""

    def score(self, batch):
        return torch.tensor([entry.get("value", math.nan) for entry in batch.metadata])


class Broken(RewardHead):
    """Fails as a head with a bug does."""

    name = "broken"

    def score(self, batch):
        raise ZeroDivisionError("no pixels")


class Comm(LocalComm):
    """One process that is told what the others say, and remembers what it told them."""

    def __init__(self, *, other_failed: bool = False) -> None:
        self.other_failed = other_failed
        self.told: list[bool] = []

    def any(self, flag: bool) -> bool:
        self.told.append(flag)
        return flag or self.other_failed


def rollout(n: int = 3) -> Rollout:
    images = torch.zeros(n, 3, 2, 2)
    images[:, 0] = torch.linspace(0, 1, n)[:, None, None]
    metadata = [{"value": 5.0}, {}, {"value": 7.0}]
    return Rollout(
        requests=tuple(
            Request(prompt=f"p{i}", metadata=metadata[i % 3], group=i // 2) for i in range(n)
        ),
        log_probs=torch.zeros(n, 1),
        mask=torch.ones(n, 1, dtype=torch.bool),
        trace={},
        images=images,
    )


def test_matrix_of_a_rollout():
    part = rollout()
    scorer = Scorer({"red": Red(), "meta": Metadata()}, Comm())
    found = scorer(part, part.requests)
    assert found.names == scorer.names == ("red", "meta")
    assert found.values.dtype == torch.float64
    assert found.values[0].tolist() == [0, 0.5, 1]
    assert found.values[1, [0, 2]].tolist() == [5, 7]
    assert found.values[1, 1].isnan()
    assert found.groups.tolist() == [0, 0, 1]
    assert found.prompts == ("p0", "p1", "p2")
    assert scorer.seconds.keys() == {"red", "meta"}
    assert all(0 <= seconds < 10 for seconds in scorer.seconds.values())


def test_a_failing_head_raises_and_tells_the_others():
    comm = Comm()
    scorer = Scorer({"red": Red(), "broken": Broken()}, comm)
    with pytest.raises(RewardError, match=r"broken.*ZeroDivisionError: no pixels"):
        scorer(rollout(), rollout().requests)
    assert comm.told == [True]


def test_a_failure_elsewhere_raises_here():
    comm = Comm(other_failed=True)
    with pytest.raises(RewardError, match="failed on another process"):
        Scorer({"red": Red()}, comm)(rollout(), rollout().requests)
    assert comm.told == [False]


def test_any_failure_is_told_before_it_is_raised():
    """A process that leaves without a word lets the others wait until the collective times out."""
    comm = Comm()
    part = rollout()
    part.images[1] = math.nan  # what a policy that has diverged draws
    with pytest.raises((RewardError, ValueError), match="images"):
        Scorer({"red": Red()}, comm)(part, part.requests)
    assert comm.told == [True]


def test_infinite_scores_are_refused():
    class Infinite(RewardHead):
        name = "infinite"

        def score(self, batch):
            return torch.full((len(batch),), math.inf)

    with pytest.raises(RewardError, match="infinite"):
        Scorer({"infinite": Infinite()}, Comm())(rollout(), rollout().requests)


def test_close_reaches_every_head():
    heads = {"one": Red(), "two": Red()}
    Scorer(heads, Comm()).close()
    assert [head.closed for head in heads.values()] == [1, 1]
