"""Options of a wrong type: told by option, expectation and finding, before the head sees them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, TypedDict, Unpack

import numpy as np
import pytest

from rewards import RewardHead, available, create, register, registry
from rewards.option_types import check_types, options_of

if TYPE_CHECKING:
    from elsewhere import Unknown


class Many(RewardHead):
    """Takes what there is."""

    def __init__(
        self,
        size: int = 1,
        share: float = 0.5,
        name: str = "",
        flag: bool = False,
        maybe: str | None = None,
        older: Optional[int] = None,  # noqa: UP045 - users write it so
        words: Sequence[str] = (),
        either: str | Sequence[str] = "",
        table: Mapping[str, float] | None = None,
        numbers: list[int] | None = None,
        pair: tuple[int, str] = (1, "a"),
        kind: Literal["a", "b"] = "a",
        noted: Annotated[int, "positive"] = 1,
        anything: Any = None,
        unknown: Unknown = None,
        bare: list | dict | None = None,
        free=None,
    ) -> None: ...

    def score(self, batch: Any) -> Any: ...


class Heir(Many):
    """Has the constructor of its base."""


GOOD = [
    {"size": 3},
    {"size": np.int64(3)},
    {"share": 1},
    {"share": 0.5},
    {"share": np.float32(0.5)},
    {"name": "x"},
    {"flag": True},
    {"maybe": None},
    {"older": None},
    {"older": 3},
    {"words": ["a", "b"]},
    {"words": ()},
    {"either": "a"},
    {"either": ["a"]},
    {"table": {"a": 1, "b": 0.5}},
    {"numbers": (1, 2)},
    {"pair": [1, "a"]},
    {"kind": "b"},
    {"anything": object},
    {"unknown": 3},
    {"free": "x"},
    {"bare": [1]},
]
WRONG = [
    ({"size": "abc"}, "`size` .* should be an integer. Found `size = 'abc'`, a text"),
    ({"size": 1.0}, "an integer. Found `size = 1.0`, a number"),
    ({"size": True}, "an integer. Found `size = True`, true or false"),
    ({"size": "4"}, "Write the number 4 without quotes"),
    ({"share": False}, "a number. Found"),
    ({"share": "1e-3"}, r"Write the number 0\.001 without quotes, with a point"),
    ({"name": 3}, "a text. Found `name = 3`, an integer"),
    ({"flag": 1}, "true or false. Found"),
    ({"maybe": 1}, "a text or null"),
    ({"older": "x"}, "an integer or null"),
    ({"words": "ab"}, r"a list \(of a text\)"),
    ({"words": [1]}, r"a list \(of a text\)"),
    ({"either": ["a", 1]}, r"a text or a list \(of a text\)"),
    ({"table": {"a": "b"}}, r"a mapping \(to a number\) or null"),
    ({"table": [1]}, "Found `table = .*`, a list"),
    ({"numbers": [1, 2.0]}, r"a list \(of an integer\)"),
    ({"pair": [1, 2]}, r"a list \(of an integer, a text\)"),
    ({"pair": [1]}, "a list"),
    ({"kind": "c"}, "one of 'a', 'b'"),
    ({"noted": "x"}, "an integer"),
    ({"bare": 3}, r"a list or a mapping \(to anything\) or null"),
]


@pytest.mark.parametrize("options", GOOD, ids=str)
@pytest.mark.parametrize("kind", [Many, Heir])
def test_what_fits_passes(kind: type[RewardHead], options: dict[str, Any]) -> None:
    check_types("many", kind, options)


@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
@pytest.mark.parametrize("kind", [Many, Heir])
def test_what_does_not_fit_is_told(
    kind: type[RewardHead], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_types("many", kind, options)
    assert 'of the reward head "many" should be' in str(caught.value)


class Common(TypedDict, total=False):
    """What all heads of a kind have."""

    device: str
    sizes: list[int]


class Base(RewardHead):
    """Gives them their defaults."""

    def __init__(self, *, model: str, device: str = "auto", sizes: Sequence[int] = ()) -> None:
        self.given = (model, device, sizes)

    def score(self, batch: Any) -> Any: ...


class Listing(Base):
    """Lists its own options only."""

    def __init__(self, model: str = "m", **options: Unpack[Common]) -> None:
        super().__init__(model=model, **options)


def test_options_in_common_are_options_of_each_head() -> None:
    options = options_of(Listing)
    assert {name: option.default for name, option in options.items()} == {
        "model": "m",
        "device": "auto",
        "sizes": (),
    }
    assert options["sizes"].annotation == list[int]
    assert list(options_of(Many)) == [
        *("size", "share", "name", "flag", "maybe", "older", "words", "either", "table"),
        *("numbers", "pair", "kind", "noted", "anything", "unknown", "bare", "free"),
    ]
    check_types("listing", Listing, {"sizes": [1]})
    with pytest.raises(ValueError, match=r"`sizes` .* a list \(of an integer\)"):
        check_types("listing", Listing, {"sizes": ["1"]})


def test_a_head_is_made_with_options_in_common() -> None:
    file = f"{__file__}:Listing"
    assert create("mine", file, device="cpu").given == ("m", "cpu", ())
    with pytest.raises(ValueError, match=r"""has no option "devise"\. Did you mean 'device'"""):
        create("mine", file, devise="cpu")
    with pytest.raises(ValueError, match="should be a text"):
        create("mine", file, device=0)


class Callable:
    """A function with a state."""

    def __call__(self, images: Any, prompts: Any, words: Sequence[str] = ()) -> Any: ...


CALLABLES = [Callable(), Callable().__call__, functools.partial(Callable(), words=["a"])]


@pytest.mark.parametrize("function", CALLABLES, ids=["object", "method", "partial"])
def test_whatever_can_be_called_is_checked(function: Any) -> None:
    check_types("mine", function, {"words": ["a"]})
    with pytest.raises(ValueError, match=r"a list \(of a text\)"):
        check_types("mine", function, {"words": "a"})


@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("ocr", {"workers": "abc"}),
        ("remote", {"url": "http://a", "remote_name": "x", "batch_size": "4"}),
        ("remote", {"url": "http://a", "remote_name": "x", "retries": True}),
        ("pickscore", {"device": 0}),
        ("sharpened", {"power": "2"}),
    ],
    ids=str,
)
def test_create_checks_heads_and_functions(
    head: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    available()  # built-in modules register once per process, so before the copy is taken
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))

    @register("sharpened")
    def sharpened(images: Any, prompts: Any, power: float = 1.0) -> list[float]:
        return [power for _ in prompts]

    with pytest.raises(ValueError, match=f"Option `{list(options)[-1]}` of the reward head"):
        create(head, **options)
