"""The gradients of K objectives from one backward pass against K separate ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from sections import sd3_policy
from torch import Tensor, nn

from benchmarks import gradients as benchmark
from benchmarks import tables
from benchmarks.pipelines import SMALLEST, random_pipeline
from moa_diffusion import tiny
from moa_diffusion.distributed import LocalComm
from moa_diffusion.policies import lora
from moa_diffusion.policies.forward import MergedForward
from moa_diffusion.policies.sd3 import SD3Policy, load_pipeline
from moa_diffusion.policies.toy import ToyPolicy
from moa_diffusion.training import gradients
from moa_diffusion.training.gradients import ObjectiveGradients
from moa_diffusion.types import Request, Rollout

PROMPTS = ['a red sign that says "GO"', "a blue circle on a white background"]
SMALL = {"resolution": 16, "steps": 4, "max_sequence_length": 16, "lora_rank": 4}
# 16 tokens of an image and 32 of its prompt; a block of each kind: with the second attention, and
# the last one.
SIZES = replace(
    SMALLEST,
    transformer={**SMALLEST.transformer, "sample_size": 8, "pos_embed_max_size": 4},
)
# Relative, of a tensor's norm. The sums that are cut otherwise have up to about 10^4 terms (samples
# times tokens), so rounding in another order is some 100 times float32's eps.
EXACT = 256 * torch.finfo(torch.float32).eps
K = 3
Rows = dict[str, Tensor]


class Ranks(LocalComm):
    """As if other processes had ``others`` where this one has its tensors."""

    def __init__(self, others: Sequence[Tensor]) -> None:
        self.others, self.messages = others, 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        self.messages += 1
        for tensor, other in zip(tensors, self.others, strict=True):
            tensor += other


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return random_pipeline(SIZES)


def pipeline_in(dtype: str) -> Any:
    return random_pipeline(SIZES, dtype=getattr(torch, dtype))


@pytest.fixture(scope="module")
def wide() -> Any:
    """Two layers of width 1024."""
    heads = {"num_attention_heads": 16, "caption_projection_dim": 1024}
    return random_pipeline(replace(SIZES, transformer={**SIZES.transformer, **heads}))


def requests(count: int) -> list[Request]:
    return [
        Request(prompt=PROMPTS[i % 2], group=i % 2, sibling=i // 2, seed=100 + i)
        for i in range(count)
    ]


def policy_on(pipeline: Any, **options: Any) -> SD3Policy:
    """A policy whose adapter is not at its initial value, where A has no gradient."""
    policy = sd3_policy(copy.deepcopy(pipeline), **(SMALL | options))
    policy.prepare(PROMPTS)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=source))
    return policy


def adapted(dtype: torch.dtype = torch.float32) -> nn.Module:
    """One linear layer with an adapter that keeps peft's forward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh()).to(dtype)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model


def made(model: nn.Module) -> ObjectiveGradients:
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return ObjectiveGradients(parameters, lora.tapped(lora.layers(model)), K)


def random_coefficients(samples: int, decisions: int) -> Tensor:
    """Of either sign, with decisions that one objective or all of them leave out."""
    drawn = torch.randn(K, samples, decisions, generator=torch.Generator().manual_seed(2))
    drawn[0, 0, 0] = 0
    drawn[:, -1, -1] = 0
    return drawn


def separately(policy: Any, rollout: Rollout, coefficients: Tensor) -> Rows:
    """K ordinary backward passes on the whole rollout, one decision's column at a time."""
    parameters = policy.trainable()
    rows = {name: torch.zeros(K, *p.shape) for name, p in parameters.items()}
    for t in range(coefficients.shape[2]):
        log_probs = policy.log_probs(rollout, slice(t, t + 1)).log_probs
        for k in range(K):
            loss = (coefficients[k, :, t : t + 1] * log_probs).sum()
            found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
            for name, gradient in zip(parameters, found, strict=True):
                rows[name][k] += gradient
    return rows


def together(
    policy: Any, rollout: Rollout, coefficients: Tensor, *, micro: int = 4, **options: Any
) -> ObjectiveGradients:
    """As an update accumulates them."""
    found = ObjectiveGradients(policy.trainable(), policy.tapped(), K, copies=policy.row_copies)
    for index in torch.arange(len(rollout)).split(micro):
        part = rollout.select(index)
        for steps in policy.step_chunks(rollout.log_probs.shape[1]):
            log_probs = policy.log_probs(part, steps).log_probs
            found.backward(log_probs, coefficients[:, index][:, :, steps], **options)
    return found


def assert_close(found: Rows, expected: Rows, tolerance: float = EXACT) -> None:
    """By tensor and objective, relative to the norm."""
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        error, size = (t.flatten(1).norm(dim=1) for t in (found[name] - rows, rows))
        assert (error <= tolerance * size).all(), (name, error / size)
    # In its last block the transformer throws away what the text's queries found.
    unused = {name for name, rows in expected.items() if not rows.any()}
    assert all(".add_q_proj." in name for name in unused)
    assert len(unused) <= 2 < len(expected) or len(expected) == 1


# ---------------------------------------------------------------- against K backward passes


@pytest.fixture(scope="module", params=[1.0, 4.5])
def apart(request: pytest.FixtureRequest, pipeline: Any) -> tuple[float, Rollout, Rows]:
    """A guidance, a rollout, and its rows."""
    policy = policy_on(pipeline, guidance=request.param)
    rollout = policy.sample(requests(4), step=0)
    return request.param, rollout, separately(policy, rollout, random_coefficients(4, 3))


@pytest.mark.parametrize(
    ("step_batch", "checkpointing", "micro"),
    [(1, False, 4), (3, True, 4), (1, True, 2), (3, False, 2)],  # each pair of values once
)
def test_rows_are_those_of_separate_passes(
    pipeline: Any,
    apart: tuple[float, Rollout, Rows],
    step_batch: int,
    checkpointing: bool,
    micro: int,
) -> None:
    guidance, rollout, expected = apart
    options: dict[str, Any] = {"guidance": guidance, "step_batch": step_batch}
    policy = policy_on(pipeline, gradient_checkpointing=checkpointing, **options)
    found = together(policy, rollout, random_coefficients(4, 3), micro=micro)
    assert_close(found.rows, expected)
    assert all(p.grad is None for p in policy.trainable().values())


@pytest.mark.parametrize("limit", ["few tokens", "chunks"])
def test_both_contractions_are_exact_in_chunks_too(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(gradients, "CHUNK", 5000)  # a few rows
    if limit == "few tokens":
        monkeypatch.setattr(gradients, "FEW_TOKENS", 10**6)
    policy = policy_on(pipeline, step_batch=3)
    rollout = policy.sample(requests(4), step=0)
    coefficients = random_coefficients(4, 3)
    found = together(policy, rollout, coefficients)
    assert_close(found.rows, separately(policy, rollout, coefficients))


def test_a_layer_without_a_token_axis_is_exact(pipeline: Any) -> None:
    targets = ["attn.to_q", "norm1.linear", "ff.net.2"]
    policy = policy_on(pipeline, target_modules=targets)
    rollout = policy.sample(requests(4), step=0)
    coefficients = random_coefficients(4, 3)
    found = together(policy, rollout, coefficients)
    assert_close(found.rows, separately(policy, rollout, coefficients))


def test_wide_layers_are_exact(wide: Any) -> None:
    options = {"lora_rank": 8, "steps": 3}
    policy = policy_on(wide, **options)
    assert policy.transformer.inner_dim == 1024
    rollout = policy.sample(requests(2), step=0)
    coefficients = random_coefficients(2, 2)
    expected = separately(policy, rollout, coefficients)
    assert_close(together(policy, rollout, coefficients).rows, expected)


def test_under_autocast_the_error_is_that_of_bfloat16() -> None:
    # The shipped one: how far single tensors are off depends on the weights.
    full, half = (load_pipeline(str(tiny.PIPELINE_PATH), dtype=d) for d in ("float32", "bfloat16"))
    options: dict[str, Any] = {"step_batch": 3, "resolution": 64}
    policy, full = policy_on(half, **options), policy_on(full, **options)
    rollout = policy.sample(requests(2), step=0)
    coefficients = random_coefficients(2, 3)
    exact = separately(full, rollout, coefficients)
    ordinary = separately(policy, rollout, coefficients)

    def error(rows: Rows) -> float:
        """Over all tensors together: single ones can be small, and all rounding."""
        difference = sum(float((rows[name] - exact[name]).square().sum()) for name in exact)
        return (difference / sum(float(t.square().sum()) for t in exact.values())) ** 0.5

    # bfloat16 keeps 8 bits and rounds after every layer, so both are far from float32 (0.11), and
    # equally. They share those passes: between them lie the roundings of the last products alone
    # (0.007; 0.02 in the worst tensor).
    for checkpointing in (False, True):
        policy = policy_on(half, **options, gradient_checkpointing=checkpointing)
        found = together(policy, rollout, coefficients, micro=2).rows
        assert error(found) <= 1.1 * error(ordinary) + 1e-3
        assert_close(found, ordinary, tolerance=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_forward_pass_of_peft_is_exact_in_float32(pipeline: Any, checkpointing: bool) -> None:
    policy = policy_on(pipeline, gradient_checkpointing=checkpointing)
    for layer in policy._velocity.adapted:
        del layer.forward  # the merged one
    rollout = policy.sample(requests(4), step=0)
    coefficients = random_coefficients(4, 3)
    expected = separately(policy, rollout, coefficients)  # before anything is tapped
    found = together(policy, rollout, coefficients)
    assert not any(isinstance(layer, MergedForward) for layer in policy.tapped())
    assert_close(found.rows, expected)
    assert all(p.grad is None for p in policy.trainable().values())


def test_parameters_outside_the_layers_are_differentiated_one_by_one() -> None:
    policy = ToyPolicy(steps=3)
    rollout = policy.sample(requests(4), step=0)
    coefficients = random_coefficients(4, 3)
    found = together(policy, rollout, coefficients, scale=64.0)
    assert_close(found.rows, separately(policy, rollout, coefficients))
    assert policy.drift.grad is None


def test_both_kinds_of_parameters_together(pipeline: Any) -> None:
    policy = policy_on(pipeline)
    bias = policy.transformer.proj_out.bias.requires_grad_()
    policy._velocity.trainable["proj_out.bias"] = bias
    rollout = policy.sample(requests(2), step=0)
    coefficients = random_coefficients(2, 3)
    found = together(policy, rollout, coefficients, micro=2)
    assert_close(found.rows, separately(policy, rollout, coefficients))


@pytest.mark.parametrize("name", ["merged", "peft"])
def test_a_scale_that_is_a_power_of_two_changes_nothing(pipeline: Any, name: str) -> None:
    policy = policy_on(pipeline)
    if name == "peft":
        for layer in policy._velocity.adapted:
            del layer.forward
    rollout = policy.sample(requests(2), step=0)
    coefficients = random_coefficients(2, 3)
    plain = together(policy, rollout, coefficients)
    scaled = together(policy, rollout, coefficients, scale=2.0**10)
    for parameter, rows in plain.rows.items():
        assert torch.equal(scaled.rows[parameter], rows)


def test_float16_gradients_that_would_vanish_are_kept_by_the_scale() -> None:
    found = {}
    for scale in (1.0, 2.0**16):
        model = adapted(torch.float16)
        rows = made(model)
        x = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", dtype=torch.float16):
            y = model(x)
        rows.backward(y.float().mean((1, 2))[:, None] * 1e-6, torch.ones(K, 4, 1), scale=scale)
        found[scale] = rows.rows["0.lora_A.default.weight"].norm()
    assert found[1.0] == 0
    assert found[2.0**16] > 0


# ---------------------------------------------------------------- what is made of the rows


def test_gramian_and_written_gradient_are_the_explicit_ones(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_on(pipeline)
    rollout = policy.sample(requests(2), step=0)
    found = together(policy, rollout, random_coefficients(2, 3))
    flat = torch.cat([rows.flatten(1) for rows in found.rows.values()], dim=1).double()  # [K, P]
    monkeypatch.setattr(gradients, "CHUNK", 1000)
    gramian = found.gramian(LocalComm())
    assert (gramian.dtype, gramian.device.type) == (torch.float64, "cpu")
    # Sums of some 1e5 products in float64, cut otherwise.
    torch.testing.assert_close(gramian, flat @ flat.T, rtol=1e-12, atol=0)
    assert torch.equal(gramian, gramian.T)

    parameters = policy.trainable()
    kept = next(iter(parameters))
    parameters[kept].grad = before = torch.ones_like(parameters[kept])
    weights = torch.tensor([0.5, -2.0, 0.25], dtype=torch.float64)
    found.write(weights)
    for name, parameter in parameters.items():
        expected = torch.einsum("k,k...->...", weights, found.rows[name]).float()
        # Three products and their sum, rounded to float32: torch's default is 1.3e-6.
        torch.testing.assert_close(parameter.grad, expected + (name == kept))
    assert parameters[kept].grad is before, "added to in place"


def test_rows_of_two_ranks_are_summed_once_before_the_gramian(pipeline: Any) -> None:
    policy = policy_on(pipeline)
    rollout = policy.sample(requests(4), step=0)
    coefficients = random_coefficients(4, 3)
    whole = together(policy, rollout, coefficients)
    first, second = (
        together(policy, rollout.select(index), coefficients[:, index])
        for index in (torch.arange(2), torch.arange(2, 4))
    )
    ranks = Ranks([second._flat.clone()])
    gramian = first.gramian(ranks)
    # Rows as in `EXACT`, which is 3e-5 at most; here two sums instead of one.
    torch.testing.assert_close(gramian, whole.gramian(LocalComm()), rtol=2 * EXACT, atol=0)
    assert_close(first.rows, whole.rows)
    assert torch.equal(first.gramian(ranks), gramian)
    assert ranks.messages == 1
    with pytest.raises(RuntimeError, match="call `clear`"):
        first.backward(torch.zeros(2, 3), torch.zeros(K, 2, 3))
    first.clear()
    assert not any(rows.any() for rows in first.rows.values())
    for t in range(3):
        log_probs = policy.log_probs(rollout, slice(t, t + 1)).log_probs
        first.backward(log_probs, coefficients[:, :, t : t + 1])
    assert_close(first.rows, whole.rows)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kl_term_goes_through_the_same_graph(dtype: str, checkpointing: bool) -> None:
    policy = policy_on(pipeline_in(dtype), gradient_checkpointing=checkpointing)
    rollout = policy.sample(requests(2), step=0)
    parameters = list(policy.trainable().values())

    def parts() -> tuple[Tensor, Tensor]:
        log_probs, kl, *_ = policy.log_probs(rollout, slice(0, 1), with_kl=True)
        assert kl is not None
        return log_probs, kl.sum()

    expected = torch.autograd.grad(parts()[1], parameters, allow_unused=True)
    alone = ObjectiveGradients(policy.trainable(), policy.tapped(), K)
    coefficients = random_coefficients(2, 1)
    log_probs = policy.log_probs(rollout, slice(0, 1)).log_probs
    alone.backward(log_probs, coefficients)

    found = ObjectiveGradients(policy.trainable(), policy.tapped(), K)
    log_probs, kl = parts()
    found.backward(log_probs, coefficients, retain_graph=True)
    torch.autograd.backward(kl)
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert parameter.grad is gradient is None or torch.equal(parameter.grad, gradient)
    for name, rows in found.rows.items():
        assert torch.equal(rows, alone.rows[name])


# ---------------------------------------------------------------- what must not change


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ordinary_training_stays_the_same_to_the_bit(dtype: str, checkpointing: bool) -> None:
    policy = policy_on(pipeline_in(dtype), gradient_checkpointing=checkpointing)
    rollout = policy.sample(requests(2), step=0)

    def train() -> tuple[Tensor, list[Tensor | None]]:
        log_probs = policy.log_probs(rollout, slice(1, 2)).log_probs
        log_probs.sum().backward()
        found = [p.grad for p in policy.trainable().values()]
        for parameter in policy.trainable().values():
            parameter.grad = None
        return log_probs.detach(), found

    before, expected = train()
    together(policy, rollout, random_coefficients(2, 3))
    after, found = train()
    assert torch.equal(before, after)
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or torch.equal(one, other)
    assert torch.equal(policy.sample(requests(2), step=0).log_probs, rollout.log_probs)


def test_layers_are_tapped_once() -> None:
    half = adapted(torch.bfloat16)
    first, second = (lora.tapped(lora.layers(half)) for _ in range(2))
    assert all(one is other for one, other in zip(first, second, strict=True))
    assert len(first) == 2


# ---------------------------------------------------------------- errors


def test_rows_that_do_not_belong_to_decisions_are_differentiated_separately() -> None:
    model = adapted()
    found = made(model)
    x, coefficients = torch.randn(5, 12), random_coefficients(2, 2)
    found.backward(model(x).sum(1)[:4].view(2, 2), coefficients)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.separate == parameters.keys()
    log_probs = model(x).sum(1)[:4].view(2, 2)
    expected = {name: torch.zeros(K, *p.shape) for name, p in parameters.items()}
    for k in range(K):
        loss = (coefficients[k] * log_probs).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            expected[name][k] = gradient
    for name, rows in found.rows.items():
        # One decision after the other, or their sum: float32, of gradients of up to some tens.
        torch.testing.assert_close(rows.float(), expected[name], rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_called_again_with_other_rows_is_exact() -> None:
    """What its first call added is taken back; other layers keep their one pass."""
    model = adapted()
    found = made(model)
    x, coefficients = torch.randn(4, 12), random_coefficients(4, 1)

    def log_probs() -> Tensor:
        return model(x).sum(1, keepdim=True) * model(x[:3]).sum()

    found.backward(log_probs(), coefficients)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for k in range(K):
        gradients = torch.autograd.grad(
            (coefficients[k] * log_probs()).sum(), list(parameters.values())
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            # Products of sums, in float32, and what was added is taken back: some 100 roundings.
            torch.testing.assert_close(found.rows[name][k].float(), gradient, rtol=1e-4, atol=1e-5)


def test_layers_that_a_pass_does_not_come_by_are_differentiated_separately() -> None:
    """They were called before they were tapped, as a wrapper does that uses the weights itself."""
    model = adapted()
    log_probs = model(torch.randn(2, 12, generator=torch.Generator().manual_seed(0)))
    found = made(model)
    found.backward(log_probs.sum(1, keepdim=True), torch.ones(K, 2, 1))
    assert len(found.separate) == 2
    assert all(rows.any() for rows in found.rows.values())


def test_log_probs_that_depend_on_no_parameter_are_refused() -> None:
    log_probs = torch.zeros(2, 1, requires_grad=True)
    with pytest.raises(RuntimeError, match="came by none of the layers"):
        made(adapted()).backward(log_probs, torch.ones(K, 2, 1))


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda g: g.backward(torch.zeros(4), torch.zeros(K, 4)), r"\[m, t\]. Found \(4,\)"),
        (
            lambda g: g.backward(torch.zeros(4, 2), torch.zeros(2, 4, 2)),
            r"`coefficients` .* \(3, 4, 2\). Found \(2, 4, 2\)",
        ),
        (
            lambda g: g.backward(torch.zeros(4, 2), torch.zeros(3, 4, 2), scale=0.0),
            r"`scale` should be positive. Found 0.0",
        ),
        (lambda g: g.write(torch.zeros(2)), r"`weights` .* \(3,\). Found \(2,\)"),
    ],
)
def test_wrong_arguments_are_named(
    call: Callable[[ObjectiveGradients], None], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        call(made(adapted()))


def test_what_cannot_be_measured_is_refused() -> None:
    model = adapted()
    layers, parameters = lora.tapped(lora.layers(model)), dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"`count` should be at least 1. Found 0"):
        ObjectiveGradients(parameters, layers, 0)
    with pytest.raises(ValueError, match=r"`copies` should be at least 1. Found 0"):
        ObjectiveGradients(parameters, layers, K, copies=0)
    with pytest.raises(ValueError, match=r"`parameters` should not be empty"):
        ObjectiveGradients({}, layers, K)
    with pytest.raises(ValueError, match=r"among the parameters. Found 1"):
        del parameters["0.lora_A.default.weight"]
        ObjectiveGradients(parameters, layers, K)


# ---------------------------------------------------------------- the benchmark


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_benchmark_reports_every_way(
    dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("LAYERS", "HEADS", "SIDE"):
        monkeypatch.setattr(benchmark, name, 2)
    threads = torch.get_num_threads()
    report = benchmark.measure_gradients(dtype, rounds=1)
    torch.set_num_threads(threads)
    names = [way["name"] for way in report["ways"]]
    assert names == [
        "one ordinary backward",
        *(f"K = {count}, one backward" for count in (1, 2, 4, 8)),
        "K = 4, 4 backwards",
    ]
    assert report["ways"][0]["ratio"] == report["ways"][0]["ratio_with_forward"] == 1
    assert report["ways"][4]["bytes"] == 8 * 4 * report["trained"]
    # Two samples, guided; the largest factor has 128 x 32 numbers.
    assert report["temporary_bytes"] == 4 * 128 * 32 * (4 if dtype == "float32" else 6)
    tables.PRINT["gradients"](report)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
