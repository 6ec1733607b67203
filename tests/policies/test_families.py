"""Gradients of objectives on language models whose layers do not keep the samples apart."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fixed_objectives import FixedObjectives
from sections import lm_policy
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from moa_diffusion import tiny
from moa_diffusion.config.schema import GradientsConfig, LossConfig
from moa_diffusion.distributed import LocalComm
from moa_diffusion.monitoring.progress import Progress
from moa_diffusion.policies.causal_lm import CausalLMPolicy
from moa_diffusion.training.ema import EMA
from moa_diffusion.training.fused import FusedUpdate
from moa_diffusion.training.geometry import Geometry
from moa_diffusion.training.gradient_check import TOLERANCE, relative_errors
from moa_diffusion.training.gradients import ObjectiveGradients
from moa_diffusion.training.loss import Clip, surrogate_coefficients
from moa_diffusion.training.stepper import Stepper, TrainingError
from moa_diffusion.training.steps import RolloutSteps
from moa_diffusion.training.update import Probe
from moa_diffusion.types import Request, Rollout

pytestmark = [
    pytest.mark.filterwarnings(  # peft asks transformers by the old name
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    ),
    pytest.mark.filterwarnings(  # it knows dense models with the names of experts
        "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"
    ),
]
T, K, WIDTH = 6, 3, 16
PROMPTS = ["a letter to the baker", "why", "the bread"]
COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
MOE = {
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
FAMILIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    # Its two layers behind the attention get rows and tokens as one axis.
    "opt": lambda shape: OPTForCausalLM(
        OPTConfig(**COMMON, **shape, ffn_dim=24, word_embed_proj_dim=WIDTH)
    ),
    # So does its shared expert.
    "qwen2_moe": lambda shape: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**COMMON, **MOE, **shape, num_experts=4, shared_expert_intermediate_size=24)
    ),
    # Its experts are one tensor, and peft's wrapper adds the product of the factors to it.
    "deepseek_v3": lambda shape: DeepseekV3ForCausalLM(
        DeepseekV3Config(**COMMON, **MOE, **DEEPSEEK, **shape)
    ),
    "llama": lambda shape: LlamaForCausalLM(
        LlamaConfig(**COMMON, **shape, intermediate_size=24, num_key_value_heads=1)
    ),
}


def policy_on(family: str, dtype: torch.dtype = torch.float32) -> CausalLMPolicy:
    """A random model with an adapter that is not at its initial value."""
    words = AutoTokenizer.from_pretrained(tiny.LM_PATH)
    torch.manual_seed(0)
    shape = {"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    network = FAMILIES[family](shape).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    policy = lm_policy(network.to(dtype), words, lora_rank=3, max_new_tokens=T)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))
    return policy


def draw(policy: CausalLMPolicy, count: int) -> Rollout:
    asked = [Request(prompt=PROMPTS[i % 3], group=i % 3, seed=100 + i) for i in range(count)]
    return policy.sample(asked, step=0)


def coefficients_of(rollout: Rollout, *, clipped: bool) -> Tensor:
    """``[K, n, T]``; where some are clipped, tokens of a text differ in their proportions."""
    source = torch.Generator().manual_seed(2)
    advantages = torch.randn(K, len(rollout), generator=source)
    noise = 0.3 * torch.randn(rollout.log_probs.shape, generator=source)
    new = rollout.log_probs + noise if clipped else rollout.log_probs
    return surrogate_coefficients(new, rollout.log_probs, advantages, Clip(0.2)) * rollout.mask


def worst_error(policy: Any, rollout: Rollout, coefficients: Tensor, **options: Any) -> float:
    """Of the rows against K ordinary backward passes, by tensor and relative to its norm."""
    parameters = policy.trainable()
    rows = ObjectiveGradients(parameters, policy.tapped(), K, whole=policy.row_per_sample)
    rows.backward(policy.log_probs(rollout, slice(0, T)).log_probs, coefficients, **options)
    worst = 0.0
    for k in range(K):
        loss = (coefficients[k] * policy.log_probs(rollout, slice(0, T)).log_probs).sum()
        expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for found, gradient in zip(rows.rows.values(), expected, strict=True):
            if gradient is None or not gradient.any():
                assert not found[k].any()
            else:
                worst = max(worst, float((found[k] - gradient).norm() / gradient.norm()))
    assert worst > 0, "two ways of adding up round differently"
    return worst


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("family", ["opt", "qwen2_moe", "deepseek_v3"])
def test_rows_are_those_of_separate_passes(family: str, clipped: bool) -> None:
    policy = policy_on(family)
    rollout = draw(policy, 3)
    coefficients = coefficients_of(rollout, clipped=clipped)
    # Sums of some hundred float32 products in another order: a few 1e-7, measured up to 3e-6.
    tokens = policy.row_tokens(rollout)
    assert worst_error(policy, rollout, coefficients, tokens=tokens) < 3e-5


def test_without_the_number_of_tokens_flattened_layers_are_differentiated_separately() -> None:
    policy = policy_on("opt")
    rollout = draw(policy, 3)
    # As above.
    assert worst_error(policy, rollout, coefficients_of(rollout, clipped=False)) < 3e-5


@pytest.mark.parametrize(
    ("family", "separate"),
    [("opt", set()), ("deepseek_v3", {"experts"}), ("llama", set())],
)
def test_only_what_cannot_be_told_apart_takes_separate_passes(
    family: str, separate: set[str]
) -> None:
    policy = policy_on(family)
    rollout = draw(policy, 3)
    coefficients = coefficients_of(rollout, clipped=False)
    rows = ObjectiveGradients(policy.trainable(), policy.tapped(), K, whole=True)
    log_probs = policy.log_probs(rollout, slice(0, T)).log_probs
    passes: list[int] = []
    log_probs.register_hook(lambda gradient: passes.append(1))
    rows.backward(log_probs, coefficients, tokens=policy.row_tokens(rollout))
    assert {name.split(".")[4] for name in rows.separate} == separate
    assert len(passes) == (1 + K if separate else 1)


# ---------------------------------------------------------------- the check at a run's start


def steps_of(policy: Any) -> RolloutSteps:
    return RolloutSteps(
        policy=policy,
        stepper=Stepper(
            policy=policy,
            optimizer=torch.optim.SGD(policy.trainable().values(), lr=0.1),
            lr=lambda count: 0.1,
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            ema=EMA(policy.trainable(), decay=0.9, every=1),
            max_grad_norm=1.0,
            max_skipped=3,
        ),
        geometry=Geometry.solve(
            groups=2,
            group_size=2,
            updates=1,
            world_size=1,
            max_sample_batch=4,
            max_micro_batch=4,
        ),
        settings=LossConfig(clip_range=0.2, ratio_tolerance=1e-4),
        progress=Progress(LocalComm(), bars=False),
        seed=0,
    )


def measurer(policy: Any, mode: str, advantages: Tensor) -> Callable[[Rollout], object]:
    """What measures the objectives' gradients on a rollout, in one of two ways."""
    if mode == "probe":
        probe = Probe(steps_of(policy), GradientsConfig(share=0.5))
        return lambda rollout: probe.measure(rollout, advantages)
    objectives: Any = FixedObjectives(advantages, lambda _: torch.ones(2))
    update = FusedUpdate(steps_of(policy))
    return lambda rollout: update.improve(rollout, objectives)


def by_token(layer: Any) -> None:
    """Have a layer take rows and tokens as one axis, but token by token."""
    forward = layer.forward

    def turned(x: Tensor) -> Tensor:
        flat = x.transpose(0, 1).flatten(0, 1)  # [L n, D]
        return forward(flat).unflatten(0, (x.shape[1], len(x))).transpose(0, 1)

    layer.forward = turned
    layer.forward.record = None


@pytest.mark.parametrize("mode", ["fused", "probe"])
def test_a_layer_with_another_order_of_samples_stops_the_run(mode: str) -> None:
    policy = policy_on("llama")
    attention = policy.model.model.layers[1].self_attn
    taps = policy.tapped()
    by_token(attention.v_proj)
    policy.tapped = lambda: taps  # the layer's product is as it was
    rollout, advantages = draw(policy, 4), torch.randn(2, 4)
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    with pytest.raises(TrainingError, match=r"wrong in 2 of .*layers\.1\.self_attn\.v_proj\.") as e:
        measurer(policy, mode, advantages)(rollout)
    assert "policy.lora.target_modules" in str(e.value)
    assert "k_proj" not in str(e.value)
    for name, parameter in policy.trainable().items():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("mode", ["fused", "probe"])
def test_the_check_is_made_once_and_says_what_takes_long(
    mode: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, calls = policy_on("deepseek_v3"), []
    monkeypatch.setattr(
        "moa_diffusion.training.gradient_check.relative_errors",
        lambda *given, **options: calls.append(1) or relative_errors(*given, **options),
    )
    measure, rollout = measurer(policy, mode, torch.randn(2, 4)), draw(policy, 4)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            measure(rollout)
    assert len(calls) == 1
    assert caplog.text.count("take a backward pass for each objective") == 1


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_families_pass_the_check_with_room_to_spare(family: str, dtype: torch.dtype) -> None:
    """Also at the start, where B is 0."""
    policy = policy_on(family, dtype)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if ".lora_B." in name:
                parameter.zero_()
    errors, _ = relative_errors(policy, draw(policy, 4), seed=0, comm=LocalComm())
    assert 0 < max(errors.values()) < 0.5 * TOLERANCE[dtype]


class Routed(nn.Module):
    """Two experts, of which a token's own content chooses one."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        flat, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        chosen = (flat.sum(1) > 0).long()
        for i, expert in enumerate((self.low, self.high)):
            (index,) = (chosen == i).nonzero(as_tuple=True)
            out = out.index_add(0, index, expert(flat[index]))
        return out.view_as(x)


def test_experts_that_get_some_of_the_tokens_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    made = FAMILIES["llama"]

    def routed(shape: dict[str, Any]) -> Any:
        network = made(shape)
        for layer in network.model.layers:
            layer.mlp = Routed()
        return network

    monkeypatch.setitem(FAMILIES, "llama", routed)
    policy = policy_on("llama")
    for count in (1, 3):
        rollout = draw(policy, count)
        coefficients = coefficients_of(rollout, clipped=True)
        tokens = policy.row_tokens(rollout)
        # As above.
        assert worst_error(policy, rollout, coefficients, tokens=tokens) < 3e-5
    errors, separate = relative_errors(policy, rollout, seed=0, comm=LocalComm())
    assert max(errors.values()) < TOLERANCE[torch.float32]
    assert separate == 2 * 2 * 2, "layers, experts and factors"
