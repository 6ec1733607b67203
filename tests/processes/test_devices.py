"""Machines whose accelerator has no float64 (Apple's): nothing asks for it there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from moa_diffusion import tiny
from moa_diffusion.config.schema import CriticConfig
from moa_diffusion.distributed import LocalComm
from moa_diffusion.policies.gumbel import GumbelNoise
from moa_diffusion.processes.devices import float64_device
from moa_diffusion.training.critic import Critic
from moa_diffusion.training.gradients import ObjectiveGradients
from moa_diffusion.types import Request, RewardMatrix, Rollout

MPS = torch.device("mps", 0)  # as torch itself names it
CPU = torch.device("cpu")


def is_there(value: Any) -> bool:
    return isinstance(value, torch.device | str) and str(value).startswith("mps")


class Pretended(TorchFunctionMode):
    """CPU tensors that say they were on another device, which has no float64.

    What is made there, moved there, or computed from such a tensor is there; ``cpu`` and ``to``
    bring a copy back.
    """

    def __init__(self) -> None:
        super().__init__()
        self._there: dict[int, Any] = {}

    def place(self, tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype.")
        key = id(tensor)
        self._there[key] = weakref.ref(tensor, lambda _: self._there.pop(key, None))
        return tensor

    def holds(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self._there

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            return MPS if self.holds(args[0]) else func(*args, **kwargs)
        given, _ = tree_flatten((args, kwargs))
        there = any(self.holds(value) for value in given)
        moved = func in (Tensor.to, Tensor.cpu) or func is torch.Tensor.type
        if func is Tensor.cpu:
            there = False
        elif func is Tensor.to:
            named = [v for v in given[1:] if isinstance(v, torch.device | str | Tensor)]
            if named:
                there = self.holds(named[0]) or is_there(named[0])
        elif any(is_there(value) for value in given):
            there = True

        def here(value: Any) -> Any:
            return CPU if is_there(value) else value

        result = func(*tree_map(here, args), **tree_map(here, kwargs))
        if moved and isinstance(result, Tensor) and result is args[0]:
            if self.holds(result) == there:
                return result
            result = result.clone()
        if there:
            tree_map(lambda v: self.place(v) if isinstance(v, Tensor) else v, result)
        return result


@pytest.fixture
def pretended() -> Iterator[Pretended]:
    with Pretended() as mode:
        yield mode


def test_the_pretence_refuses_what_the_device_would(pretended: Pretended) -> None:
    made = torch.zeros(3, device=MPS)
    assert (made + 1).device == MPS
    assert made.cpu().device == CPU
    assert made.cpu().double().dtype == torch.float64
    for wrong in (
        lambda: made.double(),
        lambda: made.to(torch.float64),
        lambda: torch.zeros(2, dtype=torch.float64, device=MPS),
        lambda: torch.zeros(2, dtype=torch.float64).to(MPS),
    ):
        with pytest.raises(TypeError, match="float64"):
            wrong()


def test_float64_is_kept_where_it_is_known() -> None:
    assert float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert float64_device(CPU) == CPU
    assert float64_device(MPS) == CPU


def test_the_gramian(pretended: Pretended) -> None:
    parameter = torch.nn.Parameter(pretended.place(torch.ones(4, 3)))
    pretended.place(parameter)
    rows = ObjectiveGradients({"weight": parameter}, [], 2)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(MPS)
    coefficients = torch.ones(2, 5, 1)
    coefficients[1] = -2
    rows.backward((x @ parameter.T).sum(1, keepdim=True), coefficients)
    assert rows.rows["weight"].device == MPS
    gramian = rows.gramian(LocalComm())
    assert (gramian.dtype, gramian.device) == (torch.float64, CPU)
    # Twice a row is twice its bits, so this is exact but for the order of float64 sums.
    torch.testing.assert_close(gramian, gramian[0, 0] * torch.tensor([[1, -2], [-2, 4]]).double())
    rows.write(torch.tensor([0.5, 0.25], dtype=torch.float64))
    assert parameter.grad is not None


def test_texts_are_drawn(pretended: Pretended) -> None:
    scores = torch.linspace(-1, 1, 7).expand(3, 7)
    found = GumbelNoise([1, 2, 3], temperature=0.5, device=MPS)(torch.zeros(3, 1), scores.to(MPS))
    assert found.device == MPS
    expected = GumbelNoise([1, 2, 3], temperature=0.5, device=CPU)(torch.zeros(3, 1), scores)
    assert torch.equal(found.cpu(), expected)


def test_value_heads(pretended: Pretended) -> None:
    critic = Critic(
        ("a", "b"),
        CriticConfig(hidden=3),
        width=4,
        comm=LocalComm(),
        device=MPS,
        seed=0,
        batch=2,
    )
    asked = tuple(Request(prompt="p", group=i) for i in range(3))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    rollout = Rollout(
        requests=asked,
        log_probs=torch.zeros(3, 3).to(MPS),
        mask=mask.to(MPS),
        trace={"features": torch.randn(3, 3, 4).to(MPS)},
        texts=("x", "y", "z"),
    )
    rewards = RewardMatrix(
        names=("a", "b"),
        values=torch.randn(2, 3, dtype=torch.float64),
        groups=torch.arange(3),
        prompts=("p",) * 3,
    )
    credit = critic.assign_credit(rollout, rewards)
    assert credit.matrix.values.isfinite().all()


def test_learning_from_preferences(pretended: Pretended) -> None:
    """An optimizer step, and the log-probs of all responses."""
    from moa_diffusion.data.preference_files import read_preferences
    from moa_diffusion.training.ema import EMA
    from moa_diffusion.training.offline import Cloning
    from moa_diffusion.training.stepper import Stepper

    data = read_preferences(tiny.PREFERENCES_PATH, ["politeness", "brevity"])
    parameter = torch.nn.Parameter(pretended.place(torch.zeros(())))
    pretended.place(parameter)

    class Policy:
        """Every token is as likely as any other."""

        copies: Mapping[str, Any] = MappingProxyType({})

        def tokens_of(self, texts: Any) -> list[list[int]]:
            return [[0, 1] for _ in texts]

        def log_probs_of(self, prompts: Any, tokens: Any) -> Tensor:
            return parameter.expand(len(prompts), 2).sum(1)

        def trainable(self) -> dict[str, torch.nn.Parameter]:
            return {"one": parameter}

        def step_chunks(self, decisions: int) -> list[slice]:
            return [slice(0, decisions)]

    policy: Any = Policy()
    cloning = Cloning(
        policy=policy,
        stepper=Stepper(
            policy=policy,
            optimizer=torch.optim.SGD([parameter], lr=0.1),
            lr=lambda count: 0.1,
            scaler=torch.amp.GradScaler("cpu", enabled=True, init_scale=1.0),
            ema=EMA(policy.trainable(), decay=0.9, every=1),
            max_grad_norm=1.0,
            max_skipped=3,
        ),
        data=data,
        comm=LocalComm(),
        micro_batch=4,
    )
    told = cloning([0, 1, 2], torch.ones(3, dtype=torch.float64))
    assert told["policy/skipped_updates"] == 0
    assert cloning.log_probs([0, 1, 2], lambda: None).dtype == torch.float64
