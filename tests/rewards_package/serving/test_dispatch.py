"""Parts over servers: sent once, to whoever is free; failures go elsewhere or end the batch."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from rewards.serving.dispatch import Dispatch, DispatchError, SendError

LONG = 600.0  # seconds that no test comes near


def dispatch(send, urls=("a", "b"), *, parts=6, workers=2, retries=2, seconds=LONG):
    options = {"parts": parts, "workers": workers, "retries": retries, "seconds": seconds}

    async def run():
        return await Dispatch(urls, send, **options).run()

    return asyncio.run(run())


def test_results_are_in_the_order_of_the_parts():
    sent: Counter[int] = Counter()

    async def send(url: str, part: int, seconds: float) -> str:
        sent[part] += 1
        return f"result {part}"

    assert dispatch(send) == [f"result {part}" for part in range(6)]
    assert sent == Counter(range(6)), "each part is sent once"


def test_a_server_that_hangs_leaves_its_parts_of_the_queue_to_the_other():
    done, hang = [], asyncio.Event()

    async def send(url: str, part: int, seconds: float) -> int:
        if url == "slow":
            await hang.wait()
        else:
            done.append(part)
            if len(done) == 3:  # there are four, and one hangs in the single worker of the other
                hang.set()
        return part

    assert dispatch(send, ("slow", "fast"), parts=4, workers=1) == [0, 1, 2, 3]


def test_a_part_of_a_server_that_never_will_goes_to_another():
    async def send(url: str, part: int, seconds: float) -> str:
        if url == "a":
            raise SendError("a: no such head", elsewhere=True)
        return url

    assert dispatch(send) == ["b"] * 6


def test_without_any_server_left_the_batch_fails_with_the_causes():
    async def send(url: str, part: int, seconds: float) -> str:
        raise SendError(f"{url} is of another version", elsewhere=True)

    with pytest.raises(DispatchError) as failure:
        dispatch(send)
    assert failure.value.cause.startswith("no server is left: ")
    assert "a is of another version" in failure.value.cause
    assert failure.value.parts == tuple(range(6))


def test_a_failure_that_is_the_samples_fault_ends_the_batch_and_names_them():
    async def send(url: str, part: int, seconds: float) -> str:
        if part == 0:
            raise SendError("NaN in the pixels", samples=[3])
        return url

    with pytest.raises(DispatchError, match="NaN in the pixels") as failure:
        dispatch(send, ("a",), workers=1)
    assert (failure.value.parts, failure.value.samples) == ((0,), (3,))


def test_failures_that_cost_are_bounded():
    calls: Counter[str] = Counter()

    async def send(url: str, part: int, seconds: float) -> str:
        calls[url] += 1
        raise SendError("500", again=True, costs=True, pause=0)

    with pytest.raises(DispatchError, match="no server is left: 500"):
        dispatch(send, ("a",), parts=1, workers=1, retries=2)
    assert calls["a"] == 3


def test_an_error_of_the_sender_is_raised_itself():
    async def send(url: str, part: int, seconds: float) -> str:
        raise ZeroDivisionError("a fault of the client")

    with pytest.raises(ZeroDivisionError, match="a fault of the client"):
        dispatch(send)


def test_a_request_gets_half_of_the_time_where_another_server_could_take_over():
    given: dict[int, float] = {}

    async def send(url: str, part: int, seconds: float) -> str:
        given[part] = seconds
        return url

    dispatch(send, ("a", "b"), parts=1)
    assert given[0] <= LONG / 2
    dispatch(send, ("a",), parts=1)
    assert LONG / 2 < given[0] <= LONG
