"""The program ``moa-diffusion``, or ``python -m moa_diffusion``: one command of several."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from moa_diffusion import __version__
from moa_diffusion.commands import COMMANDS
from moa_diffusion.files import program


@program.entry
def main() -> int:
    """Run the command that the first argument names; return its exit status."""
    started = program.MODULE if Path(sys.argv[0]).name == "__main__.py" else program.NAME
    if len(sys.argv) > 1 and (module := COMMANDS.get(sys.argv[1])):
        sys.argv[:2] = [f"{started} {sys.argv[1]}"]  # what its help and its errors call it
        status: int = importlib.import_module(module).main()
        return status
    parser = argparse.ArgumentParser(
        prog=started,
        description="Train generative models on several rewards at once. Each command explains "
        f"its options with --help; `{started} recipes` is where to begin.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        about = importlib.import_module(module).__doc__ or ""
        commands.add_parser(name, help=about.partition("\n")[0])
    parser.parse_args()
    return parser.error("the command should come first, and its options after it")


if __name__ == "__main__":
    sys.exit(main())
