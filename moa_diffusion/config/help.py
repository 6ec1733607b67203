"""What ``--help`` and ``--help all`` print: the sections, or every key and the chosen options.

Chosen options are those of the method and of the reward heads.

The texts are those of docs/configuration.md; scripts/dev/configuration.py writes both. Reading them
from a file spares the import of everything that they describe.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter, _ArgumentGroup
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from moa_diffusion.files import program

Rows = Sequence[Mapping[str, str]]

ABOUT = """\
A key is set in a YAML file or by its dotted path (--trainer.steps 200); later files and options
override earlier ones.
"""
SHORT = """\
--help all explains every key, and the options of the method and of the rewards that the given
files and options choose. `{rewards} list` shows all rewards.
"""
LONG = """\
Options of the method and of the rewards are those that the given files and options choose.
"""


def help_text(values: Mapping[str, Any], *, everything: bool) -> str:
    """Return the help, as wide as the terminal.

    Args:
        values: What files and options set, nested, before it is checked.
        everything: Whether to explain every key, instead of naming the sections.
    """
    known = json.loads(files("moa_diffusion.config").joinpath("options.json").read_text("utf-8"))
    script = program.name()
    about = LONG if everything else SHORT.format(rewards=program.words("rewards"))
    parser = ArgumentParser(
        usage=f"{script} [--config FILE] [--KEY VALUE ...] [--print_config] [--help [all]]",
        description=ABOUT + about,
        formatter_class=RawDescriptionHelpFormatter,
        add_help=False,
    )
    general = parser.add_argument_group("general")
    for option, meaning in (
        ("--config", "YAML file; later options override it."),
        ("--print_config", "Print the whole configuration and exit."),
        *_dry_run(script),
        ("--help", "Print the sections and exit; with `all`, every key."),
    ):
        general.add_argument(option, help=meaning, metavar="FILE" if option == "--config" else "")
    if not everything:
        sections = parser.add_argument_group("sections of keys")
        for title, meaning, rows in known["sections"]:
            _add_section(sections, title, meaning, rows)
        return parser.format_help()
    for title, meaning, rows in known["sections"]:
        _add(parser, title, meaning, rows, prefix="")
    for title, meaning, rows, prefix in _chosen(known, values):
        _add(parser, title, meaning, rows, prefix=prefix)
    return parser.format_help()


def _dry_run(script: str) -> list[tuple[str, str]]:
    """Return an option that one script has, and what it means."""
    meaning = "Print what the run needs and how long it takes, and exit, as the command plan."
    return [("--dry_run", meaning)] if "train_sd" in script.replace("-", "_") else []


def _chosen(
    known: Mapping[str, Any], values: Mapping[str, Any]
) -> list[tuple[str, str, Rows, str]]:
    """Return title, meaning, options and prefix of the chosen method's parts and the rewards."""
    sections = []
    method = _inside(values, "objectives").get("method", known["default_method"])
    for part, kind in known["methods"].get(str(method), {}).items():
        own = known["classes"][kind]
        title = f"{part} of {method}: {kind}"
        sections.append((title, own["meaning"], own["options"], f"objectives.{part}."))
    for section, named in (
        ("rewards", _inside(values, "rewards")),
        ("evaluation.rewards", _inside(_inside(values, "evaluation"), "rewards")),
    ):
        for name in named:
            head = str(_inside(named, name).get("head", name))
            if head in known["heads"]:
                own = known["heads"][head]
                title = f"{section}.{name}: head {head}"
                common = [row for row in known["reward"] if row["name"] in ("weight", "head")]
                rows = [*common, *own["options"]]
                sections.append((title, own["meaning"], rows, f"{section}.{name}."))
    return sections


def _inside(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a section as it was written; an empty one if it is none."""
    value = values.get(name)
    return value if isinstance(value, Mapping) else {}


def _add_section(group: _ArgumentGroup, title: str, meaning: str, rows: Rows) -> None:
    """Add a section as a line: its pattern, the first paragraph about it, its keys' names."""
    inside = not rows or "." in rows[0]["name"]
    parts = [row["name"].removeprefix(f"{title}.").split(".") for row in rows]
    keys = dict.fromkeys(f"{part[0]}.*" if part[1:] else part[0] for part in parts)
    about = meaning.partition("\n\n")[0] or f"{title}."
    text = f"{about} ({' '.join(keys)})" if keys else about
    group.add_argument(
        f"--{title}.*" if inside else "--*",
        metavar="",
        help=text.replace("`", "").replace("%", "%%"),
    )


def _add(parser: ArgumentParser, title: str, meaning: str, rows: Rows, *, prefix: str) -> None:
    group = parser.add_argument_group(title, meaning)
    for row in rows:
        facts = [row[name] for name in ("type", "range") if row.get(name)]
        default = f"default {row['default']}" if row["default"] != "-" else "no default"
        text = f"{row['meaning']} ({'; '.join([*facts, default])})"
        group.add_argument(
            f"--{prefix}{row['name']}",
            metavar="VALUE",
            help=text.replace("`", "").replace("%", "%%"),
        )
