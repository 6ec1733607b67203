"""Async functions as rewards: one loop, bounded, and ended with whatever fails."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from reward_functions import batch, closing, redness_async
from rewards import FunctionHead, RewardError, Scores
from waiting import HANG


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_concurrency_is_bounded(limit):
    under_way, most = 0, 0

    async def f(image, prompt):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _ in range(5):
            await asyncio.sleep(0)
        under_way -= 1
        return float(prompt.split()[1])

    found = closing(FunctionHead(f, per_image=True, concurrency=limit), batch(10))
    assert found.tolist() == list(range(10))
    assert most == min(limit, 10)


@pytest.mark.parametrize("concurrency", [0, -1, 2.0, True, "3"])
def test_concurrency_is_a_positive_integer(concurrency):
    with pytest.raises(ValueError, match=r"`concurrency` should be a positive integer. Found"):
        FunctionHead(redness_async, per_image=True, concurrency=concurrency)
    with pytest.raises(ValueError, match=r"`per_image` should be true or false. Found 'yes'"):
        FunctionHead(redness_async, per_image="yes")


class Client:
    """An object whose call is async, and that belongs to the loop it was first used on."""

    loop = None

    async def __call__(self, images, prompts, scale=1.0):
        self.loop = self.loop or asyncio.get_running_loop()
        assert asyncio.get_running_loop() is self.loop
        assert not torch.is_grad_enabled()
        return Scores(values=images.mean((1, 2, 3)) * scale, extra={"prompt": prompts})


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: functools.partial(c.__call__, scale=1.0)])
def test_an_async_batch_function_keeps_its_loop(wrap):
    head = FunctionHead(wrap(Client()), name="client")
    for n in (2, 3):
        found = head.evaluate(batch(n))
        torch.testing.assert_close(found.values, batch(n).images.mean((1, 2, 3)))
        assert found.extra == {"prompt": [f"prompt {i}" for i in range(n)]}
    head.close()
    head.close()


@pytest.mark.parametrize("per_image", [False, True])
def test_inside_a_running_loop_it_works_too(per_image):
    threads = set()

    async def each(image, prompt):
        assert not torch.is_grad_enabled()
        threads.add(threading.current_thread())
        return 1.0

    async def together(images, prompts):
        return [await each(None, prompt) for prompt in prompts]

    head = FunctionHead(each if per_image else together, per_image=per_image)

    async def notebook():
        assert torch.is_grad_enabled()
        found = head(batch()).tolist()
        head.close()
        return found

    assert asyncio.run(notebook()) == [1.0] * 3
    assert closing(head, batch()).tolist() == [1.0] * 3  # after close, and outside of a loop
    assert threading.main_thread() not in threads


def test_a_coroutine_sees_the_callers_accelerator(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda index: chosen.append((index, threading.current_thread()))
    )

    async def one(images, prompts):
        assert chosen == [(3, threading.current_thread())]
        return [1.0] * len(prompts)

    closing(FunctionHead(one), batch())


def test_many_threads_may_share_a_head():
    async def one(image, prompt):
        await asyncio.sleep(0)
        assert not torch.is_grad_enabled()
        return float(prompt.split()[1])

    head = FunctionHead(one, per_image=True)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: head(batch(n)).tolist(), range(1, 17)))
    head.close()
    assert found == [list(range(n)) for n in range(1, 17)]


def test_after_a_failure_the_others_are_not_waited_for():
    cancelled = []

    async def f(image, prompt):
        if prompt == "prompt 0":
            try:
                await asyncio.sleep(HANG)
            except asyncio.CancelledError:
                cancelled.append(prompt)
                raise
        if prompt == "prompt 3":
            pytest.fail("began after the failure")
        raise OSError("no route")

    with pytest.raises(RewardError, match="no route") as caught:
        closing(FunctionHead(f, per_image=True, concurrency=3), batch(4))
    assert cancelled == ["prompt 0"]
    assert caught.value.samples[0] == (1, "prompt 1")


def test_a_coroutine_that_cancels_itself_is_a_failure():
    async def each(image, prompt):
        if prompt == "prompt 1":
            raise asyncio.CancelledError
        return 0.0

    async def together(images, prompts):
        raise asyncio.CancelledError

    with pytest.raises(RewardError, match="on sample #1 'prompt 1': CancelledError"):
        closing(FunctionHead(each, per_image=True), batch())
    with pytest.raises(RewardError, match="The coroutine was cancelled"):
        closing(FunctionHead(together), batch())


@pytest.mark.parametrize("in_a_loop", [False, True])
def test_control_c_ends_the_waiting(in_a_loop):
    caller, ended = threading.get_ident(), []

    async def f(image, prompt):
        if prompt == "prompt 1":
            # Until the caller waits; in its own loop it does nothing else.
            while in_a_loop and sys._current_frames()[caller].f_code.co_name != "wait":
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(HANG)
        ended.append(prompt)

    head = FunctionHead(f, per_image=True)

    async def notebook():
        return head(batch())

    # Not `asyncio.run`, whose own handling of the signal would cancel the task and wait for it.
    loop = asyncio.new_event_loop()
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(notebook()) if in_a_loop else head(batch())
    loop.close()
    head.close()
    assert not ended


def test_a_head_that_nobody_closes_leaves_no_loop_open() -> None:
    async def one(images, prompts):
        return [1.0] * len(prompts)

    FunctionHead(one)(batch(2))
    gc.collect()  # an open loop would warn here, and warnings are errors
