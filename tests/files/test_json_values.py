"""Null for what JSON does not know."""

from __future__ import annotations

import json
import math

from moa_diffusion.files.json_values import without_nan


def test_every_number_that_is_not_finite_becomes_null():
    value = {"a": [1.5, math.nan, (math.inf, -math.inf)], 2: {"b": True, "c": None, "d": "NaN"}}
    plain = without_nan(value)
    assert plain == {"a": [1.5, None, [None, None]], "2": {"b": True, "c": None, "d": "NaN"}}
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
