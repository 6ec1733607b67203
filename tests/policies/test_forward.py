"""The forward passes of our own against those of peft and diffusers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from casts import Casts
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.normalization import RMSNorm
from peft import LoraConfig, inject_adapter_in_model
from sections import sd3_policy
from torch import Tensor, nn

from moa_diffusion import tiny
from moa_diffusion.policies.forward import AddedForward, MergedForward
from moa_diffusion.policies.lora import disabled, layers, own_forward
from moa_diffusion.policies.sd3 import SD3Policy, check_fit, load_pipeline
from moa_diffusion.policies.sd3.attention import JointAttention
from moa_diffusion.types import Request, Rollout

PROMPTS = ['a red sign that says "GO"', "a blue circle on a white background"]
HALF = [torch.float16, torch.bfloat16]
KINDS = [torch.float32, *HALF]


def adapted(
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    seed: int = 0,
    widths: tuple[int, int, int] = (12, 20, 8),
) -> nn.Module:
    """Two layers with peft's forward, of numbers that the type holds."""
    torch.manual_seed(seed)
    first, second = (nn.Linear(n, m, bias=bias) for n, m in pairwise(widths))
    model = nn.Sequential(first, nn.Tanh(), second)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        parameter.data = parameter.data.to(dtype)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    for layer in layers(model):
        layer.cast_input_dtype_enabled = False
    return model


def ours(model: nn.Module) -> nn.Module:
    found = copy.deepcopy(model)
    for layer in layers(found):
        merges = layer.base_layer.weight.dtype == torch.float32
        layer.forward = (MergedForward if merges else AddedForward)(layer).__call__
    return found


def run(model: Any, x: Tensor) -> Tensor:
    dtype = model[0].base_layer.weight.dtype
    with torch.autocast("cpu", dtype=dtype, enabled=dtype in HALF):
        y: Tensor = model(x)
    return y


def gradients(model: nn.Module, x: Tensor) -> dict[str, Any]:
    model.zero_grad()
    run(model, x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 12), (2, 7, 12)])
def test_output_and_gradients_are_those_of_peft(bias: bool, shape: tuple[int, ...]) -> None:
    model = adapted(bias=bias)
    merged = ours(model)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    # Outputs of about 1 are sums of 16 products of float32, cut otherwise: 2.4e-7 apart; 32 eps.
    torch.testing.assert_close(merged(x), model(x), rtol=1e-5, atol=4e-6)
    with torch.no_grad():
        assert torch.equal(merged(x), merged(x))
    expected, found = gradients(model, x), gradients(merged, x)
    assert expected.keys() == found.keys()
    # Gradients of up to 10 are sums over two layers and 14 rows: 2.4e-6 apart.
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    input_gradient = torch.autograd.grad(model(x).sum(), x)[0]
    torch.testing.assert_close(
        torch.autograd.grad(merged(x).sum(), x)[0], input_gradient, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(132, 64), (4, 33, 64)])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_rounds_no_more_than_in_peft(
    dtype: torch.dtype, shape: tuple[int, ...], bias: bool
) -> None:
    """Against float64, over four models: .83 of peft's error in the output, .92 in gradients."""
    errors = torch.zeros(2, 3)
    for seed in range(4):
        model = adapted(dtype, bias=bias, seed=seed, widths=(64, 96, 48))
        start, weights = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], 48)
        found = []
        for one in (copy.deepcopy(model).double(), model, ours(model)):
            x = start.to(one[0].lora_A["default"].weight.dtype).requires_grad_()
            parameters = [p for p in one.parameters() if p.requires_grad]
            y = run(one, x)
            grads = torch.autograd.grad((weights * y).sum(), [x, *parameters])
            found.append([t.detach().double() for t in (y, *grads)])
        exact, *half = found
        for i, values in enumerate(half):
            each = [(a - b).norm() / b.norm() for a, b in zip(values, exact, strict=True)]
            errors[i] += torch.stack([*each[:2], sum(each[2:])])
    peft, own = errors
    assert (own <= peft).all(), own / peft


@pytest.mark.parametrize("dtype", KINDS)
def test_training_and_sampling_passes_agree_to_the_bit(dtype: torch.dtype) -> None:
    model, x = ours(adapted(dtype)), torch.randn(4, 12)
    with torch.no_grad():
        sampled = run(model, x)
    assert torch.equal(run(model, x).detach(), sampled)


@pytest.mark.parametrize("dtype", KINDS)
def test_every_change_of_the_adapter_is_seen(dtype: torch.dtype) -> None:
    model = adapted(dtype)
    own, x = ours(model), torch.randn(4, 12)
    run(own, x)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.1)
        for m in (model, own)
    ]
    for m, optimizer in zip((model, own), optimizers, strict=True):
        gradients(m, x)
        optimizer.step()
    # Adam's first step has the length lr whatever the gradient's, so only its sign could show
    # rounding; outputs differ as above, in half precision by some eps of about 3.
    rtol = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(run(own, x), run(model, x), rtol=rtol, atol=max(1e-5, rtol / 4) * 4)
    before = run(own, x).detach()
    with torch.no_grad():
        for parameter in own.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.zeros_like(parameter))
    assert not torch.equal(run(own, x), before)


@pytest.mark.parametrize("dtype", KINDS)
def test_switched_off_it_is_the_base_model(dtype: torch.dtype) -> None:
    own, x = ours(adapted(dtype)), torch.randn(4, 12)
    base = nn.Sequential(own[0].base_layer, nn.Tanh(), own[2].base_layer)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype in HALF):
        expected = base(x)
        with disabled(layers(own)):
            assert torch.equal(own(x), expected)
        assert not torch.equal(own(x), expected)


@pytest.mark.parametrize("dtype", HALF)
def test_a_new_adapter_changes_no_bit(dtype: torch.dtype) -> None:
    own, x = ours(adapted(dtype)), torch.randn(4, 12)
    with torch.no_grad():
        for layer in layers(own):
            layer.lora_B["default"].weight.zero_()
    with disabled(layers(own)):
        expected = run(own, x)
    assert torch.equal(run(own, x), expected)


@pytest.mark.parametrize("dtype", KINDS)
def test_passes_in_flight_know_nothing_of_each_other(dtype: torch.dtype) -> None:
    """Each has the gradient of the factors that it was computed with."""
    own, x = ours(adapted(dtype)), torch.randn(2, 4, 12)
    parameters = [p for p in own.parameters() if p.requires_grad]
    alone = torch.autograd.grad(run(own, x[0]).sum(), parameters)
    first = run(own, x[0]).sum()
    run(own, x[1])
    own[0](x[1])
    together = torch.autograd.grad(first, parameters)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype", KINDS)
def test_what_is_handed_over_makes_the_gradients(dtype: torch.dtype) -> None:
    own, x = ours(adapted(dtype)), torch.randn(3, 5, 12)
    layer = own_forward(own[0])
    expected = gradients(own, x)
    found: dict[int, Tensor] = {}

    def record(weight: Tensor, left: Tensor, right: Tensor) -> None:
        assert left.dtype == right.dtype == dtype
        assert left.shape[:-1] == right.shape[:-1] == (3, 5)
        found[id(weight)] = (left.flatten(0, 1).double().T @ right.flatten(0, 1).double()).float()

    layer.record = record
    torch.autograd.backward(run(own, x).square().sum(), inputs=list(layer.leaves))
    for weight, name in zip(layer.weights, ("A", "B"), strict=True):
        gradient = expected[f"0.lora_{name}.default.weight"]
        # Sums of 15 products, rounded once in half precision.
        error = (found[id(weight)] - gradient).norm() / gradient.norm()
        assert error < 4 * torch.finfo(dtype).eps


def test_other_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"type torch.float32. Found torch.bfloat16"):
        MergedForward(layers(adapted(torch.bfloat16))[0])
    with pytest.raises(ValueError, match=r"torch.float16 or torch.bfloat16. Found torch.float32"):
        AddedForward(layers(adapted())[0])


# ---------------------------------------------------------------- in a transformer


def policy_in(dtype: torch.dtype, *, libraries: bool = False, **options: Any) -> SD3Policy:
    """The shipped model, away from the start; with the forward passes of peft and diffusers."""
    policy = sd3_policy(
        load_pipeline(str(tiny.PIPELINE_PATH), dtype=str(dtype).removeprefix("torch.")),
        **({"resolution": 64, "steps": 4, "guidance": 1.0} | options),
        max_sequence_length=16,
        lora_rank=4,
    )
    policy.prepare(PROMPTS)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=source))
    if libraries:
        for layer in policy._velocity.adapted:
            del layer.forward
        for module in policy.transformer.modules():
            if isinstance(module, Attention):
                module.forward = partial(JointAttnProcessor2_0(), module)
    return policy


def drawn(policy: SD3Policy) -> Rollout:
    return policy.sample([Request(prompt=p, seed=i) for i, p in enumerate(PROMPTS)], step=0)


def learned(policy: SD3Policy, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Log-probs and all gradients."""
    log_probs = policy.log_probs(rollout, slice(0, 3)).log_probs
    parameters = list(policy.trainable().values())
    found = torch.autograd.grad(log_probs.sum(), parameters, materialize_grads=True)
    return log_probs.detach(), torch.cat([t.flatten() for t in found])


@pytest.mark.parametrize("dtype", HALF)
def test_a_transformer_in_half_precision_rounds_as_by_the_libraries(
    dtype: torch.dtype,
) -> None:
    policy = policy_in(dtype)
    rollout = drawn(policy)
    exact = policy_in(torch.float32)
    with torch.no_grad():  # the numbers of the half-precision model
        for mine, theirs in zip(
            exact.transformer.parameters(), policy.transformer.parameters(), strict=True
        ):
            mine.copy_(theirs)
    expected = learned(exact, rollout)
    found = [learned(one, rollout) for one in (policy, policy_in(dtype, libraries=True))]
    own, library = (
        [(a - b).norm() / b.norm() for a, b in zip(values, expected, strict=True)]
        for values in found
    )
    # Errors that differ by chance: the quotient was .93 to 1.09 on eight other pairs of prompts.
    assert own[1] <= 1.2 * library[1]


@pytest.mark.parametrize("dtype", HALF)
def test_log_probs_are_those_of_sampling_to_the_bit(dtype: torch.dtype) -> None:
    """With checkpointing too, and then gradients are those without."""
    policies = [policy_in(dtype, gradient_checkpointing=each) for each in (False, True)]
    rollout = drawn(policies[0])
    for policy in policies:
        for i in range(3):
            log_probs = policy.log_probs(rollout, slice(i, i + 1)).log_probs
            assert torch.equal(log_probs, rollout.log_probs[:, i : i + 1])
    without, checkpointed = (learned(policy, rollout)[1] for policy in policies)
    assert torch.equal(checkpointed, without)


def kept_bytes(policy: SD3Policy, call: Callable[[], object]) -> tuple[int, int]:
    """Conversions of a call, and bytes that it keeps for the backward pass, weights aside."""
    own = [*policy.transformer.parameters()]
    for layer in policy._velocity.adapted:
        forward = own_forward(layer)
        own += forward._factors if isinstance(forward, AddedForward) else ()
    weights = {t.untyped_storage().data_ptr() for t in own}
    kept: dict[int, int] = {}
    tensors = []  # so that no storage takes the place of another

    def keep(t: Tensor) -> Tensor:
        if (place := t.untyped_storage().data_ptr()) not in weights:
            kept[place] = t.untyped_storage().nbytes()
            tensors.append(t)
        return t

    with Casts() as casts, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call()
    return casts.count, sum(kept.values())


@pytest.mark.parametrize("dtype", HALF)
def test_factors_are_cast_once_per_update(dtype: torch.dtype) -> None:
    own, library = policy_in(dtype), policy_in(dtype, libraries=True)
    rollout = drawn(own)
    found, expected = (
        kept_bytes(policy, lambda policy=policy: policy.log_probs(rollout, slice(0, 1)))
        for policy in (own, library)
    )
    assert expected[0] - found[0] == 2 * len(own._velocity.adapted)
    assert found[1] < expected[1]


@pytest.mark.parametrize("dtype", HALF)
def test_an_input_is_cast_and_kept_once_for_queries_keys_and_values(dtype: torch.dtype) -> None:
    """A GPU's autocast hands float32 to attention; the CPU's norms leave half precision."""
    own, library = policy_in(dtype), policy_in(dtype, libraries=True)
    found = []
    for policy in (own, library):
        attn = policy.transformer.transformer_blocks[0].attn
        image, text = (torch.randn(2, n, attn.to_q.in_features) for n in (16, 5))
        with torch.autocast("cpu", dtype=dtype):
            attn(image, encoder_hidden_states=text)  # from here on, A and B are there
            found.append(kept_bytes(policy, partial(attn, image, encoder_hidden_states=text)))
    (casts, kept), (many, most) = found
    inputs = image.numel() + text.numel()
    assert many - casts == 2 * (6 - 1)  # by W and A of three layers
    assert most - kept >= 2 * 2 * inputs  # two more of either, of two bytes a number


def attended(attend: Any, module: Any, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The outputs for random tokens, and the gradients of these."""
    source, width = torch.Generator().manual_seed(0), module.to_q.in_features
    both = module.add_q_proj is not None
    tokens = [
        torch.randn(2, n, width, generator=source).to(dtype).requires_grad_()
        for n in ((16, 5) if both else (16,))
    ]
    with torch.autocast("cpu", dtype=dtype, enabled=dtype in HALF):
        outputs = attend(module, *tokens)
    outputs = outputs if both else (outputs,)
    loss = sum(output.float().square().sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, tokens)]


@pytest.mark.parametrize("name", ["native", "_native_math"])
def test_attention_is_that_of_diffusers(name: str) -> None:
    """To the bit for the default; another kernel is used, and rounds otherwise."""
    policy = policy_in(torch.float32)
    kinds, equal = set(), []
    for module in policy.transformer.modules():
        if isinstance(module, Attention):
            kinds.add((module.add_q_proj is None, module.context_pre_only))
            expected = attended(JointAttnProcessor2_0(), module)
            found = attended(JointAttention(name), module)
            for one, other in zip(found, expected, strict=True):
                equal.append(torch.equal(one, other))
                # Sums of some 100 terms in float32, of the size of the largest output or gradient:
                # 16 eps. On three instruction sets up to 6 eps were seen.
                assert (one - other).abs().max() <= 16 * 1.2e-7 * other.abs().max()
    assert len(kinds) > 1
    assert all(equal) == (name == "native")


@pytest.mark.parametrize("dtype", HALF)
def test_norms_of_queries_and_keys_round_and_keep_less(dtype: torch.dtype) -> None:
    """By .71 of diffusers' error, .58 in gradients; a GPU's kernel keeps half of this once more."""
    norm = RMSNorm(64, eps=1e-6)
    torch.nn.init.normal_(norm.weight, mean=1, std=0.3)
    norm = norm.to(dtype).requires_grad_(False)
    attend = JointAttention()
    x = (3 * torch.randn(2, 50, 4, 64)).to(dtype).requires_grad_()
    w = torch.randn(x.shape).to(dtype)
    exact = x.detach().double().requires_grad_()
    y = nn.functional.rms_norm(exact, (64,), norm.weight.double(), norm.eps)
    expected = y.detach(), torch.autograd.grad(y, exact, w.double())[0]
    errors, kept = [], []
    for normed in (partial(attend._normed, norm), norm):
        sizes: dict[int, Tensor] = {}

        def keep(t: Tensor, sizes: dict[int, Tensor] = sizes) -> Tensor:
            sizes[t.data_ptr()] = t
            return t

        with (
            torch.autocast("cpu", dtype=dtype),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        ):
            y = normed(x)
        assert y.dtype == dtype
        kept.append(sum(t.nbytes for t in sizes.values()))
        pairs = zip((y.detach(), torch.autograd.grad(y, x, w)[0]), expected, strict=True)
        errors.append([float((a - b).norm() / b.norm()) for a, b in pairs])
    own, library = errors
    assert all(a < 0.8 * b for a, b in zip(own, library, strict=True))
    assert kept[0] <= 0.7 * kept[1]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("flash_5", r"_native_flash.*, native.* Found 'flash_5'\.$"),
        ("flash", r"Found 'flash': .*install `flash-attn"),
        ("sage", r"can train .*Found 'sage'\.$"),
    ],
)
def test_a_backend_that_is_not_there_is_refused_before_weights_are_read(
    name: str, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_fit(
            str(tiny.PIPELINE_PATH),
            revision=None,
            resolutions={"sampling.resolution": 64},
            target_modules=None,
            attention=name,
        )


def test_a_backend_without_a_backward_pass_is_noticed() -> None:
    policy = policy_in(torch.float32)
    attend, module = JointAttention(), policy.transformer.transformer_blocks[0].attn
    kernel = attend._attend
    attend._attend = lambda q, k, v: kernel(q, k, v).detach()
    with torch.no_grad():
        attend(module, torch.randn(1, 4, module.to_q.in_features))
    with pytest.raises(RuntimeError, match="'native' has no backward pass"):
        attended(attend, module)


def test_another_processor_is_refused() -> None:
    pipeline = load_pipeline(str(tiny.PIPELINE_PATH))
    pipeline.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="Found FusedJointAttnProcessor2_0"):
        sd3_policy(pipeline, resolution=64, steps=4, max_sequence_length=16, lora_rank=4)
