"""Options of a head against the annotations of its parameters, before the head sees them.

What comes from a YAML file or a command line is a number, a text, true, false, null, a list or a
mapping. So those are checked, alone, in unions and inside lists and mappings; an annotation that
says something else is not, nor one that cannot be resolved at run time.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, Unpack, get_args, get_origin, get_type_hints

from rewards.suggestions import did_you_mean

_WORDS = {
    type(None): "null",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
}


class UnknownOption(ValueError):
    """A head has no such option; what it has is in ``valid``."""

    def __init__(self, head: str, option: str, valid: Sequence[str]) -> None:
        super().__init__(
            f'Reward head "{head}" has no option "{option}".{did_you_mean(option, valid)} '
            f"Valid options: {', '.join(valid) or 'none'}."
        )
        self.option, self.valid = option, tuple(valid)


def check_names(head: str, named: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Check that options are among those of a head.

    Args:
        head: Name of the head, for the message.
        named: Its options, with defaults.
        options: Values by name.

    Raises:
        UnknownOption: If one is not; names the nearest that is.
    """
    for option in options:
        if option not in named:
            raise UnknownOption(head, option, list(named))


def check_complete(head: str, named: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Check that none is missing of those without a default (``inspect.Parameter.empty``).

    Args:
        head: The head's name, for messages.
        named: Defaults by parameter.
        options: The options that are given.

    Raises:
        ValueError: If one is.
    """
    empty = inspect.Parameter.empty
    missing = [key for key in named if named[key] is empty and key not in options]
    if missing:
        raise ValueError(
            f'Reward head "{head}" needs the option{"s" if len(missing) > 1 else ""} '
            f"{', '.join(missing)}. Valid options: {', '.join(named)}."
        )


def options_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the options of a head, with their types and defaults.

    ``**options`` of a constructor stands for the keys of its ``Unpack[...]``, whose defaults are
    those of the base class; without, it stands for nothing: a misspelt option must not vanish in
    it.

    Args:
        target: The class or function whose parameters they are.

    Returns:
        Parameters by name; a type that cannot be resolved at run time is ``Any``.
    """
    options = {}
    for parameter in inspect.signature(target).parameters.values():
        annotation = _resolved(target, parameter.annotation)
        if parameter.kind is not parameter.VAR_KEYWORD:
            options[parameter.name] = parameter.replace(annotation=annotation)
        elif get_origin(annotation) is Unpack and isinstance(target, type):
            base = options_of(target.__mro__[1])
            for name, hint in get_type_hints(get_args(annotation)[0]).items():
                options[name] = base[name].replace(annotation=hint)
    return options


def check_types(head: str, target: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Check the types of options.

    An integer will do for a ``float``; true and false are no numbers; a tuple will do for a list.

    Args:
        head: Name of the head, for the message.
        target: The class or function whose parameters they are.
        options: Values by name.

    Raises:
        ValueError: If one has another type than its parameter's annotation says.
    """
    known = options_of(target)
    for option, value in options.items():
        expected = known[option].annotation
        if not _fits(value, expected):
            raise ValueError(
                f'Option `{option}` of the reward head "{head}" should be {words_of(expected)}. '
                f"Found `{option} = {value!r}`, {_kind_of(value)}.{_hint(value, expected)}"
            )


def _resolved(target: Callable[..., Any], annotation: Any) -> Any:
    if not isinstance(annotation, str):
        return annotation
    while isinstance(target, partial):
        target = target.func
    if isinstance(target, type):
        target = _method(target, "__init__")
    elif not inspect.isroutine(target):  # an object with `__call__`
        target = _method(type(target), "__call__")
    function = inspect.unwrap(target)
    if inspect.ismethod(function):
        function = function.__func__
    names = function.__globals__ if inspect.isfunction(function) else {}
    try:
        return eval(annotation, names)
    except Exception:  # a name that is imported for type checkers only, or anything
        return Any


def _method(kind: type, name: str) -> Callable[..., Any]:
    # Looked up, since type checkers take `kind.__init__` for that of an instance.
    owner = next(base for base in kind.__mro__ if name in vars(base))
    method: Callable[..., Any] = vars(owner)[name]
    return method


def _fits(value: Any, expected: Any) -> bool:
    origin, inner = get_origin(expected), get_args(expected)
    if origin is Annotated:
        return _fits(value, inner[0])
    if origin is Union or origin is types.UnionType:
        return any(_fits(value, kind) for kind in inner)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    kind = origin or expected
    if kind is None or kind is type(None):
        return value is None
    if kind is bool or kind is str:
        return isinstance(value, kind)
    if kind is int or kind is float:
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind in (list, tuple, Sequence):
        return isinstance(value, (list, tuple)) and _each_fits(value, kind, inner)
    if kind in (dict, Mapping):
        if not isinstance(value, Mapping):
            return False
        key, cell = inner or (Any, Any)
        return all(_fits(k, key) and _fits(v, cell) for k, v in value.items())
    return True


def _each_fits(values: Sequence[Any], kind: Any, inner: tuple[Any, ...]) -> bool:
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        return len(values) == len(inner) and all(map(_fits, values, inner))
    return all(_fits(value, inner[0]) for value in values) if inner else True


def words_of(expected: Any) -> str:
    """Return in words what a type stands for, to follow "should be"."""
    origin, inner = get_origin(expected), get_args(expected)
    if origin is Annotated:
        return words_of(inner[0])
    if origin is Union or origin is types.UnionType:
        return " or ".join(words_of(kind) for kind in inner)
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    kind = origin or expected
    if kind in (list, tuple, Sequence):
        kinds = dict.fromkeys(words_of(one) for one in inner if one is not Ellipsis)
        return f"a list (of {', '.join(kinds)})" if kinds else "a list"
    if kind in (dict, Mapping):
        cells = words_of(inner[1]) if inner else "anything"
        return f"a mapping (to {cells})"
    return _WORDS.get(kind, "anything" if kind is Any else inspect.formatannotation(kind))


def _kind_of(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, Mapping):
        return "a mapping"
    return _WORDS.get(type(value), type(value).__name__)


def _hint(value: Any, expected: Any) -> str:
    # YAML reads `"4"` as a text, and `1e-3` too: its numbers with an exponent have a point.
    if not isinstance(value, str):
        return ""
    for kind in (int, float):
        try:
            number = kind(value)
        except ValueError:
            continue
        if _fits(number, expected):
            return f" Write the number {number!r} without quotes, with a point before an exponent."
    return ""
