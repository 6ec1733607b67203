"""What the trainer asks of a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moa_diffusion.policies.copies import AdapterCopy
from moa_diffusion.types import Generated, Request, Rollout


class Terms(NamedTuple):
    """What the loss of decisions ``[n, t]`` is made of, with gradient."""

    log_probs: Tensor  # what advantages are multiplied with
    kl: Tensor | None = None  # to the reference; None if it was not asked for
    pull: Tensor | None = None  # towards copies of the adapter, weighted; None if there are none
    norm: Tensor | None = None  # of the velocity over the reference's; None if it was not asked for
    moved: Tensor | None = None  # what the clip measures, constant; None if that is the log ratio


class Policy(Protocol):
    """A generative model with a small trainable part and a frozen reference inside it.

    The reference is the same model with the adapter switched off, never a second copy: the base
    model, also where training starts from trained LoRA weights (``policy.adapter``).
    """

    dtype: torch.dtype  # the forward pass's; adapter and log-probabilities are float32
    dimensions: int  # numbers that a decision's log-probability is a mean over; 1 if it is none
    # How rows lie in a tapped layer's input, while log-probabilities are computed:
    row_per_sample: bool  # a row holds all decisions of a sample, instead of one
    row_copies: int  # all stand there so often, one set after the other: 2 with guidance
    # Whether each forward and backward pass is a collective operation: all ranks make as many.
    lockstep: bool
    # Copies of the trainable parameters that follow them, once per rollout, by name.
    copies: Mapping[str, AdapterCopy]

    def prepare(self, prompts: Sequence[str]) -> None:
        """Do once what depends on the prompts alone; called before the first rollout."""
        ...

    def expect(self, prompts: Sequence[str]) -> None:
        """Make ready for these, which come next, if ``prepare`` could not keep what it found.

        Called with this process's prompts of a rollout, or of an evaluation, before they are drawn.
        """
        ...

    def sample(self, requests: Sequence[Request], *, step: int) -> Rollout:
        """Draw one batch without gradient.

        Args:
            requests: N samples to draw; each depends on its own seed alone.
            step: The rollout's number, from which choices shared by all ranks are derived.
        """
        ...

    def trained_steps(self, step: int) -> Sequence[int]:
        """Return the numbers of the decisions that are the T of rollout ``step``.

        What is true of a decision (how its log-probability rounds, say) is true of its number, in
        whichever column of a rollout it stands. Equal on all ranks.
        """
        ...

    def log_probs(self, rollout: Rollout, steps: slice, *, with_kl: bool = False) -> Terms:
        """Return log-probabilities ``[n, t]`` of the decisions in ``steps``, with gradient.

        Args:
            rollout: N samples that ``sample`` drew.
            steps: Part of the T decisions, as ``step_chunks`` cuts them.
            with_kl: Whether to compare with the reference as well: the KL, and of images the norm.
        """
        ...

    def generate(self, requests: Sequence[Request]) -> Generated:
        """Draw as deployment would: without exploration noise."""
        ...

    def trainable(self) -> Mapping[str, nn.Parameter]:
        """Return the parameters being trained, float32, by stable names."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Have the policy be its own reference within the block: the base model."""
        ...

    def tapped(self) -> Sequence[Any]:
        """Return the layers that hand over the gradients of all objectives in one backward pass.

        They are ``moa_diffusion.training.gradients.Layer``. Trainable parameters outside them are
        differentiated once per objective.
        """
        ...

    def row_tokens(self, rollout: Rollout) -> int | None:
        """Return how many tokens a row of ``log_probs`` has; None if layers see other numbers.

        With it, layers are understood that are given rows and tokens as one axis, row by row.
        """
        ...

    def step_chunks(self, decisions: int) -> list[slice]:
        """Return the cuts of the T decisions; each is one forward and backward pass."""
        ...

    def save(self, folder: Path) -> None:
        """Write the adapter in the form that the model's own library loads."""
        ...
