"""Options to objects, with errors that name the key."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from moa_diffusion.types import ConfigError

T = TypeVar("T")


def construct(
    kind: Callable[..., T], key: str, options: Mapping[str, Any], fixed: Mapping[str, Any]
) -> T:
    """``kind(**options, **fixed)``.

    Args:
        kind: a class.
        key: dotted, of the options.
        options: from the configuration.
        fixed: further arguments, which are no options.

    Raises:
        ConfigError: for an unknown option or a bad value.
    """
    valid = [name for name in inspect.signature(kind).parameters if name not in fixed]
    for option in options:
        if option not in valid:
            raise ConfigError(
                f"{key}.{option}: unknown option of {kind.__name__}.{nearest(option, valid)} "
                f"Valid: {', '.join(valid) or 'none'}."
            )
    try:
        return kind(**options, **fixed)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}: {error}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """A question whether the nearest known name was meant; empty if none is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
