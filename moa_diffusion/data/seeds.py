"""Seeds derived from names, equal on every machine and for any number of processes."""

from __future__ import annotations

from hashlib import blake2b

import torch

from moa_diffusion.types import ConfigError


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed from any tuple of integers and strings; equal on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded by ``derive_seed``."""
    return torch.Generator("cpu").manual_seed(derive_seed(*parts))


def read_seeds(text: str, *, first: int = 0) -> tuple[int, ...]:
    """Return the seeds that ``--seeds`` stands for: ``3`` the first three, ``0,4,7`` these.

    Args:
        text: A number of seeds, or seeds with commas; one seed by itself is ``7,``.
        first: The first seed of a number of them.

    Raises:
        ConfigError: If it is neither.
    """
    expected = "should be a number of seeds, or different seeds with commas such as 0,1,2"
    words = [word.strip() for word in text.split(",")]
    try:
        numbers = tuple(int(word) for word in words if word)
    except ValueError:
        raise ConfigError(f"--seeds: {expected}. Found {text!r}.") from None
    if len(words) == 1 and numbers and numbers[0] > 0:
        return tuple(range(first, first + numbers[0]))
    if len(words) == 1 or not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        alone = f" The seed {text} alone is `{text},`." if numbers == (0,) else ""
        raise ConfigError(f"--seeds: {expected}, from 0. Found {text!r}.{alone}")
    return numbers
