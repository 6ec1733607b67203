"""Options to objects, with errors that name the key."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from moa_diffusion.types import ConfigError
from rewards.suggestions import did_you_mean

T = TypeVar("T")


def construct(
    kind: Callable[..., T], key: str, options: Mapping[str, Any], fixed: Mapping[str, Any]
) -> T:
    """Return ``kind(**options, **fixed)``.

    Args:
        kind: The class that is constructed.
        key: The dotted key that the options stand under.
        options: Options from the configuration.
        fixed: Further arguments, which are no options.

    Raises:
        ConfigError: For an unknown option or a bad value.
    """
    valid = [name for name in inspect.signature(kind).parameters if name not in fixed]
    for option in options:
        if option not in valid:
            raise ConfigError(
                f"{key}.{option}: unknown option of {kind.__name__}.{did_you_mean(option, valid)} "
                f"Valid: {', '.join(valid) or 'none'}."
            )
    try:
        return kind(**options, **fixed)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}: {error}") from error
