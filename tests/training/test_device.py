"""How often training waits for the device, or sends something there: counted without a device."""

from __future__ import annotations

import copy
import sys
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from fixed_objectives import FixedObjectives
from sections import sd3_policy
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.pipelines import SMALLEST, random_pipeline
from moa_diffusion.config.schema import CriticConfig, GradientsConfig, LossConfig
from moa_diffusion.distributed import LocalComm
from moa_diffusion.monitoring.progress import Progress
from moa_diffusion.policies.sd3 import SD3Policy
from moa_diffusion.training.critic import Critic
from moa_diffusion.training.ema import EMA
from moa_diffusion.training.fused import FusedUpdate
from moa_diffusion.training.geometry import Geometry
from moa_diffusion.training.stepper import Stepper
from moa_diffusion.training.steps import RolloutSteps
from moa_diffusion.training.update import NoProbe, PlainUpdate, Probe
from moa_diffusion.types import Request, RewardMatrix, Rollout

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default}
FROM_HOST = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor}
TO_HOST = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}


class Pretended(TorchDispatchMode):
    """Tensors in main memory that pretend to be on a device, known by their storages.

    An operation on one of them gives another. ``events`` counts what would make the host wait for
    the device ("wait"), and what it would send there ("send"), by place in the code.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, StorageWeakRef] = {}  # a weak reference keeps its key unique
        self.events: Counter[tuple[str, str]] = Counter()
        self._calls = _Calls(self)

    def __enter__(self) -> Pretended:
        self._calls.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *found: Any) -> None:
        super().__exit__(*found)
        self._calls.__exit__(*found)

    def count(self, kind: str) -> int:
        return sum(number for (found, _), number in self.events.items() if found == kind)

    def has(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in self._storages

    def put(self, value: Any) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage)

    def taken(self, value: torch.Tensor) -> torch.Tensor:
        """A copy in main memory."""
        copied = value.detach().clone()
        self._storages.pop(copied.untyped_storage()._cdata)
        return copied

    def note(self, kind: str) -> None:
        places = [f for f in traceback.extract_stack() if "/moa_diffusion/" in f.filename]
        last = places[-1] if places else traceback.extract_stack()[-3]
        self.events[kind, f"{last.filename.rpartition('/')[2]}:{last.lineno} {last.line}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # what is asked here is not part of the code
            return self._dispatched(func, args, kwargs or {})

    def _dispatched(self, func: Any, args: Any, kwargs: Any) -> Any:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        here = [self.has(tensor) for tensor in inputs]
        found = func(*args, **kwargs)
        if any(here):
            by_mask = func in INDEXING and any(t.dtype == torch.bool for t in inputs[1:])
            if func in WAITS or by_mask:
                self.note("wait")
            elif any(t.ndim and not on for t, on in zip(inputs, here, strict=True)):
                self.note("send")  # such as an index in main memory
            self.put(found)
        return found


def pretending_not(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """Arguments of a call with the CPU in place of any device."""
    args = [CPU if isinstance(one, torch.device) else one for one in args]
    return args, {
        name: CPU if isinstance(one, torch.device) else one for name, one in kwargs.items()
    }


class _Calls(TorchFunctionMode):
    """The calls by which tensors change their place, which in main memory would be nothing."""

    def __init__(self, device: Pretended) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mine = args[0] if args and isinstance(args[0], torch.Tensor) else None
        on = self.device.has(mine)
        if func == torch.Tensor.device.__get__:
            return DEVICE if on else CPU
        if func == torch.Tensor.is_cuda.__get__:
            return on
        if func in TO_HOST and on:
            self.device.note("wait")
            return func(self.device.taken(mine), *args[1:], **kwargs)
        if func is torch.Tensor.to:
            return self._to(mine, args, kwargs)
        args, mapped = pretending_not(args, kwargs)
        found = func(*args, **mapped)
        if (DEVICE in kwargs.values()) or (on and func is torch.Tensor.new_tensor):
            if func in FROM_HOST:
                self.device.note("send")
            self.device.put(found)
        return found

    def _to(self, mine: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
        on = self.device.has(mine)
        if sys._getframe(2).f_code.co_filename.endswith("clip_grad.py"):
            return mine  # it asks C++ where its tensors are, which does not pretend
        target = on
        for place in tree_leaves((args[1:], kwargs)):
            if isinstance(place, torch.device):
                target = place.type == DEVICE.type
            elif isinstance(place, torch.Tensor):
                target = self.device.has(place)
            elif isinstance(place, str):
                target = torch.device(place).type == DEVICE.type
        args, kwargs = pretending_not(args, kwargs)
        found = torch.Tensor.to(*args, **kwargs)
        if target and not on:
            self.device.note("send")
            found = found.clone()  # what was in main memory stays there
            self.device.put(found)
        if on and not target:
            self.device.note("wait")
            found = self.device.taken(found)
        return found


SAMPLES, TRAINED = 4, 3


class Embeddings:
    """Of prompts, kept in main memory and sent when asked for."""

    def __init__(self, width: int) -> None:
        self._known = {prompt: torch.randn(5, width) for prompt in ("", "a", "b")}

    def __call__(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        embeds = torch.stack([self._known[prompt] for prompt in prompts])
        return embeds.to(DEVICE), embeds[:, 0].to(DEVICE)


@pytest.fixture(scope="module")
def shared_pipeline() -> Any:
    return random_pipeline(SMALLEST)


@pytest.fixture
def pipeline(shared_pipeline: Any) -> Any:
    return copy.deepcopy(shared_pipeline)  # here, where nothing looks at every call of it


def on_device(device: Pretended, pipeline: Any, **options: Any) -> SD3Policy:
    policy: Any = sd3_policy(
        pipeline,
        device=DEVICE,
        seed=0,
        resolution=8,
        steps=TRAINED + 1,
        lora_rank=4,
        **options,
    )
    policy.encode = Embeddings(policy.transformer.config.joint_attention_dim)
    for module in (policy.transformer, policy.vae):  # however peft made its layers
        device.put([*module.parameters(), *module.buffers()])
    return policy


def steps_of(
    policy: SD3Policy, *, micro: int, updates: int, kl_weight: float, half: bool, **loss: Any
) -> RolloutSteps:
    return RolloutSteps(
        policy=policy,
        stepper=Stepper(
            policy=policy,
            optimizer=torch.optim.AdamW(list(policy.trainable().values()), lr=1e-4),
            lr=lambda count: 1e-4,
            scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=half),
            ema=EMA(policy.trainable(), decay=0.9, every=1),
            max_grad_norm=1.0,
            max_skipped=3,
        ),
        geometry=Geometry.solve(
            groups=2,
            group_size=2,
            updates=updates,
            world_size=1,
            max_sample_batch=4,
            max_micro_batch=micro,
        ),
        settings=LossConfig(clip_range=0.05, kl_weight=kl_weight, ratio_tolerance=1.0, **loss),
        progress=Progress(LocalComm(), bars=False),
        seed=0,
    )


def draw(policy: SD3Policy) -> Rollout:
    return policy.sample(
        [Request(prompt="ab"[i % 2], group=i % 2, sibling=i // 2, seed=i) for i in range(SAMPLES)],
        step=0,
    )


def after_one(device: Pretended, improve: Any) -> None:
    """Events of the second call; what is made once is made in the first."""
    with device:
        improve()
        device.events.clear()
        improve()


@pytest.mark.parametrize(
    ("fused", "micro", "updates", "step_batch", "guidance", "kl_weight", "half"),
    [  # float16 and a KL without fused rows: tests/policies/test_full_size.py
        (False, 2, 2, 1, 1.0, 0.0, False),
        (True, 2, 2, 1, 1.0, 0.0, False),
        (True, 2, 1, 3, 4.5, 0.0, True),
        (True, 2, 1, 2, 1.0, 0.1, False),
    ],
)
def test_an_update_waits_once_per_optimizer_step_and_once_at_its_end(
    pipeline: Any,
    fused: bool,
    micro: int,
    updates: int,
    step_batch: int,
    guidance: float,
    kl_weight: float,
    half: bool,
) -> None:
    """However many micro-batches and steps there are: these get their prompts, nothing else."""
    device = Pretended()
    with device:
        policy = on_device(device, pipeline, guidance=guidance, step_batch=step_batch)
        rollout = draw(policy)
        steps = steps_of(policy, micro=micro, updates=updates, kl_weight=kl_weight, half=half)
    advantages = torch.stack([torch.linspace(-1, 1, SAMPLES), torch.linspace(1, -2, SAMPLES)])
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    if fused:
        objectives: Any = FixedObjectives(advantages, lambda _: weights)
        update = FusedUpdate(steps)
        after_one(device, lambda: update.improve(rollout, objectives))
    else:
        plain = PlainUpdate(steps, NoProbe())
        after_one(device, lambda: plain.descend(rollout, advantages[0]))
    # The norm, the Gramian; and of the loss scale, what it is, and whether the gradients held.
    each = 1 + fused + 2 * half
    assert device.count("wait") == each * updates + 1, device.events
    # Embeddings and pooled embeddings of a micro-batch; the advantages; weights of the rows.
    assert device.count("send") <= 2 * SAMPLES // micro + 1 + fused * updates, device.events


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ({"clip": "divergence", "norm_weight": 1.0, "kl_target": 0.1}, {"loss_clip": "divergence"}),
        ({"kind": "forward", "norm_weight": 1.0}, {"forward": {"preset": "nft", "draws": 2}}),
    ],
    ids=["guards", "nft"],
)
def test_guards_and_draws_do_not_wait(
    pipeline: Any, fused: bool, loss: dict[str, Any], options: dict[str, Any]
) -> None:
    """As often as without them; a pass of draws is sent its noise."""
    device, passes = Pretended(), SAMPLES // 2 * TRAINED
    with device:
        policy = on_device(device, pipeline, guidance=1.0, **options)
        rollout = draw(policy)
        steps = steps_of(policy, micro=2, updates=1, kl_weight=0.1, half=False, **loss)
    advantages = torch.stack([torch.linspace(-1, 1, SAMPLES), torch.linspace(1, -2, SAMPLES)])
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    objectives: Any = FixedObjectives(advantages, lambda _: weights)
    plain = PlainUpdate(steps, NoProbe())
    update = FusedUpdate(steps)
    if fused:
        after_one(device, lambda: update.improve(rollout, objectives))
    else:
        after_one(device, lambda: plain.descend(rollout, advantages[0]))
    assert device.count("wait") == 1 + fused + 1, device.events
    noise = passes if "forward" in options else 0
    assert device.count("send") <= SAMPLES + 1 + fused + noise, device.events


def test_a_probe_waits_for_its_gramian_alone(pipeline: Any) -> None:
    device = Pretended()
    with device:
        policy = on_device(device, pipeline, guidance=4.5)
        rollout = draw(policy)
        steps = steps_of(policy, micro=2, updates=1, kl_weight=0.0, half=False)
    advantages = torch.stack([torch.linspace(-1, 1, SAMPLES), torch.linspace(1, -2, SAMPLES)])
    probe = Probe(steps, GradientsConfig(share=0.5))
    after_one(device, lambda: probe.measure(rollout, advantages))
    assert device.count("wait") == 1, device.events
    assert device.count("send") <= 2 + 1, device.events


@pytest.mark.parametrize(("batch", "epochs"), [(SAMPLES, 1), (2, 1), (2, 8)])
def test_value_heads_wait_once_at_their_end(batch: int, epochs: int) -> None:
    """However many parts and epochs; they waited for each part of each epoch, 18 times for 16."""
    device, source = Pretended(), torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.arange(1, SAMPLES + 1)[:, None]
    features = torch.randn(SAMPLES, 5, 6, generator=source)
    device.put([mask, features])
    rollout = Rollout(
        requests=tuple(Request(prompt="a", sibling=i) for i in range(SAMPLES)),
        log_probs=torch.zeros(SAMPLES, 5),
        mask=mask,
        trace={"features": features},
        texts=("",) * SAMPLES,
    )
    rewards = RewardMatrix(
        names=("a", "b"),
        values=torch.randn(2, SAMPLES, generator=source, dtype=torch.float64),
        groups=torch.zeros(SAMPLES, dtype=torch.int64),
        prompts=("a",) * SAMPLES,
    )
    critic = Critic(
        rewards.names,
        CriticConfig(epochs=epochs),
        width=6,
        comm=LocalComm(),
        device=CPU,
        seed=0,
        batch=batch,
    )
    critic.device = DEVICE
    device.put(list(critic.heads.parameters()))
    after_one(device, lambda: critic.assign_credit(rollout, rewards))
    assert device.count("wait") == 1, device.events
    assert device.count("send") == 1, device.events  # the rewards


def test_what_waits_is_seen() -> None:
    """The counting itself: each of these would drain a device's queue."""
    with Pretended() as device:
        values = torch.arange(4.0).to(DEVICE)
        assert values.device == DEVICE
        assert device.count("send") == 1
        for wait in (
            lambda: float(values.sum()),
            lambda: values[values > 1],
            lambda: bool(values.any()),
            lambda: values.tolist(),
            lambda: values.cpu(),
            lambda: values.to("cpu"),
        ):
            before = device.count("wait")
            wait()
            assert device.count("wait") == before + 1
        for send in (
            lambda: values[torch.tensor([1, 0])],
            lambda: torch.tensor([1.0], device=DEVICE),
            lambda: values.new_tensor([1.0]),
            lambda: values + torch.ones(4),
        ):
            before = device.count("send")
            send()
            assert device.count("send") == before + 1
        before = device.events.copy()
        torch.zeros(3, device=DEVICE) + values[1:] * 2
        torch.autograd.backward((values[:2].requires_grad_() * values[:2]).sum())
        assert device.events == before
