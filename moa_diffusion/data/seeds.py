"""Seeds derived from names, equal on every machine and for any number of processes."""

from __future__ import annotations

from hashlib import blake2b

import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed from any tuple of integers and strings; equal on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded by ``derive_seed``."""
    return torch.Generator("cpu").manual_seed(derive_seed(*parts))
