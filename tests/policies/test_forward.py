"""The merged LoRA forward against peft's own."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from moa_diffusion.policies.forward import MergedForward
from moa_diffusion.policies.lora import disabled, layers


def adapted(*, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=bias), nn.Tanh(), nn.Linear(20, 8, bias=bias))
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def merge(model: nn.Module) -> nn.Module:
    merged = copy.deepcopy(model)
    for layer in layers(merged):
        layer.forward = MergedForward(layer)
    return merged


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 12), (2, 7, 12)])
def test_output_and_gradients_are_those_of_peft(bias: bool, shape: tuple[int, ...]) -> None:
    model = adapted(bias=bias)
    merged = merge(model)
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


def test_training_and_sampling_passes_agree_to_the_bit() -> None:
    merged, x = merge(adapted()), torch.randn(4, 12)
    with torch.no_grad():
        sampled = merged(x)
    assert torch.equal(merged(x).detach(), sampled)


def test_every_change_of_the_adapter_is_seen() -> None:
    model = adapted()
    merged, x = merge(model), torch.randn(4, 12)
    merged(x)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.1)
        for m in (model, merged)
    ]
    for m, optimizer in zip((model, merged), optimizers, strict=True):
        gradients(m, x)
        optimizer.step()
    # Adam's first step has the length lr whatever the gradient's, so only its sign could show
    # rounding; outputs differ as above.
    torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-5)
    before = merged(x).detach()
    with torch.no_grad():
        for parameter in merged.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.zeros_like(parameter))
    assert not torch.equal(merged(x), before)


def test_switched_off_it_is_the_base_model() -> None:
    merged, x = merge(adapted()), torch.randn(4, 12)
    base = nn.Sequential(merged[0].base_layer, nn.Tanh(), merged[2].base_layer)
    with disabled(layers(merged)):
        assert torch.equal(merged(x), base(x))
    assert not torch.equal(merged(x), base(x))


def test_half_precision_is_refused() -> None:
    model = adapted().to(torch.bfloat16)
    with pytest.raises(ValueError, match="float32 base weight"):
        MergedForward(layers(model)[0])
