"""Records that cross module boundaries, and the legend of their axes.

Axes, named once and always in this order:

| letter | axis |
|---|---|
| K | objectives (reward heads) |
| N | samples of one rollout, over all processes; ``n`` is one process's share |
| M | samples that are drawn and scored outside a rollout: held-out ones, references |
| T | decisions per sample: trained denoising steps, or tokens; ``t`` is a part of them |
| D | decisions of all N samples, one after the other, without those that do not exist |
| P | prompt draws (groups) of one rollout |
| G | siblings per prompt draw (the group size) |

Rewards and advantages are ``[K, N]``, log-probabilities ``[N, T]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

# PyTorch is imported where it is used: a typo in a configuration is told before it is loaded.

# What a policy draws: images [n, 3, H, W] float32 in [0, 1] on the CPU, or n texts.
Outputs: TypeAlias = "Tensor | tuple[str, ...]"


class ConfigError(ValueError):
    """A configuration that cannot be run; the message starts with the dotted key it is about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sample to draw."""

    prompt: str
    metadata: Mapping[str, Any] = field(default_factory=dict)  # from the prompt set, for rewards
    group: int = 0  # globally unique id of the prompt draw; equal for siblings
    sibling: int = 0  # position inside the group, 0 <= sibling < G
    seed: int = 0  # 63 bit; depends on run seed, step, group and sibling, never on the rank
    start_seed: int | None = None  # decides the initial noise, if siblings share it


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What a policy returns for its requests: ``n`` samples with ``T`` decisions each."""

    requests: tuple[Request, ...]  # length n
    log_probs: Tensor  # [n, T] float32, under the policy that sampled
    mask: Tensor  # [n, T] bool, False where a decision does not exist (padding)
    trace: Mapping[str, Tensor]  # leading axis n; only the policy that wrote it reads it
    images: Tensor | None = None  # [n, 3, H, W] float32 in [0, 1], on the CPU
    texts: tuple[str, ...] | None = None  # length n
    # Numbers [n] float32 on the CPU about each sample that only the policy knows, by name.
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    bare: bool = False  # a part without its outputs, which training does not look at

    def __post_init__(self) -> None:
        n = len(self.requests)
        if self.log_probs.ndim != 2 or self.log_probs.shape[0] != n:
            raise ValueError(
                "Parameter `log_probs` should have shape [n, T] with one row per request. "
                f"Found {tuple(self.log_probs.shape)} for {n} requests."
            )
        if self.mask.shape != self.log_probs.shape:
            raise ValueError(
                "Parameter `mask` should have the shape of `log_probs`. "
                f"Found {tuple(self.mask.shape)} and {tuple(self.log_probs.shape)}."
            )
        outputs = (self.images is not None) + (self.texts is not None)
        if outputs != (0 if self.bare else 1):
            raise ValueError(
                "A rollout should hold exactly one of `images` and `texts`, or neither if it is "
                f"`bare`. Found {('none', 'one', 'both')[outputs]}."
            )
        for name, tensor in (*self.trace.items(), *self.statistics.items()):
            if tensor.shape[:1] != (n,):
                raise ValueError(
                    f"Entry `{name}` should have the leading axis n = {n}. "
                    f"Found shape {tuple(tensor.shape)}."
                )

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def outputs(self) -> Outputs:
        """The images or the texts; a bare rollout has none."""
        if self.texts is not None:
            return self.texts
        assert self.images is not None
        return self.images

    def select(self, index: Tensor, *, outputs: bool = True) -> Rollout:
        """Return the samples at ``index [m]`` (int64, on the CPU), in that order.

        Args:
            index: Rows, known to the host: nothing has to be sent to the device.
            outputs: Whether images and texts come along; else the part is bare.
        """
        rows = index.tolist()
        images = self.images if outputs else None
        texts = self.texts if outputs else None
        return Rollout(
            requests=tuple(self.requests[i] for i in rows),
            log_probs=take(self.log_probs, rows),
            mask=take(self.mask, rows),
            trace={name: take(tensor, rows) for name, tensor in self.trace.items()},
            images=None if images is None else take(images, rows),
            texts=None if texts is None else tuple(texts[i] for i in rows),
            statistics={name: take(values, rows) for name, values in self.statistics.items()},
            bare=not outputs,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What a policy draws as deployment would: n outputs, and nothing that trains it."""

    outputs: Outputs
    statistics: Mapping[str, Tensor] = field(default_factory=dict)  # [n], as those of a rollout


def take(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Take ``values[rows]`` of numbers that the host knows, without an index sent to the device."""
    import torch

    return torch.stack([values[i] for i in rows]) if rows else values[:0]


def concatenate(parts: Sequence[Rollout]) -> Rollout:
    """Join rollouts of the same policy along the sample axis."""
    import torch

    images = [part.images for part in parts if part.images is not None]
    texts = [part.texts for part in parts if part.texts is not None]
    return Rollout(
        requests=tuple(request for part in parts for request in part.requests),
        log_probs=torch.cat([part.log_probs for part in parts]),
        mask=torch.cat([part.mask for part in parts]),
        trace={name: torch.cat([part.trace[name] for part in parts]) for name in parts[0].trace},
        images=torch.cat(images) if images else None,
        texts=tuple(text for part in texts for text in part) if texts else None,
        statistics={
            name: torch.cat([part.statistics[name] for part in parts])
            for name in parts[0].statistics
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardMatrix:
    """Raw rewards of one rollout over all processes; nothing is weighted before this exists.

    ``NaN`` means that the objective does not apply to the sample; infinities are rejected.
    """

    names: tuple[str, ...]  # length K
    values: Tensor  # [K, N] float64 on the CPU, each objective in its own unit
    groups: Tensor  # [N] int64, globally unique id of the prompt draw
    prompts: tuple[str, ...]  # length N
    extra: tuple[Mapping[str, Any], ...] = ()  # N, or empty: "<objective>/<column>" -> JSON value

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[0] != len(self.names):
            raise ValueError(
                f"Parameter `values` should have shape [K, N] with K = {len(self.names)}. "
                f"Found {tuple(self.values.shape)}."
            )
        samples = self.values.shape[1]
        if self.groups.shape != (samples,) or len(self.prompts) != samples:
            raise ValueError(
                f"Parameters `groups` and `prompts` should have length N = {samples}. "
                f"Found {tuple(self.groups.shape)} and {len(self.prompts)}."
            )
        if self.extra and len(self.extra) != samples:
            raise ValueError(
                f"Parameter `extra` should be empty or have length N = {samples}. "
                f"Found {len(self.extra)}."
            )
        if self.values.isinf().any():
            raise ValueError("Parameter `values` should be finite or NaN. Found an infinity.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveStats:
    """All that a weighting sees of one rollout: global, detached, equal on every process."""

    step: int  # rollouts finished before this one
    rewards: RewardMatrix
    advantages: Tensor  # [K, N] float64, after the normalizer's first stage; 0 where NaN
    gramian: Tensor | None = None  # [K, K] float64, of the objectives' policy gradients
    win_rates: Tensor | None = None  # [K, N] float64, of `WinRate`; NaN: does not apply
