"""List the recipes that come with the package, or copy one with the files that it names.

moa-diffusion recipes
moa-diffusion recipes copy tiny_apex
moa-diffusion recipes copy tiny_apex my_project
"""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from moa_diffusion.files import program
from moa_diffusion.files.paths import expanded as place

FOLDER = "configs"  # by which recipes name their files, in a checkout and where one is copied to


@program.entry
def main() -> int:
    """List, or copy; return the exit status: 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog=program.name(),
        description=program.described(__doc__, "recipes"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command")
    copied = commands.add_parser("copy", help="copy a recipe, to be trained with and changed")
    copied.add_argument("name", help="such as tiny_apex")
    copied.add_argument(
        "folder", nargs="?", type=place, default=Path(), help="the working directory by default"
    )
    options = parser.parse_args()

    from moa_diffusion.types import ConfigError

    try:
        said = listed() if options.command is None else copy(options.name, options.folder)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(said)
    return 0


def listed() -> str:
    """Return the recipes, each with the first sentence of its header."""
    files = sorted(program.recipes().glob("*.yaml"))
    width = max(len(file.stem) for file in files) + 2
    wrap = partial(textwrap.fill, width=100, subsequent_indent=" " * width)
    return "\n".join(wrap(f"{file.stem:<{width}}{header(file)}") for file in files)


def header(file: Path) -> str:
    """Return the first sentence of the comment that a recipe begins with."""
    comment = file.read_text(encoding="utf-8").partition("\n#\n")[0]
    return " ".join(comment.replace("#", "").split()).partition(". ")[0].removesuffix(".")


def copy(name: str, folder: Path) -> str:
    """Copy a recipe, and the prompts and rewards that it names, into ``configs/`` of a folder.

    Args:
        name: The recipe's name.
        folder: The folder that a run is started from.

    Returns:
        What was copied, and what may be typed next.

    Raises:
        ConfigError: If there is no such recipe, or a file of that name says something else.
    """
    from moa_diffusion.config.yaml_files import read_yaml
    from moa_diffusion.types import ConfigError
    from rewards.suggestions import did_you_mean

    source = program.recipes()
    names = sorted(file.stem for file in source.glob("*.yaml"))
    chosen = name.removesuffix(".yaml")
    if chosen not in names:
        raise ConfigError(
            f"Recipe `{name}` should be one of {', '.join(names)}.{did_you_mean(chosen, names)}"
        )
    recipe = f"{chosen}.yaml"
    files = [recipe, *sorted(set(_named(read_yaml(source / recipe))))]
    targets = {file: folder / FOLDER / file for file in files}
    for file, target in targets.items():
        if target.exists() and target.read_bytes() != (source / file).read_bytes():
            raise ConfigError(
                f"`{target}` should not be there yet, or be the recipe's. Found another text: "
                "name another folder."
            )
    for file, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((source / file).read_bytes())
    command = "train-lm" if chosen.startswith("lm_") else "train-sd"
    enter = "" if folder == Path() else f"cd {shlex.quote(str(folder))} && "
    written = "\n".join(f"Written: {target}" for target in targets.values())
    return f"{written}\nNext:\n  {enter}{program.words(command)} --config {FOLDER}/{recipe}"


def _named(values: object) -> Iterator[str]:
    """Yield the files of the recipes' folder that are named anywhere in a recipe."""
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            yield from _named(value)
    elif isinstance(values, str) and values.startswith(f"{FOLDER}/"):
        yield values.removeprefix(f"{FOLDER}/").partition(":")[0]
