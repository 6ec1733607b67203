"""Scoring: NaN passes, failures raise on every process, nothing becomes a zero."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch

from moa_diffusion.distributed import LocalComm, ProcessError
from moa_diffusion.scoring import WAITING, RewardError, Scorer
from moa_diffusion.types import Request, RewardMatrix, Rollout
from rewards import RewardHead, Scores
from waiting import HANG


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

    def __init__(self, *, failed: Sequence[bool] = ()) -> None:
        self.failed = list(failed)  # what the others answer, in turn
        self.told: list[bool] = []
        self.lost = False  # whether the last that was asked of the others has failed

    def any(self, flag: bool) -> bool:
        self.told.append(flag)
        self.lost = self.failed.pop(0) if self.failed else False
        return flag or self.lost

    def gather_objects(self, local):
        return [*local, ["node-b", ["RewardError", "Reward red: gone"]]] if self.lost else local


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


def scored(scorer: Scorer, part: Rollout, batches: int = 1) -> RewardMatrix:
    """The rewards of a rollout that is drawn in some batches."""
    size = len(part) // batches
    with scorer.begin() as scoring:
        for start in range(0, len(part), size):
            chosen = slice(start, start + size)
            scoring.add(part.requests[chosen], images=part.images[chosen])
        return scorer.collect(scoring, part.requests, while_waiting=lambda: None)


def test_matrix_of_a_rollout():
    part = rollout()
    scorer = Scorer({"red": Red(), "meta": Metadata()}, Comm())
    found = scored(scorer, part)
    assert found.names == scorer.names == ("red", "meta")
    assert found.values.dtype == torch.float64
    assert found.values[0].tolist() == [0, 0.5, 1]
    assert found.values[1, [0, 2]].tolist() == [5, 7]
    assert found.values[1, 1].isnan()
    assert found.groups.tolist() == [0, 0, 1]
    assert found.prompts == ("p0", "p1", "p2")
    assert scorer.seconds.keys() == {"red", "meta"}
    assert all(seconds >= 0 for seconds in scorer.seconds.values())


def test_a_failing_head_raises_and_tells_the_others():
    comm = Comm()
    scorer = Scorer({"red": Red(), "broken": Broken()}, comm)
    with pytest.raises(RewardError, match=r"broken.*ZeroDivisionError: no pixels"):
        scored(scorer, rollout())
    assert comm.told == [False, True]  # nothing is pending, and something failed


def test_a_failure_elsewhere_raises_here():
    comm = Comm(failed=[False, True])
    with pytest.raises(ProcessError, match=r"Process 1 \(on node-b\) ended with: Reward red: gone"):
        scored(Scorer({"red": Red()}, comm), rollout())
    assert comm.told == [False, False]


def test_any_failure_is_told_before_it_is_raised():
    """A process that leaves without a word lets the others wait until the collective times out."""
    comm = Comm()
    part = rollout()
    part.images[1] = math.nan  # what a policy that has diverged draws
    with pytest.raises(RewardError, match="what the policy drew: `images`"):
        scored(Scorer({"red": Red()}, comm), part)
    assert comm.told == [False, True]


def test_infinite_scores_are_refused():
    class Infinite(RewardHead):
        name = "infinite"

        def score(self, batch):
            return torch.full((len(batch),), math.inf)

    with pytest.raises(RewardError, match="infinite"):
        scored(Scorer({"infinite": Infinite()}, Comm()), rollout())


def test_close_reaches_every_head():
    heads = {"one": Red(), "two": Red()}
    Scorer(heads, Comm()).close()
    assert [head.closed for head in heads.values()] == [1, 1]


@pytest.mark.parametrize("overlap", [True, False])
def test_batches_are_put_together_in_order(overlap):
    class Numbered(RewardHead):
        """Adds a column, but not to batches without red."""

        def score(self, batch):
            red = batch.require_images()[:, 0].mean((1, 2))
            return Scores(values=red, extra={"n": list(batch.prompts)} if red.any() else {})

    scorer = Scorer({"numbered": Numbered(), "red": Red()}, Comm(), overlap=overlap)
    part = rollout(12)
    found = scored(scorer, part, batches=4)
    # Means of float32 pixels that are all alike: 6e-8 of up to 1.
    torch.testing.assert_close(
        found.values[0], torch.linspace(0, 1, 12).double(), rtol=1e-6, atol=1e-6
    )
    assert [row["numbered/n"] for row in found.extra] == [f"p{i}" for i in range(12)]
    part.images[:3] = 0
    found = scored(scorer, part, batches=4)
    assert [row["numbered/n"] for row in found.extra][:4] == [None, None, None, "p3"]


class Gate(RewardHead):
    """Scores once it is let through."""

    def __init__(self) -> None:
        self.entered, self.open, self.batches = threading.Event(), threading.Event(), 0

    def score(self, batch):
        self.batches += 1
        self.entered.set()
        assert self.open.wait(HANG)
        return torch.zeros(len(batch))


def test_heads_work_beside_the_drawing_and_beside_each_other():
    one, two, part = Gate(), Gate(), rollout()
    scorer = Scorer({"one": one, "two": two}, Comm())
    with scorer.begin() as scoring:
        scoring.add(part.requests, images=part.images)
        assert one.entered.wait(HANG)
        assert two.entered.wait(HANG)  # neither has ended, and the next batch could be drawn here
        one.open.set()
        two.open.set()
        found = scorer.collect(scoring, part.requests, while_waiting=lambda: None)
        assert found.values.shape == (2, 3)


def test_drawing_waits_for_heads_that_fall_behind(monkeypatch):
    gate, part, waits = Gate(), rollout(), threading.Event()

    def watched(futures):
        if not all(future.done() for future in futures):
            waits.set()
        return wait(futures)

    monkeypatch.setattr("moa_diffusion.scoring.wait", watched)
    scorer = Scorer({"gate": gate}, Comm())
    with scorer.begin() as scoring, ThreadPoolExecutor(1) as drawing:
        for _ in range(1 + WAITING):
            scoring.add(part.requests, images=part.images)
        assert not waits.is_set()
        one_more = drawing.submit(scoring.add, part.requests, images=part.images)
        assert waits.wait(HANG)
        assert not one_more.done()
        gate.open.set()
        one_more.result(timeout=HANG)


def test_what_is_not_begun_is_dropped_and_the_rest_is_not_waited_for():
    gate, part = Gate(), rollout()
    scorer = Scorer({"gate": gate}, Comm())
    with pytest.raises(KeyboardInterrupt), scorer.begin() as scoring:
        for _ in range(3):
            scoring.add(part.requests, images=part.images)
        assert gate.entered.wait(HANG)
        raise KeyboardInterrupt
    assert gate.batches == 1
    gate.open.set()
    assert scored(scorer, part).values.shape == (1, 3)
    assert gate.batches == 2


def test_a_stop_is_honoured_while_a_head_works(monkeypatch):
    monkeypatch.setattr("moa_diffusion.scoring.POLL_SECONDS", 0.01)
    gate, part = Gate(), rollout()

    def leave():
        raise KeyboardInterrupt

    scorer = Scorer({"gate": gate}, Comm())
    with pytest.raises(KeyboardInterrupt), scorer.begin() as scoring:
        scoring.add(part.requests, images=part.images)
        scorer.collect(scoring, part.requests, while_waiting=leave)
    gate.open.set()


def test_a_failure_does_not_wait_for_the_other_heads():
    gate, part = Gate(), rollout()
    with pytest.raises(RewardError, match="no pixels"):
        scored(Scorer({"gate": gate, "broken": Broken()}, Comm()), part)
    assert not gate.open.is_set()
    gate.open.set()


def test_a_failure_names_the_samples_of_the_rollout():
    class Late(RewardHead):
        def score(self, batch):
            if "p4" in batch.prompts:
                raise RewardError("too dark", samples=batch.samples([batch.prompts.index("p4")]))
            return torch.zeros(len(batch))

    with pytest.raises(RewardError, match="too dark") as caught:
        scored(Scorer({"late": Late()}, Comm()), rollout(6), batches=2)
    assert caught.value.samples == ((4, "p4"),)


def test_a_head_that_ends_the_program_is_a_failure():
    class Exits(RewardHead):
        def score(self, batch):
            raise SystemExit(3)

    with pytest.raises(RewardError, match="SystemExit: 3"):
        scored(Scorer({"exits": Exits()}, Comm()), rollout())


def test_a_head_cannot_change_the_images_of_another():
    class Darkens(RewardHead):
        def score(self, batch):
            return batch.require_images().mul_(0).mean((1, 2, 3))

    part = rollout()
    found = scored(Scorer({"darkens": Darkens(), "red": Red()}, Comm(), overlap=False), part)
    assert found.values[1].tolist() == [0, 0.5, 1]
    assert part.images.any()


def test_processes_that_score_with_other_weights_are_an_error():
    class Two(Comm):
        def gather_objects(self, local):
            other = {"red": {"head": "Red", "unit": "", "sha256": "other"}}
            return [*local, other] if "red" in local[0] else super().gather_objects(local)

    with pytest.raises(RewardError, match="Processes 0 and 1 score differently"):
        Scorer({"red": Red()}, Two()).load()


def test_threads_work_on_the_device_of_the_process(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    scored(Scorer({"red": Red(), "meta": Metadata()}, Comm()), rollout())
    assert chosen == [3, 3]


def test_a_lost_rollout_is_not_scored_on():
    class Counting(Broken):
        batches = 0

        def score(self, batch):
            self.batches += 1
            raise ValueError("no")

    head, part = Counting(), rollout(9)
    with pytest.raises(RewardError, match="no"):
        scored(Scorer({"broken": head}, Comm(), overlap=False), part, batches=9)
    assert head.batches == 1


def test_heads_are_loaded_and_offloaded():
    class Model(Red):
        loaded = offloaded = 0
        unit = "redness"

        def load(self):
            self.loaded += 1

        def offload(self):
            self.offloaded += 1

        def provenance(self):
            return {"sha256": "abc"}

    head = Model()
    scorer = Scorer({"red": head}, Comm(), offload=True)
    assert scorer.load() == {"red": {"head": "Model", "unit": "redness", "sha256": "abc"}}
    assert (head.loaded, head.offloaded) == (1, 1)
    scored(scorer, rollout(), batches=3)
    assert head.offloaded == 2

    class Missing(Red):
        def load(self):
            raise RewardError("no weights", head="red")

    comm = Comm()
    with pytest.raises(RewardError, match="no weights"):
        Scorer({"red": Missing()}, comm).load()
    assert comm.told == [True]
