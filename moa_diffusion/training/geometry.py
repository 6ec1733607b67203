"""How a rollout is cut over processes, optimizer steps and forward passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moa_diffusion.data.seeds import generator
from moa_diffusion.types import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How one rollout is cut over processes, optimizer steps and forward passes."""

    groups: int  # P
    group_size: int  # G
    updates: int  # optimizer steps per rollout
    world_size: int
    sample_batch: int  # samples per forward while sampling
    micro_batch: int  # samples per forward while training

    @property
    def samples(self) -> int:
        """N, over all processes."""
        return self.groups * self.group_size

    @property
    def per_rank(self) -> int:
        """n, samples of one process."""
        return self.samples // self.world_size

    @property
    def per_update(self) -> int:
        """Samples per optimizer step and process."""
        return self.per_rank // self.updates

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step and process."""
        return self.per_update // self.micro_batch

    @classmethod
    def solve(
        cls,
        *,
        groups: int,
        group_size: int,
        updates: int,
        world_size: int,
        max_sample_batch: int,
        max_micro_batch: int,
        equal_rows: int | None = None,
    ) -> Geometry:
        """Return the largest batches within the two limits that cut each process's share evenly.

        Where the limits themselves do, any number of processes makes the same forward passes, of
        the same samples, and all of them train the same parameters to the last bit.

        Args:
            groups: The number P of prompts.
            group_size: The number G of samples per prompt.
            updates: Optimizer steps per rollout.
            world_size: The number of processes.
            max_sample_batch: Limit of the first batch.
            max_micro_batch: Limit of the second.
            equal_rows: If a forward pass shall have as many rows in training, where a sample has
                so many (its decisions), as in sampling, where it has one: kernels of half
                precision round by the number of rows. If no two batches fit, they stay unequal.

        Raises:
            ConfigError: If the samples cannot be shared evenly; the message names the numbers.
        """
        samples = groups * group_size
        if samples % (world_size * updates):
            raise ConfigError(
                "`trainer.groups` * `trainer.group_size` should be a multiple of the number of "
                f"processes * `trainer.updates`. Found {groups} * {group_size} = {samples} "
                f"samples for {world_size} processes * {updates} updates."
            )
        per_rank = samples // world_size
        sample_batch = _largest_divisor(per_rank, max_sample_batch)
        micro_batch = _largest_divisor(per_rank // updates, max_micro_batch)
        if equal_rows is not None:
            for size in range(micro_batch, 0, -1):
                rows = size * equal_rows
                fits = rows <= max_sample_batch and per_rank % rows == 0
                if fits and per_rank // updates % size == 0:
                    sample_batch, micro_batch = rows, size
                    break
        return cls(
            groups=groups,
            group_size=group_size,
            updates=updates,
            world_size=world_size,
            sample_batch=sample_batch,
            micro_batch=micro_batch,
        )

    def describe(self) -> str:
        """Return one line for the log, printed before anything expensive starts."""
        return (
            f"{self.groups} groups x {self.group_size} siblings = {self.samples} samples per "
            f"rollout on {self.world_size} process{'es' if self.world_size > 1 else ''}: "
            f"{self.per_rank} each, sampled {self.sample_batch} at a time; {self.updates} "
            f"optimizer step{'s' if self.updates > 1 else ''} of "
            f"{self.samples // self.updates} samples ({self.accumulation} micro-batches of "
            f"{self.micro_batch} per process)"
        )

    def minibatches(self, *, seed: int, step: int, rank: int) -> list[Tensor]:
        """Return the local sample indices of each optimizer step, cut into micro-batches.

        Every block of ``updates`` neighbouring samples sends one to each optimizer step, in a
        random order drawn for the block: so each process has equally many samples in each step,
        siblings are shared out over the steps, and the global minibatches do not depend on the
        number of processes.

        Args:
            seed: The run's seed.
            step: Rollouts finished before this one; each has an order of its own.
            rank: The process whose indices are returned.

        Returns:
            One int64 tensor ``[accumulation, micro_batch]`` per optimizer step.
        """
        blocks = self.samples // self.updates
        draws = torch.rand(blocks, self.updates, generator=generator(seed, "minibatches", step))
        order = draws.argsort(dim=1) + torch.arange(blocks)[:, None] * self.updates  # [blocks, U]
        local_blocks = order.view(self.world_size, -1, self.updates)[rank]
        local = local_blocks - rank * self.per_rank
        return [part.reshape(self.accumulation, self.micro_batch) for part in local.T]

    def probe(self, share: float, *, seed: int, step: int, rank: int) -> list[Tensor]:
        """Return the local sample indices of the micro-batches on which gradients are measured.

        Those of the first optimizer steps, of the last of these evenly spaced ones: all processes
        together make the passes that one process would make, and each its share of them to within
        one per optimizer step.

        Args:
            share: Share of all micro-batches of the rollout, in (0, 1]; at least one is taken.
            seed: As for ``minibatches``.
            step: As for ``minibatches``.
            rank: As for ``minibatches``.

        Returns:
            Int64 tensors ``[micro_batch]``.
        """
        each = self.accumulation * self.world_size  # micro-batches of an optimizer step
        left = max(1, round(share * each * self.updates))
        chosen: list[Tensor] = []
        for index in self.minibatches(seed=seed, step=step, rank=rank):
            taken = min(left, each)
            left -= taken
            places = {(2 * i + 1) * each // (2 * taken) for i in range(taken)}
            first = rank * self.accumulation
            chosen += [index[i] for i in range(self.accumulation) if first + i in places]
        return chosen


def _largest_divisor(total: int, limit: int) -> int:
    return next(size for size in range(min(total, limit), 0, -1) if total % size == 0)
