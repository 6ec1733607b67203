"""Say what a run needs and how long it takes, without weights, network or GPU.

moa-diffusion plan --config configs/sd35_medium_apex.yaml --gpus 8 --card h100
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moa_diffusion.files import program
from moa_diffusion.files.paths import expanded
from moa_diffusion.types import ConfigError

if TYPE_CHECKING:
    from moa_diffusion.planning.gpus import Gpu


@program.entry
def main() -> int:
    """Print the plan; return 2 for bad input."""
    return plan(sys.argv[1:])


def plan(arguments: Sequence[str]) -> int:
    """Print what a run takes; return the exit status: 2 for bad input.

    Args:
        arguments: Options of the command; those that it does not know are of the configuration.
    """
    parser = argparse.ArgumentParser(
        prog=program.name(),
        description=f"{program.described(__doc__, 'plan')}\n"
        "Other options (--dotted.key value) override the configuration.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--card", help="such as h100; by default all that it knows are compared")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    parser.add_argument("--gpus", type=int, default=world, help="of a node (default 1)")
    parser.add_argument("--nodes", type=int, default=1, help="default 1")
    parser.add_argument("--bench", type=expanded, help="JSON of `bench.py gpu` on that card")
    parser.add_argument("--json", type=expanded, help="file for all numbers")
    options, rest = parser.parse_known_args(arguments)
    if os.environ.get("RANK", "0") != "0":  # another process prints it
        return 0

    from moa_diffusion import config
    from moa_diffusion.files.writing import write_text
    from moa_diffusion.planning.gpus import gpu
    from moa_diffusion.planning.planner import Planner
    from moa_diffusion.planning.present import Plan
    from moa_diffusion.scoring import RewardError

    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        for name in ("gpus", "nodes"):
            if vars(options)[name] < 1:
                raise ConfigError(f"--{name}: should be at least 1. Found {vars(options)[name]}.")
        card = None if options.card is None else gpu(options.card)
        settings = config.parse(rest)
        reached = {} if options.bench is None else measured(options.bench, card)
        planner = Planner(settings, options.gpus, options.nodes)
        made = Plan(planner, card, reached)
        text = made.text()
        if options.json is not None:
            write_text(options.json, json.dumps(made.as_json(), indent=2) + "\n")
    except (ConfigError, RewardError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def measured(file: Path, card: Gpu | None) -> dict[str, float]:
    """Return the shares of a card's rate that ``bench.py gpu`` has measured, by phase.

    Args:
        file: What it wrote with ``--json``.
        card: The card that it was measured on.

    Raises:
        ConfigError: If no card is named, or the file is no such report.
    """
    from moa_diffusion.planning.planner import SAMPLE, UPDATE

    if card is None:
        raise ConfigError("--card: should name the card that --bench was measured on. Found none.")
    try:
        report = json.loads(file.read_text("utf-8"))
        rates = {name: report["share"][name] * report["matrix_rate"] for name in (SAMPLE, UPDATE)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--bench: should be a JSON file of `bench.py gpu`. Found {file}: {error!r}"
        ) from error
    return {name: rate / card.rate("float16") for name, rate in rates.items()}
