"""The adapter beside what peft makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from casts import Casts
from sections import sd3_policy

from moa_diffusion import tiny
from moa_diffusion.policies import lora
from moa_diffusion.policies.sd3 import load_pipeline
from moa_diffusion.types import Request

PROMPTS = ['a red sign that says "GO"', "a blue circle on a white background"]


@pytest.mark.parametrize(("dtype", "tapped"), [("bfloat16", False), ("float16", True)])
def test_inputs_are_not_cast_to_float32_and_back(dtype: str, tapped: bool) -> None:
    """Where peft's forward stays, and without any effect on log-probs and gradients, to the bit."""
    policy = sd3_policy(
        load_pipeline(str(tiny.PIPELINE_PATH), dtype=dtype),
        resolution=64,
        steps=4,
        guidance=1.0,
        max_sequence_length=16,
        lora_rank=4,
    )
    policy.prepare(PROMPTS)
    for layer in policy._velocity.adapted:
        del layer.forward
    if tapped:
        policy.tapped()
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=source))
    asked = [Request(prompt=prompt, seed=i) for i, prompt in enumerate(PROMPTS)]
    rollout = policy.sample(asked, step=0)
    adapted = lora.layers(policy.transformer)
    parameters = list(policy.trainable().values())
    found = []
    for enabled in (False, True):
        for layer in adapted if enabled else ():
            layer.cast_input_dtype_enabled = True
        with Casts() as casts:
            log_probs = policy.log_probs(rollout, slice(0, 1)).log_probs
        gradients = torch.autograd.grad(log_probs.sum(), parameters, allow_unused=True)
        found.append((casts.count, log_probs, gradients))
    (few, one, mine), (many, other, peft) = found
    # An adapted layer's input was cast twice; those without B's output have no gradient.
    assert many - few >= 1.5 * len(adapted)
    assert torch.equal(one, other)
    for left, right in zip(mine, peft, strict=True):
        assert left is right is None or torch.equal(left, right)


def test_the_first_values_reseed_no_other_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` would seed those of all accelerators, which no one restores."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("all of them"))
    state = torch.get_rng_state()
    pipeline = load_pipeline(str(tiny.PIPELINE_PATH))
    options: dict[str, Any] = {"rank": 2, "alpha": 2, "target_modules": ["attn.to_q"]}
    lora.attach(pipeline.transformer, seed=3, **options)
    assert torch.equal(torch.get_rng_state(), state)
