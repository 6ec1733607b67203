"""What a rollout's decisions are: drawn with the images, and scored again while training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from moa_diffusion.policies import samplers
from moa_diffusion.policies.base import Terms
from moa_diffusion.policies.copies import AdapterCopy
from moa_diffusion.types import Request, Rollout

# Of a batch's prompts, and pooled ones; with guidance those of the empty prompt come first.
Embeds: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Images before they are decoded, and what trains them."""

    latents: Tensor  # [n, C, h, w] float32
    log_probs: Tensor  # [n, T]
    trace: Mapping[str, Tensor]  # leading axis n
    velocity_norm: Tensor  # [n], mean over all steps


class Decisions(Protocol):
    """A kind of decision: steps of the reverse process, or images that are noised again."""

    copies: Mapping[str, AdapterCopy]  # of the adapter, which drawing or training needs

    def trained_steps(self, step: int) -> Sequence[int]:
        """Return the numbers of the decisions of rollout ``step``: see ``Policy``."""
        ...

    def draw(self, requests: Sequence[Request], embeds: Embeds, *, step: int) -> Drawn:
        """Draw the latents of one batch, without gradient.

        Args:
            requests: The n samples to draw.
            embeds: The batch's embeddings.
            step: The rollout's number.
        """
        ...

    def terms(self, rollout: Rollout, steps: slice, embeds: Embeds, *, with_kl: bool) -> Terms:
        """Return the log-probs ``[n, t]`` of decisions with gradient, and what goes with them.

        Args:
            rollout: The n samples.
            steps: Part of the T decisions.
            embeds: Embeddings of n t rows, sample by sample.
            with_kl: Whether to return the KL to the reference as well.
        """
        ...


def initial_noise(
    requests: Sequence[Request],
    sources: Sequence[torch.Generator],
    shape: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """Return the initial noise ``[n, C, h, w]``, of the sample's own seed or its group's.

    Args:
        requests: The n samples to draw.
        sources: One generator per sample, of its own seed.
        shape: Shape ``(C, h, w)`` of the latents.
        device: Where the noise is needed.
    """
    starts = [
        source
        if request.start_seed is None
        else torch.Generator("cpu").manual_seed(request.start_seed)
        for request, source in zip(requests, sources, strict=True)
    ]
    return samplers.noise(starts, shape, device)
