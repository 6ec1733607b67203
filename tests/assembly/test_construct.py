"""Options to objects: what a class takes, and the key that an error is about."""

from __future__ import annotations

import pytest

from moa_diffusion.assembly.construct import construct
from moa_diffusion.types import ConfigError


class Rule:
    def __init__(self, names: tuple[str, ...], *, rate: float = 0.5) -> None:
        if rate <= 0:
            raise ValueError(f"Parameter `rate` should be positive. Found `rate = {rate}`.")
        self.names, self.rate = names, rate


def test_options_and_fixed_arguments_reach_the_class():
    rule = construct(Rule, "rule", {"rate": 2.0}, {"names": ("a",)})
    assert (rule.names, rule.rate) == (("a",), 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rat": 1}, r"^rule\.rat: unknown option of Rule\. Did you mean 'rate'\? Valid: rate\.$"),
        ({"names": ()}, r"^rule\.names: unknown option of Rule\..* Valid: rate\.$"),
        ({"rate": 0}, r"^rule: Parameter `rate` should be positive\. Found `rate = 0`\.$"),
        ({"rate": "x"}, r"^rule: "),
    ],
)
def test_an_error_begins_with_the_key(options, message):
    with pytest.raises(ConfigError, match=message):
        construct(Rule, "rule", options, {"names": ("a",)})
