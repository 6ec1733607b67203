"""Log-probabilities of tokens, in chunks, with their gradient."""

from __future__ import annotations

import pytest
import torch

from moa_diffusion.policies import token_log_probs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_and_temperature_leave_the_log_softmax_exact(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(token_log_probs, "CHUNK", 3 * 11)
    source = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(2, 5, 11, generator=source)).to(dtype).requires_grad_()
    ids = torch.randint(11, (2, 5), generator=source)
    weights = torch.randn(2, 5, generator=source)
    found = token_log_probs.token_log_probs(logits, ids, 0.7)
    expected = (logits.float() / 0.7).log_softmax(-1).gather(2, ids[..., None])[..., 0]
    # Logits of up to 100 are rounded by 6e-6 in float32; so are log-probs, whatever their size, and
    # probabilities in the gradient are off by that share of them.
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    (one,) = torch.autograd.grad((weights * found).sum(), logits, retain_graph=True)
    (other,) = torch.autograd.grad((weights * expected).sum(), logits)
    # Given in the type of the logits: at a border what differs by little is rounded either way.
    rtol = max(1e-4, torch.finfo(dtype).eps)
    torch.testing.assert_close(one, other, rtol=rtol, atol=5e-5)
    (again,) = torch.autograd.grad((weights * found).sum(), logits)
    assert torch.equal(one, again)
