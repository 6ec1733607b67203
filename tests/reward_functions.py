"""Functions as rewards, blocking and async, and a batch for them."""

from __future__ import annotations

import asyncio

import torch

from rewards import FunctionHead, RewardBatch


def batch(n: int = 3, **keywords) -> RewardBatch:
    images = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return RewardBatch(prompts=[f"prompt {i}" for i in range(n)], images=images, **keywords)


def redness(image, prompt):
    assert image.shape == (3, 4, 4)
    return image[0].mean()


async def redness_async(image, prompt):
    await asyncio.sleep(0)
    return redness(image, prompt)


def closing(head: FunctionHead, *arguments) -> torch.Tensor:
    try:
        return head(*arguments)
    finally:
        head.close()
