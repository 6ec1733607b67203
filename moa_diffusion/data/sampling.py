"""Which samples are drawn at which step: prompt sets and groups.

Everything here is a pure function of (run seed, step): there is no iterator to save, a resumed run
asks for the next step, and any number of processes draws the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from moa_diffusion.data.prompt_files import Prompt
from moa_diffusion.data.seeds import derive_seed, generator
from moa_diffusion.types import Request


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
        sets: At least one; their weights are positive.
    """

    def __init__(self, sets: Sequence[PromptSet]) -> None:
        self.sets = tuple(sets)
        self._weights = [Fraction(str(prompts.weight)) for prompts in self.sets]  # 0.1 is 1/10

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """All prompts, set by set."""
        return tuple(prompt for part in self.sets for prompt in part.prompts)

    def locate(self, draw: int) -> tuple[int, int]:
        """Return the set that a draw (from 0) falls to, and how many draws fell to it before."""
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
        """Return one line for the log: size and share of each set."""
        total = sum(self._weights)
        return f"{len(self.sets)} prompt sets: " + ", ".join(
            f"{len(part.prompts)} prompts in {float(100 * weight / total):.3g} % of the draws"
            for part, weight in zip(self.sets, self._weights, strict=True)
        )


def in_turn(sets: Sequence[Sequence[Prompt]]) -> tuple[Prompt, ...]:
    """Return the first prompt of each set, the second of each, and so on until all are through."""
    longest = max(map(len, sets), default=0)
    return tuple(part[i] for i in range(longest) for part in sets if i < len(part))


class GroupSampler:
    """Draws P prompts per step, each for G siblings; every prompt set comes in shuffled epochs.

    Args:
        prompts: The prompt set, or a mixture of several.
        groups: Number P of prompt draws per step.
        group_size: Number G of siblings per draw.
        seed: The run's seed.
        shared_start: Whether siblings start from the same noise, so that their rewards differ by
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
        """Return all ``N = P * G`` requests of a step, siblings side by side.

        They are equal on every rank.
        """
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
