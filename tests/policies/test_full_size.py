"""Stable Diffusion 3.5 Medium at its full width on a GPU that is not there.

The tensors have shapes, types and a device, and no data (``FakeTensorMode``): an operation on two
devices or two types raises as it would on a GPU, at the sizes that users have. Two blocks stand
for the 24: one with a second attention, and the last, which drops the text. There is no backward
pass on a card that is not there: it runs on the same tensors in main memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from card import CARD, CPU, HostReads, NumberedScheduler, pretended_card
from fixed_objectives import FixedObjectives
from sections import sd3_policy
from torch import Tensor

from benchmarks.pipelines import MEDIUM
from moa_diffusion.config.schema import GradientsConfig, LossConfig
from moa_diffusion.distributed import LocalComm
from moa_diffusion.monitoring import drift
from moa_diffusion.monitoring.progress import Progress
from moa_diffusion.policies.sd3 import SD3Policy
from moa_diffusion.training.ema import EMA
from moa_diffusion.training.fused import FusedUpdate
from moa_diffusion.training.geometry import Geometry
from moa_diffusion.training.stepper import Stepper
from moa_diffusion.training.steps import RolloutSteps
from moa_diffusion.training.update import NoProbe, PlainUpdate, Probe
from moa_diffusion.types import Request

SAMPLES, MICRO, STEPS, TRAINED = 4, 2, 3, 1


@pytest.fixture
def host() -> Iterator[HostReads]:
    """All tensors within a test have no data."""
    with pretended_card() as reads:
        yield reads


def made(dtype: torch.dtype, kind: Any, **options: Any) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return kind(**options)
    finally:
        torch.set_default_dtype(before)


def medium(device: torch.device, dtype: str, **options: Any) -> SD3Policy:
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    kind = getattr(torch, dtype)
    sizes = {**MEDIUM.transformer, "num_layers": 2, "dual_attention_layers": (0,)}
    blocks = len(MEDIUM.vae["block_out_channels"])
    pipeline = SimpleNamespace(
        transformer=made(kind, SD3Transformer2DModel, **{"qk_norm": "rms_norm", **sizes}),
        vae=made(
            torch.float32,
            AutoencoderKL,
            **{
                **MEDIUM.vae,
                "down_block_types": ("DownEncoderBlock2D",) * blocks,
                "up_block_types": ("UpDecoderBlock2D",) * blocks,
                "latent_channels": 16,
                "shift_factor": 0.0609,
                "use_quant_conv": False,
                "use_post_quant_conv": False,
            },
        ),
        vae_scale_factor=8,
        scheduler=NumberedScheduler(),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3")),
    )
    sampling = {"resolution": 512, "steps": STEPS, "window": TRAINED, "window_mode": "first"}
    policy = sd3_policy(pipeline, device=device, **(sampling | options))

    def encode(prompts: list[str]) -> tuple[Tensor, Tensor]:
        embeds, pooled = torch.empty(len(prompts), 77 + 128, 4096), torch.empty(len(prompts), 2048)
        return embeds.to(device, kind), pooled.to(device, kind)

    policy.encode = encode
    return policy


def requests(samples: int = SAMPLES) -> list[Request]:
    return [
        Request(prompt="ab"[i % 2], group=i % 2, sibling=i // 2, seed=i) for i in range(samples)
    ]


def steps_of(
    policy: SD3Policy, *, kl_weight: float, half: bool, samples: int = SAMPLES
) -> RolloutSteps:
    device = policy.device
    return RolloutSteps(
        policy=policy,
        stepper=Stepper(
            policy=policy,
            optimizer=torch.optim.AdamW(list(policy.trainable().values()), lr=1e-4),
            lr=lambda count: 1e-4,
            scaler=torch.amp.GradScaler(device.type, init_scale=2.0**8, enabled=half),
            ema=EMA(policy.trainable(), decay=0.9, every=1),
            max_grad_norm=1.0,
            max_skipped=3,
        ),
        geometry=Geometry.solve(
            groups=2,
            group_size=samples // 2,
            updates=1,
            world_size=1,
            max_sample_batch=samples,
            max_micro_batch=MICRO,
        ),
        settings=LossConfig(clip_range=0.05, kl_weight=kl_weight, ratio_tolerance=2.0),
        progress=Progress(LocalComm(), bars=False),
        seed=0,
    )


@contextmanager
def no_backward(policy: SD3Policy, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gradients of the right shapes, types and places: the engine asks the driver of a card."""

    def backward(*given: Any, **options: Any) -> None:
        for parameter in policy.trainable().values():
            parameter.grad = torch.zeros_like(parameter)

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "backward", backward)
        yield


@pytest.mark.parametrize(("dtype", "guidance"), [("float16", 4.5), ("bfloat16", 1.0)])
def test_a_rollout_is_drawn_checked_learnt_from_and_evaluated_on_a_card(
    host: HostReads, monkeypatch: pytest.MonkeyPatch, dtype: str, guidance: float
) -> None:
    policy = medium(CARD, dtype, guidance=guidance, eval_steps=2, eval_guidance=guidance)
    assert {p.device for p in policy.transformer.parameters()} == {CARD}
    host.waits.clear()
    rollout = policy.sample(requests(), step=0)
    assert rollout.images.shape == (SAMPLES, 3, 512, 512)
    assert rollout.images.device == CPU
    assert {rollout.log_probs.device, rollout.trace["latents"].device} == {CARD}
    # The images, and the norms of their latents: nothing within the steps.
    assert len(host.waits) == 2, host.waits

    steps = steps_of(policy, kl_weight=0.01, half=dtype == "float16")
    steps.check_ratio(rollout, policy.trained_steps(0))
    plain = PlainUpdate(steps, NoProbe())
    with no_backward(policy, monkeypatch):
        plain.descend(rollout, torch.linspace(-1, 1, SAMPLES))
        host.waits.clear()
        plain.descend(rollout, torch.linspace(-1, 1, SAMPLES))
    # The norm, the loss scale and whether the gradients held; and the sums at the end.
    assert len(host.waits) == (4 if dtype == "float16" else 2), host.waits
    assert policy.generate(requests()).outputs.device == CPU
    host.waits.clear()
    drift.statistics(rollout.images, device=CARD, batch=MICRO)
    assert len(host.waits) == 1, host.waits


def test_backward_passes_have_the_shapes_and_types(host: HostReads) -> None:
    """Plain, fused and as a probe, at full width; of one micro-batch.

    In bfloat16, since in float32 no type can be wrong, and with checkpointing, whose passes go
    through all that others go through, and again.
    """
    policy = medium(CPU, "bfloat16", guidance=1.0, gradient_checkpointing=True)
    rollout = policy.sample(requests(MICRO), step=0)
    steps = steps_of(policy, kl_weight=0.01, half=False, samples=MICRO)
    advantages = torch.tensor([[-1.0, 1.0], [1.0, -2.0]])
    PlainUpdate(steps, NoProbe()).descend(rollout, advantages[0])
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    FusedUpdate(steps).improve(rollout, FixedObjectives(advantages, lambda _: weights))
    measured = Probe(steps, GradientsConfig(share=1.0)).measure(rollout, advantages)
    assert measured.shape == (2, 2)


def test_planted_faults_are_seen(host: HostReads, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table left in main memory, a factor of another type, and a number read in the loop."""
    policy = medium(CARD, "float16", guidance=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(policy._schedule, "sigma", policy._schedule.sigma.cpu())
        rollout = policy.sample(requests(), step=0)
        with pytest.raises(Exception, match="same device, but found at least two devices"):
            policy.log_probs(rollout, slice(0, 1))
    host.waits.clear()
    velocity = policy._velocity
    with monkeypatch.context() as patch:
        patch.setattr(
            policy._decisions,
            "_velocity",
            lambda *given: velocity(*given) * velocity(*given).max().item(),
        )
        policy.sample(requests(), step=0)
    assert len(host.waits) == 2 + STEPS
    table = policy.transformer.pos_embed.proj.weight
    with monkeypatch.context() as patch:
        patch.setattr(velocity, "_autocast", lambda: torch.autocast("cuda", enabled=False))
        patch.setattr(table, "data", table.data.float())
        with pytest.raises(RuntimeError, match="should be the same"):
            policy.sample(requests(), step=0)
