"""Compiled blocks against the same blocks as they are: to the bit, where the kernels are the same.

The backend ``aot_eager`` traces, differentiates and cuts graphs as inductor does, and then calls
the kernels of eager mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from sections import sd3_policy
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks.pipelines import SMALLEST, random_pipeline
from moa_diffusion.config import Config
from moa_diffusion.config.check import check_together
from moa_diffusion.config.schema import PolicyConfig
from moa_diffusion.policies.forward import MergedForward
from moa_diffusion.policies.lora import layers
from moa_diffusion.policies.sd3 import SD3Policy
from moa_diffusion.policies.sd3.compiled import GRAPHS, compile_blocks
from moa_diffusion.training.gradients import ObjectiveGradients
from moa_diffusion.types import ConfigError, Request

PROMPTS = ["a red circle", "a blue circle"]
pytestmark = pytest.mark.filterwarnings(  # torch hides it, but where warnings are errors
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed:UserWarning"
)


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """Graphs, and the settings of the process, go with the test."""
    torch.compiler.set_default_backend("aot_eager")
    counters.clear()
    dynamo, functorch = torch._dynamo.config, torch._functorch.config
    with dynamo.patch(recompile_limit=8), functorch.patch(donated_buffer=True):
        yield
    torch.compiler.set_default_backend(None)
    torch.compiler.reset()


def move(parameters: Any, seed: int) -> None:
    """A step of an optimizer."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=source))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def policy_on(dtype: torch.dtype, *, blocks: int = 1, **options: Any) -> SD3Policy:
    """Random weights, and an adapter that is away from its start."""
    shape = {**SMALLEST.transformer, "num_layers": blocks, "sample_size": 8}
    shape |= {"pos_embed_max_size": 4, "dual_attention_layers": (0,) if blocks > 2 else ()}
    policy = sd3_policy(
        random_pipeline(replace(SMALLEST, transformer=shape), dtype=dtype),
        resolution=16,
        steps=3,
        guidance=1.0,
        max_sequence_length=16,
        lora_rank=4,
        target_modules=["attn.to_q", "attn.add_v_proj"],  # each takes its time to be traced
        **options,
    )
    policy.prepare(PROMPTS)
    move(policy.trainable().values(), 1)
    return policy


def passes(policy: SD3Policy, *, with_kl: bool) -> Iterator[Tensor]:
    """What sampling and each kind of update give, the adapter moved in between."""
    parameters = list(policy.trainable().values())
    requests = [Request(prompt=prompt, seed=i) for i, prompt in enumerate(PROMPTS)]
    coefficients = torch.tensor([[[1.0], [0.5]], [[-1.0], [1.0]]])
    for step in range(2):
        rollout = policy.sample(requests, step=step)
        yield rollout.images
        log_probs, kl, *_ = policy.log_probs(rollout, slice(0, 1), with_kl=with_kl)
        assert torch.equal(log_probs.detach(), rollout.log_probs[:, :1])
        if kl is not None:
            yield flat(torch.autograd.grad(kl.sum(), parameters, retain_graph=True))
        rows = ObjectiveGradients.of(policy, 2)
        rows.backward(log_probs, coefficients, retain_graph=True)
        assert rows.separate == set()
        assert all(parameter.grad is None for parameter in parameters)
        yield rows._flat.float()
        weighted = (coefficients.sum(0) * log_probs).sum()
        yield flat(torch.autograd.grad(weighted, parameters))
        move(parameters, step)


@pytest.mark.parametrize(
    ("dtype", "options", "graphs"),
    [  # of the one block: sampling, training and the reference
        (torch.float32, {}, 3),
        (torch.bfloat16, {"gradient_checkpointing": True}, 2),
    ],
)
def test_sampling_and_updates_are_those_of_eager_mode(
    dtype: torch.dtype, options: dict[str, Any], graphs: int
) -> None:
    with_kl = dtype == torch.float32
    plain, compiled = (
        passes(policy_on(dtype, compile=how, **options), with_kl=with_kl)
        for how in ("off", "blocks")
    )
    for expected, found in zip(plain, compiled, strict=True):
        assert torch.equal(found, expected)
        assert expected.norm() > 0
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == graphs
    assert torch._dynamo.config.recompile_limit == GRAPHS


def test_blocks_of_a_kind_share_their_graphs() -> None:
    torch.compiler.set_default_backend("eager")
    policy = policy_on(torch.float32, blocks=4, compile="blocks")
    policy.generate([Request(prompt=PROMPTS[0], seed=0)])
    assert counters["stats"]["unique_graphs"] == 3  # with two attentions, with one, and the last


def test_layers_record_that_were_compiled_before_and_for_any_number_of_samples() -> None:
    """By inductor: a graph for the first number, and one for all others."""
    torch.compiler.set_default_backend("inductor")
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8))
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0", "1"], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    own = [MergedForward(layer) for layer in layers(model)]
    for layer, forward in zip(layers(model), own, strict=True):
        layer.forward = forward.__call__
    compile_blocks([model])
    for count in (4, 5, 6):
        move(parameters, count)
        x = torch.randn(count, 7, 12, generator=torch.Generator().manual_seed(count))
        expected = torch.autograd.grad(nn.Sequential.forward(model, x).sum(), parameters)
        for forward in own:
            forward.refresh()
        y = model(x).sum()
        ordinary = torch.autograd.grad(y, parameters, retain_graph=True)
        found: dict[int, Tensor] = {}
        for forward in own:
            forward.record = lambda weight, left, right, found=found: found.update(
                {id(weight): left.flatten(0, 1).T @ right.flatten(0, 1)}
            )
        nothing = torch.autograd.grad(y, parameters)
        for forward in own:
            forward.record = None
        for i, parameter in enumerate(parameters):
            # Sums of up to 42 products of float32, of about 1 each: 32 eps.
            torch.testing.assert_close(ordinary[i], expected[i], rtol=1e-5, atol=4e-6)
            torch.testing.assert_close(found[id(parameter)], expected[i], rtol=1e-5, atol=4e-6)
            assert not nothing[i].any()
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == 2


def settings_with(**policy: Any) -> Config:
    found = Config(rewards={"ocr": {"weight": 1.0}}, policy=PolicyConfig(**policy))
    found.evaluation.every = 0
    return found


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"name": "causal_lm"}, "should be off for policy.name causal_lm: only transformers of"),
        ({"shard": True}, "should be off with policy.shard and policy.dtype float32: .* bfloat16"),
    ],
)
def test_what_cannot_be_compiled_is_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"policy\.compile: {complaint}.*Found 'blocks'"):
        check_together(settings_with(compile="blocks", **options))
    check_together(settings_with(compile="off", **options))


def test_half_precision_is_compiled_where_it_is_split() -> None:
    check_together(settings_with(compile="blocks", shard=True, dtype="bfloat16"))
