"""What the parameters of a reward function stand for: their names say it, not their order.

``f(images, prompts)``, ``f(prompts, completions, **kwargs)`` and ``f(completions, answer)`` all get
what they ask for. A parameter that is named neither for the samples nor for the prompts is an
option, or a key of the prompts' metadata. A function that names no samples is refused; only
``*args`` are filled by place, samples first.

Some names stand for samples or prompts in one code base and for a column of the data in another
(``answer``, ``question``). Those are read as samples or prompts where no plainer name is there. A
column of the data is what it is called: the prompts yield to it, and samples that have its name are
an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import Parameter
from typing import Any, Literal

from rewards.base import Scored

Role = Literal["images", "texts", "samples", "prompts"]  # "samples": of either kind

OWN_OPTIONS = ("per_image", "concurrency")  # options of the head, so no parameter of a function
# Each name of several is followed by that of one.
_PLAIN: Mapping[Role, str] = {
    "images": "images image pictures picture imgs img photos photo",
    "texts": "texts text completions completion responses response",
    "samples": "samples sample",
    "prompts": "prompts prompt",
}
_LIKELY: Mapping[Role, str] = {
    "images": "generated_images generated_image",
    "texts": (
        "replies reply hypotheses hypothesis continuations continuation generated_texts "
        "generated_text solution_strs solution_str answers answer"
    ),
    "samples": (
        "outputs output generations generation predictions prediction candidates candidate "
        "generated"
    ),
    "prompts": (
        "questions question queries query captions caption conversations conversation "
        "instructions instruction inputs input problems problem dialogues dialogue requests request"
    ),
}
_ANSWERS = ("answers", "answer")  # the model's, or the right ones: any other name goes before
_SINGULAR = frozenset(
    name for names in (_PLAIN, _LIKELY) for words in names.values() for name in words.split()[1::2]
)
_WANTED = (
    "A reward function should take `(images, prompts, ...)` or `(texts, prompts, ...)`, or one by "
    "one `(image, prompt, ...)` or `(text, prompt, ...)`, in any order: parameters are filled by "
    "their names, and one name should stand for the samples. `completions` and `responses` are "
    "texts too, and the prompts may be left out."
)


def _by_name(names: Mapping[Role, str]) -> dict[str, Role]:
    return {name: role for role, words in names.items() for name in words.split()}


_PLAIN_ROLES, _LIKELY_ROLES = _by_name(_PLAIN), _by_name(_LIKELY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """A reward function's parameters by what they stand for."""

    described: str  # the function with its signature and its place, for messages
    scores: Scored
    by_keyword: tuple[str, ...]  # names of what is handed over that a keyword may have too
    guessed: tuple[str, ...]  # those of them that may stand for a column of the data as well
    by_place: tuple[Role, ...]  # what is handed over without a name, from the left
    by_name: Mapping[str, Role]  # what is handed over by name
    further: Mapping[str, Any]  # options and keys of the metadata, with their defaults
    stand_in: str  # one of those that is given the prompts if there is no such key; else empty
    takes_any: bool  # whether the function takes any keyword
    singular: str  # the samples' parameter if its name speaks of one; else empty

    def arguments(
        self, samples: Any, prompts: Any, kind: str, *, one: bool, keys: Collection[str]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return what to call the function with, beside options and metadata.

        Args:
            samples: Images or texts; with ``one``, one of them.
            prompts: As many prompts.
            kind: ``images`` or ``texts``.
            one: Whether it is called for one sample.
            keys: Options, and keys of the batch's metadata.
        """

        def value(role: Role) -> Any:
            return prompts if role == "prompts" else samples

        given = {
            name: value(role)
            for name, role in self.by_name.items()
            if role in ("samples", "prompts", kind)
        }
        for name, role in self.unnamed(kind, one=one).items():
            given[name] = value(role)
        if self.stand_in and self.stand_in not in keys:
            given[self.stand_in] = prompts
        return [value(role) for role in self.by_place], given

    def taken(self, kind: str, *, one: bool) -> tuple[str, ...]:
        """Return the names that no key of the metadata may have."""
        if not self.takes_any:  # a key of the name of `prompts`, say, is not asked for
            return self.guessed
        return (*self.by_keyword, *self.unnamed(kind, one=one))

    def unnamed(self, kind: str, *, one: bool) -> dict[str, Role]:
        """Return what ``**kwargs`` is given because no parameter is named for it."""
        if not self.takes_any:
            return {}
        given: dict[str, Role] = {}
        roles = {*self.by_place, *self.by_name.values()}
        if roles <= {"prompts"}:
            names = ("images",) if kind == "images" else ("texts", "completions")
            given |= {name[:-1] if one else name: "samples" for name in names}
        if "prompts" not in roles:
            given["prompt" if one else "prompts"] = "prompts"
        return given


def parameters_of(function: Callable[..., Any]) -> Parameters:
    """Read a reward function's signature.

    Raises:
        ValueError: If the function has no parameter for the samples or two that may be them, has a
            further parameter that cannot be named in a call, or claims the name of an option of
            the head.
    """
    signature = inspect.signature(function)
    place = place_of(function)
    described = f"`{function_name(function)}{signature}`{f' ({place})' if place else ''}"
    kinds = [p.kind for p in signature.parameters.values()]
    takes_any, takes_more = Parameter.VAR_KEYWORD in kinds, Parameter.VAR_POSITIONAL in kinds
    named = [
        p
        for p in signature.parameters.values()
        if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    ]
    roles, stand_in = _roles(named, takes_any, described)
    positional = [p.name for p in named if p.kind is not Parameter.KEYWORD_ONLY]
    several = {"images", "texts"} <= set(roles.values())  # and only one of them is there
    leading: list[str] = []
    for name in () if several else positional:
        if name not in roles:
            break
        leading.append(name)
    by_place = [roles[name] for name in leading]
    if takes_more and len(leading) == len(positional) < 2:
        rest: tuple[Role, ...] = ("samples", "prompts")
        of_prompts = [role == "prompts" for role in by_place]
        by_place += [role for role in rest if (role == "prompts") not in of_prompts]
    elif not takes_any and set(roles.values()) <= {"prompts"}:
        raise ValueError(f"{_WANTED} Found {described}.")
    for parameter in named:
        if parameter.kind is Parameter.POSITIONAL_ONLY and parameter.name not in leading:
            raise ValueError(f"{_WANTED} Found `{parameter.name}` of {described}.")
        if parameter.name in OWN_OPTIONS:
            raise ValueError(
                f"A reward function should have no parameter `{parameter.name}`: that is an option "
                f"of the head. Found {described}."
            )
    by_keyword = [
        p.name for p in named if p.name in roles and p.kind is not Parameter.POSITIONAL_ONLY
    ]
    of_samples = [name for name, role in roles.items() if role != "prompts"]
    return Parameters(
        described=described,
        scores=_scored([roles[name] for name in of_samples]),
        by_keyword=tuple(by_keyword),
        guessed=tuple(name for name in by_keyword if name in _LIKELY_ROLES),
        by_place=tuple(by_place),
        by_name={name: role for name, role in roles.items() if name not in leading},
        further={p.name: p.default for p in named if p.name not in roles},
        stand_in=stand_in,
        takes_any=takes_any,
        singular=next((name for name in of_samples if name in _SINGULAR), ""),
    )


def _roles(
    named: Sequence[Parameter], takes_any: bool, described: str
) -> tuple[dict[str, Role], str]:
    """Return the parameters that stand for samples and prompts, and ``Parameters.stand_in``.

    The parameters are in order.
    """
    required = [p.name for p in named if p.default is Parameter.empty]

    def candidates(known: Mapping[str, Role], *wanted: Role) -> list[str]:
        # What has a default yields to what has none: it may be a key of the metadata.
        names = [p.name for p in named if known.get(p.name) in wanted]
        return [name for name in names if name in required] or names

    samples = candidates(_PLAIN_ROLES, "images", "texts", "samples")
    if samples and samples[0] in required:
        samples = samples[:1]
    else:  # a function of either kind has a default for both, and is given one of them
        samples = list({_PLAIN_ROLES[name]: name for name in reversed(samples)}.values())
    chosen = {name: _PLAIN_ROLES[name] for name in samples}
    if not samples:
        fitting = candidates(_LIKELY_ROLES, "images", "texts", "samples")
        likely = [name for name in fitting if name not in _ANSWERS]
        # Of a function with `**kwargs`, which hold the samples, `answer` is a column, as in TRL.
        likely = likely or ([] if takes_any else fitting)
        if len(likely) > 1:
            both = " and ".join(f"`{name}`" for name in likely)
            raise ValueError(f"{_WANTED} Found {both}, which may be the samples, of {described}.")
        chosen |= {name: _LIKELY_ROLES[name] for name in likely}
    stand_in = ""
    if prompts := candidates(_PLAIN_ROLES, "prompts"):
        chosen[prompts[0]] = "prompts"
    else:
        prompt_like = [name for name in required if _LIKELY_ROLES.get(name) == "prompts"]
        if len(prompt_like) == 1:  # if there are two, at least one of them is a column
            unnamed = {p.name for p in named if p.kind is Parameter.POSITIONAL_ONLY}
            if prompt_like[0] in unnamed:
                chosen[prompt_like[0]] = "prompts"
            else:
                stand_in = prompt_like[0]
    return {p.name: chosen[p.name] for p in named if p.name in chosen}, stand_in


def _scored(roles: Sequence[Role]) -> Scored:
    if len(roles) == 1 and roles[0] in ("images", "texts"):
        return "images" if roles[0] == "images" else "texts"
    return "both"


def function_name(function: Callable[..., Any]) -> str:
    """Return the name of a function, or of the class of another callable."""
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__


def place_of(function: Callable[..., Any]) -> str:
    """Return file and line of a function, or of a callable's class; empty if in no file."""
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    code: Any = function if inspect.isroutine(function) else type(function)
    try:
        return f"{inspect.getsourcefile(code)}:{inspect.getsourcelines(code)[1]}"
    except (OSError, TypeError):  # typed into a prompt, or not written in Python
        return ""
