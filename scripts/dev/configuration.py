"""Writes docs/configuration.md and what ``--help`` prints: every key and every option.

``python scripts/dev/configuration.py``, from anywhere. Meanings are those of the docstrings, ranges
those of the fields of ``moa_diffusion/config/schema.py``.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import DocstringStyle, parse

from moa_diffusion.assembly.methods import METHODS
from moa_diffusion.config.messages import fields, range_of
from moa_diffusion.config.schema import (
    Config,
    PromptFileConfig,
    WeightedPromptFileConfig,
)
from moa_diffusion.objectives.mopo_offline import OfflineSettings
from moa_diffusion.policies import samplers
from rewards.heads.ocr.engines import ENGINES
from rewards.option_types import options_of
from rewards.pretrained.base import ModelHead, ModelOptions
from rewards.registry import built_in

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "configuration.md"
HELP = ROOT / "moa_diffusion" / "config" / "options.json"
WORDS = {
    NoneType: "null",
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    Any: "anything",
}
OF_ALL = ("objectives", "weights")  # what `rewards` says, and no option
OF_OCR = ("detect", "detection_side")  # options of the head `ocr`, and none of its engines
HEAD = """\
# Configuration

Every key of a YAML file and every option of methods, reward heads and OCR engines. This page is
written by `python scripts/dev/configuration.py` from the docstrings in the code, and a test says
when it is not up to date: change the docstrings, not this page.

A key is set in the YAML file, or on the command line by its dotted path: `--trainer.steps 200`.
`--print_config` shows the whole configuration, and an unknown key is an error that names the
nearest one. [methods.md](methods.md) says when to use which method, [rewards.md](rewards.md) what
each reward measures.
"""
REWARD = [  # name, type, default, meaning
    (
        "weight",
        "number",
        "`1`",
        "Weight of the objective in methods with fixed weights, any number; a negative one "
        "minimises the reward. With `apex` and `chebyshev` its importance, positive; other methods "
        "do not use it.",
    ),
    (
        "head",
        "text",
        "the reward's name",
        "Name of the head; with it, two rewards may use one head with different options.",
    ),
    (
        "path",
        "text",
        "-",
        "Import path or file of a function or class of your own, such as `my_module:my_reward` or "
        "`my_rewards.py:my_reward`; instead of `head`.",
    ),
    (
        "per_image",
        "true or false",
        "`false`",
        "For a function that is not registered: whether it scores one sample and not a batch.",
    ),
    (
        "concurrency",
        "integer",
        "`8`",
        "For an `async` function of one sample: how many samples are awaited at a time; at least "
        "1.",
    ),
]
REWARDS = """\
Besides the options of its head, listed [below](#reward-heads), every reward has these:
"""
Row = dict[str, str]  # name, type, default, meaning; of a key also its range


def type_of(hint: Any) -> str:
    """Return a type in the words of a YAML file."""
    origin, inner = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        names = ", ".join(field.name for field in dataclasses.fields(hint))
        return f"{{{names}}}"
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin in (Union, UnionType):
        return " or ".join(map(type_of, inner))
    if origin in (list, tuple) or (inner and issubclass(origin or object, Sequence)):
        return f"list of {type_of(inner[0])}"
    if origin is dict or (inner and issubclass(origin or object, Mapping)):
        return f"mapping of names to {type_of(inner[1])}"
    return WORDS[hint]


def shown(value: Any) -> str:
    """Return a default as YAML has it; a dash where there is none."""
    if value in (inspect.Parameter.empty, dataclasses.MISSING):
        return "-"
    if isinstance(value, float) and value and not 1e-3 <= abs(value) < 1e6:
        return f"`{value:.1e}`".replace("e-0", "e-").replace("e+0", "e+")
    if isinstance(value, float) and value.is_integer():
        return f"`{int(value)}`"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) or not value else f"`{value}`"


def sentence(text: str | None) -> str:
    """Return a docstring's text in one line of Markdown."""
    return re.sub(r"\s+", " ", text or "").strip().replace("``", "`")


def row(*cells: str) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def meanings(kind: Callable[..., Any], without: Collection[str] = ()) -> dict[str, str]:
    """Return what a class's docstring says of each parameter.

    Args:
        kind: A head, normalizer or weighting, whose options are described.
        without: Parameters that need no description.

    Raises:
        ValueError: If one that the class has is not described.
    """
    described: dict[str, str] = {}
    for source in (ModelOptions, kind) if takes_model_options(kind) else (kind,):
        documented = parse(inspect.getdoc(source) or "", style=DocstringStyle.GOOGLE)
        described |= {one.arg_name: sentence(one.description) for one in documented.params}
    for name in options_of(kind):
        if name not in described and name not in without:
            raise ValueError(f"The docstring of {kind.__qualname__} should describe `{name}`.")
    return described


def takes_model_options(kind: Callable[..., Any]) -> bool:
    """Return whether a head lists only what it has beside ``ModelOptions``."""
    return isinstance(kind, type) and issubclass(kind, ModelHead)


def summary(kind: object) -> str:
    """Return the first sentence of a docstring."""
    return sentence(parse(inspect.getdoc(kind) or "").short_description)


def keys(kind: Any, prefix: str = "") -> list[Row]:
    """Return the keys of a section, those of its own sections included."""
    rows: list[Row] = []
    hints, said = get_type_hints(kind), meanings(kind)
    for field in dataclasses.fields(kind):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            rows += keys(hint, f"{key}.")
            continue
        made = field.default_factory
        rows.append(
            {
                "name": key,
                "type": type_of(hint),
                "default": shown(field.default if made is dataclasses.MISSING else made()),
                "range": range_of(fields(kind)[field.name]),
                "meaning": said[field.name],
            }
        )
    return rows


def options(kind: Callable[..., Any], without: Collection[str] = OF_ALL) -> list[Row]:
    """Return a class's options.

    Args:
        kind: The class; its parameters are its options.
        without: Parameters that are no options.
    """
    said, known = meanings(kind, without), options_of(kind)
    hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
    return [
        {
            "name": name,
            "type": type_of(hints.get(name, option.annotation)),
            "default": shown(option.default),
            "meaning": said[name],
        }
        for name, option in known.items()
        if name not in without
    ]


def table(rows: Sequence[Row]) -> list[str]:
    """Return options as a table; a line that says so if there are none."""
    if not rows:
        return ["It has no options."]
    lines = [row(f"`{one['name']}`", one["type"], one["default"], one["meaning"]) for one in rows]
    return ["| option | type | default | meaning |", "|---|---|---|---|", *lines]


def reward_options() -> list[Row]:
    """Return the options that every reward has beside those of its head."""
    return [dict(zip(("name", "type", "default", "meaning"), one, strict=True)) for one in REWARD]


def chapter(level: int, title: str, *parts: str | list[str]) -> str:
    """Return a heading and what follows it, with empty lines between."""
    texts = ["\n".join(part) if isinstance(part, list) else part for part in parts]
    return "\n\n".join([f"{'#' * level} {title}", *texts])


def sections() -> list[tuple[str, str, list[Row]]]:
    """Return title, description and keys: of the keys at the top, and of each section."""
    rows = keys(Config)
    top = [one for one in rows if "." not in one["name"] and one["name"] != "rewards"]
    chapters = [("The run", "", top)]
    for name, hint in get_type_hints(Config).items():
        own = [one for one in rows if one["name"].startswith(f"{name}.")]
        if name == "rewards":
            chapters.append((name, meanings(Config)[name], []))
        elif dataclasses.is_dataclass(hint):
            chapters.append((name, description(hint), own))
    return chapters


def section(name: str, meaning: str, rows: Sequence[Row]) -> str:
    """Return the chapter of a section."""
    lines = [
        row(f"`{one['name']}`", one["type"], one["default"], one["range"], one["meaning"])
        for one in rows
    ]
    lines = ["| key | type | default | range | meaning |", "|---|---|---|---|---|", *lines]
    if name == "rewards":
        lines = [REWARDS, *table(reward_options())]
    title = f"`{name}`" if name in fields(Config) else name
    return chapter(3, title, *([meaning] if meaning else []), lines)


def description(kind: Any) -> str:
    """Return all that a docstring says before its parameters."""
    documented = parse(inspect.getdoc(kind) or "", style=DocstringStyle.GOOGLE)
    long = (documented.long_description or "").replace("``", "`")
    return "\n\n".join(filter(None, (sentence(documented.short_description), long)))


def page() -> str:
    """Return the whole page."""
    files = [
        chapter(3, title, description(kind), table(options(kind)))
        for title, kind in (
            ("An entry of `prompts.train`", WeightedPromptFileConfig),
            ("An entry of `prompts.heldout`", PromptFileConfig),
        )
    ]
    methods = ["| method | normalizer | weighting | fixed by the name |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        fixed = [f"`{key}: {json.dumps(value)}`" for key, value in method.options.items()]
        ends = (link(method.normalizer), link(method.weighting))
        methods.append(row(f"`{name}`", *ends, ", ".join(fixed)))
    kinds = ["| sampler | what it is |", "|---|---|"]
    kinds += [row(f"`{name}`", summary(step)) for name, step in samplers.SAMPLERS.items()]
    normalizers = dict.fromkeys(method.normalizer for method in METHODS.values())
    weightings = dict.fromkeys(method.weighting for method in METHODS.values())
    heads = [
        chapter(3, f"`{name}`", summary(target), table(options(target)))
        for name, target in built_in().items()
    ]
    return (
        "\n\n".join(
            [
                HEAD.strip(),
                chapter(2, "Keys"),
                *(section(*one) for one in sections()),
                *files,
                chapter(2, "Methods", "`objectives.method` names a row of this table.", methods),
                chapter(2, "Options of normalizers", "They stand under `objectives.normalizer`."),
                *map(part_of_method, normalizers),
                chapter(2, "Options of weightings", "They stand under `objectives.weighting`."),
                *(
                    chapter(3, kind.__name__, summary(kind), table(options(kind)))
                    for kind in weightings
                ),
                chapter(
                    3,
                    "Offline MOPO",
                    "With `preferences`, `mopo` has the options `primary` and `bounds` of "
                    "[Mopo](#mopo) and these:",
                    table(options(OfflineSettings)),
                ),
                chapter(2, "Samplers", "`sampling.sampler` names a row of this table.", kinds),
                chapter(
                    2, "Reward heads", "Options stand beside `weight` under the reward's name."
                ),
                *heads,
                chapter(2, "OCR engines", "They stand under `engine_options` of the head `ocr`."),
                *(
                    chapter(3, f"Engine `{name}`", summary(kind), table(options(kind, OF_OCR)))
                    for name, kind in ENGINES.items()
                ),
            ]
        )
        + "\n"
    )


def part_of_method(kind: type[Any]) -> str:
    """Return the chapter of a normalizer or weighting."""
    return chapter(3, kind.__name__, summary(kind), table(options(kind)))


def link(kind: type[Any]) -> str:
    """Return a link to the chapter of a normalizer or weighting."""
    return f"[{kind.__name__}](#{kind.__name__.lower()})"


def help_of_options() -> str:
    """Return what ``--help`` reads: the same rows as JSON, chosen by method and head."""
    kinds = {kind for method in METHODS.values() for kind in (method.normalizer, method.weighting)}
    known = {
        "sections": sections(),
        "default_method": Config().objectives.method,
        "methods": {
            name: {
                "normalizer": method.normalizer.__name__,
                "weighting": method.weighting.__name__,
            }
            for name, method in METHODS.items()
        },
        "classes": {
            kind.__name__: {"meaning": summary(kind), "options": options(kind)}
            for kind in sorted(kinds, key=lambda kind: kind.__name__)
        },
        "reward": reward_options(),
        "heads": {
            name: {"meaning": summary(target), "options": options(target)}
            for name, target in built_in().items()
        },
    }
    return json.dumps(known, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Write the page, and what ``--help`` reads."""
    PAGE.write_text(page(), encoding="utf-8")
    HELP.write_text(help_of_options(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
