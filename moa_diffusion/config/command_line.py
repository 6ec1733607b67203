"""The command line of the training scripts, read before PyTorch is imported.

That import takes longer than everything that can be wrong with a command line.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from moa_diffusion.config.parse import parse
from moa_diffusion.config.schema import Config
from moa_diffusion.files import program
from moa_diffusion.types import ConfigError


def read_command_line() -> Config | ConfigError:
    """Read the configuration of a training run, and say what is wrong with it.

    Returns:
        The configuration; or what is wrong, if there are several processes, which have to learn of
        it from each other: a file may lack on one node.

    Raises:
        SystemExit: With status 2 for a configuration that cannot be run; 0 for ``--help``.
    """
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if main_process else logging.ERROR,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        return parse(_arguments())
    except ConfigError as error:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            return error
        print(f"error: {error}{launcher_note()}", file=sys.stderr)
        raise SystemExit(2) from None


def launcher_note() -> str:
    """Return a line that ends an error under a launcher, which adds a long traceback of its own."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return "\n(This is the reason; the launcher reports only that it ended.)"
    return ""


def _arguments() -> list[str]:
    """Return the command line.

    Raises:
        ConfigError: If it is empty, since there is no run without a recipe.
    """
    if len(sys.argv) > 1:
        return sys.argv[1:]
    texts = "train_lm" in program.name().replace("-", "_")
    files = sorted(program.recipes().glob("*.yaml"))
    names = [file.stem for file in files if file.stem.startswith("lm_") == texts]
    first = "lm_tiny_pama" if texts else "tiny_apex"
    recipe = Path(os.path.relpath(program.recipes())) / f"{first}.yaml"
    copied = ""
    if program.recipes().name != "configs":  # inside an installed package
        recipe = Path("configs") / recipe.name
        copied = f"{program.words('recipes')} copy {first}\nand then "
    raise ConfigError(
        f"config: should name a recipe. Try: {copied}{sys.argv[0]} --config {recipe}\n"
        f"Recipes: {', '.join(names)}.\n{sys.argv[0]} --help explains every option."
    )
