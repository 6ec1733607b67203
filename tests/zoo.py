"""The matrix zoo: the reward matrices that every normalizer and every weighting must survive.

Three objectives ``a``, ``b``, ``c``; four groups of four siblings unless the name says otherwise. A
test that takes the fixture ``zoo`` runs once per matrix. Suites of many members take ``matrices``
instead, and go through them in one test: a test for each pair would cost more than what it checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor

from moa_diffusion.types import RewardMatrix

NAMES = ("a", "b", "c")
NAN = float("nan")


def matrix(values: Tensor, groups: Tensor | None = None) -> RewardMatrix:
    """A reward matrix ``[K, N]`` in groups of four; each group has its own prompt."""
    if groups is None:
        groups = torch.arange(values.shape[1]) // 4
    return RewardMatrix(
        names=NAMES,
        values=values.double(),
        groups=groups,
        prompts=tuple(f"prompt {group}" for group in groups.tolist()),
    )


def normal(*, seed: int = 0, groups: int = 4) -> Tensor:
    """Three objectives of different location and spread, ``[3, 4 * groups]``."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(3, 4 * groups, generator=generator, dtype=torch.float64)
    return draw * torch.tensor([[1.0], [0.1], [5.0]]) + torch.tensor([[0.0], [0.6], [21.0]])


def _changed(rows: object, columns: object, value: float) -> Tensor:
    values = normal()
    values[rows, columns] = value
    return values


def _residue() -> Tensor:
    """Equal up to the last bits of a float64: rounding, not signal."""
    values = torch.tensor([[0.1], [0.6], [21.7]], dtype=torch.float64).repeat(1, 16)
    values[:, 1::3] *= 1 + 2**-52
    values[:, 2::3] *= 1 - 2**-52
    return values


def _zoo() -> dict[str, RewardMatrix]:
    everything, first_group = slice(None), slice(0, 4)
    scattered = normal()
    scattered[0, [1, 5, 6]] = NAN
    scattered[1, [0, 1, 9]] = NAN
    scattered[2, [1, 15]] = NAN  # sample 1 has no reward at all
    mixed = normal() * torch.tensor([[1e-10], [1.0], [1e10]], dtype=torch.float64)
    ties = (normal() > normal().median(1, keepdim=True).values).double()
    flat_group_and_nan = _changed(everything, first_group, 0.3)
    flat_group_and_nan[0, [4, 5, 9]] = NAN
    shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    return {
        "plain": matrix(normal()),
        "zero_variance_objective": matrix(_changed(1, everything, 0.6)),
        "zero_variance_group": matrix(_changed(everything, first_group, 0.3)),
        "zero_variance": matrix(_changed(everything, everything, 0.1)),
        "zero_variance_huge": matrix(_changed(everything, everything, 0.1e10)),
        "residue": matrix(_residue()),
        "nan_samples": matrix(scattered),
        "nan_group": matrix(_changed(1, first_group, NAN)),
        "nan_objective": matrix(_changed(1, everything, NAN)),
        "nan": matrix(_changed(everything, everything, NAN)),
        "nan_but_one": matrix(torch.where(torch.arange(16) == 3, normal(), NAN)),
        "nan_beside_zero_variance_group": matrix(flat_group_and_nan),
        "tiny": matrix(normal() * 1e-10),
        "huge": matrix(normal() * 1e10),
        "mixed_scales": matrix(mixed),
        "ties": matrix(ties),
        "one_group": matrix(normal(groups=1)),
        "groups_of_one": matrix(normal(), torch.arange(16)),
        "uneven_groups": matrix(normal(), torch.tensor([7] * 2 + [3] * 9 + [10**12] * 5)),
        "shuffled_groups": matrix(normal(), shuffled // 4),
    }


ZOO = _zoo()


@pytest.fixture(params=ZOO)
def zoo(request: pytest.FixtureRequest) -> RewardMatrix:
    """One matrix of the zoo per test."""
    return ZOO[request.param]


@pytest.fixture(scope="session")
def matrices() -> dict[str, RewardMatrix]:
    """The whole zoo by name."""
    return ZOO


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"Matrix of the zoo: {name}.")
        raise


@pytest.fixture(scope="session")
def naming() -> Callable[[str], AbstractContextManager[None]]:
    """``with naming("ties"):`` what fails in it says with which matrix."""
    return _naming
