"""Values as JSON has them, which knows no NaN and no infinity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def without_nan(value: Any) -> Any:
    """Return the value with null (None) for every number that is not finite, and texts for keys.

    Args:
        value: Nested mappings, lists and tuples of values that JSON knows otherwise.
    """
    if isinstance(value, Mapping):
        return {str(key): without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
