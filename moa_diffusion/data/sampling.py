"""Which samples are drawn at which step: prompt sets, groups, seeds, and the batch geometry.

Everything here is a pure function of (run seed, step): there is no iterator to save, a resumed run
asks for the next step, and any number of processes draws the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b

import torch
from torch import Tensor

from moa_diffusion.data.prompt_files import Prompt as Prompt
from moa_diffusion.data.prompt_files import read_prompts as read_prompts
from moa_diffusion.types import ConfigError, Request


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any tuple of integers and strings; equal on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by ``derive_seed``."""
    return torch.Generator("cpu").manual_seed(derive_seed(*parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Prompts that are drawn together, in shuffled epochs of their own."""

    prompts: tuple[Prompt, ...]
    weight: float = 1.0  # draws, relative to those of the other sets


class Mixture:
    """Several prompt sets, drawn in proportion to their weights.

    The j-th draw of a set (from 0) falls due at the time (j + 1/2) / weight, and draws are made as
    they fall due, in a tie the earlier set's first: Webster's (Sainte-Lague's) apportionment, which
    as a schedule is called stride scheduling. After n draws, a set with the share p among K sets
    has been drawn within (1 + p (K - 2)) / 2 of p n times, so every rollout has about its share of
    each set, where independent draws would miss it by the square root of their number. It is exact
    arithmetic on the draw's number: nothing to save, and the same on every machine.

    Args:
        sets: at least one; their weights are positive.
    """

    def __init__(self, sets: Sequence[PromptSet]) -> None:
        self.sets = tuple(sets)
        self._weights = [Fraction(str(prompts.weight)) for prompts in self.sets]  # 0.1 is 1/10

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """All prompts, set by set."""
        return tuple(prompt for part in self.sets for prompt in part.prompts)

    def locate(self, draw: int) -> tuple[int, int]:
        """The set that a draw (from 0) falls to, and how many draws have fallen to it before."""
        half = Fraction(1, 2)
        # At this time at most `draw` draws are due, and at least `draw` less the number of sets.
        time = max(Fraction(0), (draw - half * len(self.sets)) / sum(self._weights))
        counts = [math.floor(time * weight + half) for weight in self._weights]
        while True:
            due = [(count + half) / w for count, w in zip(counts, self._weights, strict=True)]
            number = due.index(min(due))
            if sum(counts) == draw:
                return number, counts[number]
            counts[number] += 1

    def describe(self) -> str:
        """One line for the log: size and share of each set."""
        total = sum(self._weights)
        return f"{len(self.sets)} prompt sets: " + ", ".join(
            f"{len(part.prompts)} prompts in {float(100 * weight / total):.3g} % of the draws"
            for part, weight in zip(self.sets, self._weights, strict=True)
        )


def in_turn(sets: Sequence[Sequence[Prompt]]) -> tuple[Prompt, ...]:
    """The first prompt of each set, the second of each, and so on until all are through."""
    longest = max(map(len, sets), default=0)
    return tuple(part[i] for i in range(longest) for part in sets if i < len(part))


class GroupSampler:
    """Draws P prompts per step, each for G siblings; every prompt set comes in shuffled epochs.

    Args:
        prompts: the prompt set, or a mixture of several.
        groups: P, prompt draws per step.
        group_size: G, siblings per draw.
        seed: the run's seed.
        shared_start: whether siblings start from the same noise, so that their rewards differ by
            what the policy did alone (DanceGRPO, arXiv 2505.07818).
    """

    def __init__(
        self,
        prompts: Sequence[Prompt] | Mixture,
        *,
        groups: int,
        group_size: int,
        seed: int,
        shared_start: bool = False,
    ) -> None:
        if not isinstance(prompts, Mixture):
            prompts = Mixture([PromptSet(prompts=tuple(prompts))])
        self.mixture = prompts
        self.prompts = prompts.prompts
        self.groups = groups
        self.group_size = group_size
        self.seed = seed
        self.shared_start = shared_start

    def requests(self, step: int) -> tuple[Request, ...]:
        """All ``N = P * G`` requests of a step, siblings side by side; equal on every rank."""
        return tuple(
            Request(
                prompt=prompt.text,
                metadata=prompt.metadata,
                group=draw,
                sibling=sibling,
                seed=derive_seed(self.seed, "sample", step, draw, sibling),
                start_seed=start,
            )
            for draw in range(step * self.groups, (step + 1) * self.groups)
            for prompt in [self._prompt(draw)]
            for start in [derive_seed(self.seed, "start", draw) if self.shared_start else None]
            for sibling in range(self.group_size)
        )

    def _prompt(self, draw: int) -> Prompt:
        number, count = self.mixture.locate(draw)
        prompts = self.mixture.sets[number].prompts
        epoch, position = divmod(count, len(prompts))
        # The first set is drawn in the order in which it would be alone.
        parts = ("epoch", epoch, number) if number else ("epoch", epoch)
        order = torch.randperm(len(prompts), generator=generator(self.seed, *parts))
        return prompts[int(order[position])]


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
        """The largest batches within the two limits that cut each process's share evenly.

        Where the limits themselves do, any number of processes makes the same forward passes, of
        the same samples, and all of them train the same parameters to the last bit.

        Args:
            groups: P.
            group_size: G.
            updates: optimizer steps per rollout.
            world_size: processes.
            max_sample_batch: limit of the first batch.
            max_micro_batch: limit of the second.
            equal_rows: if a forward pass shall have as many rows in training, where a sample has
                so many (its decisions), as in sampling, where it has one: kernels of half
                precision round by the number of rows. If no two batches fit, they stay unequal.

        Raises:
            ConfigError: if the samples cannot be shared evenly; the message names the numbers.
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
        """One line for the log, printed before anything expensive starts."""
        return (
            f"{self.groups} groups x {self.group_size} siblings = {self.samples} samples per "
            f"rollout on {self.world_size} process{'es' if self.world_size > 1 else ''}: "
            f"{self.per_rank} each, sampled {self.sample_batch} at a time; {self.updates} "
            f"optimizer step{'s' if self.updates > 1 else ''} of "
            f"{self.samples // self.updates} samples ({self.accumulation} micro-batches of "
            f"{self.micro_batch} per process)"
        )

    def minibatches(self, *, seed: int, step: int, rank: int) -> list[Tensor]:
        """Local sample indices of each optimizer step, cut into micro-batches.

        Every block of ``updates`` neighbouring samples sends one to each optimizer step, in a
        random order drawn for the block: so each process has equally many samples in each step,
        siblings are spread over the steps, and the global minibatches do not depend on the number
        of processes.

        Returns:
            one int64 tensor ``[accumulation, micro_batch]`` per optimizer step.
        """
        blocks = self.samples // self.updates
        scores = torch.rand(blocks, self.updates, generator=generator(seed, "minibatches", step))
        order = scores.argsort(dim=1) + torch.arange(blocks)[:, None] * self.updates  # [blocks, U]
        local_blocks = order.view(self.world_size, -1, self.updates)[rank]
        local = local_blocks - rank * self.per_rank
        return [part.reshape(self.accumulation, self.micro_batch) for part in local.T]

    def probe(self, share: float, *, seed: int, step: int, rank: int) -> list[Tensor]:
        """Local sample indices of the micro-batches on which gradients are measured.

        Those of the first optimizer steps, of the last of these evenly spaced ones: all processes
        together make the passes that one process would make, and each its share of them to within
        one per optimizer step.

        Args:
            share: of all micro-batches of the rollout, in (0, 1]; at least one is taken.
            seed: as for ``minibatches``.
            step: likewise.
            rank: likewise.

        Returns:
            int64 tensors ``[micro_batch]``.
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
