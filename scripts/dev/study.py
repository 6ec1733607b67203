"""Run the trainings behind a table of docs/results.md, and write the table.

python scripts/dev/study.py docs/results/losses.yaml --output runs/losses --parallel 2

The YAML file names sets of rewards (a recipe each, and options), ways to train (options by label),
options of all runs, and seeds. The same command continues where it stopped; tables are of the runs
that have finished. Seeds come one after the other, so that a part of the runs is a smaller table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from moa_diffusion import config
from moa_diffusion.comparison import results
from moa_diffusion.comparison.execute import execute
from moa_diffusion.comparison.plan import PlannedRun, check_unchanged, method_settings
from moa_diffusion.config.presets import forward_rules
from moa_diffusion.config.schema import Config
from moa_diffusion.files.writing import write_text
from moa_diffusion.types import ConfigError

SCRIPT = Path(__file__).parents[1] / "train_sd.py"
LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def main() -> int:
    """Train, write, print; 0, 1 if a run died, 2 for bad input, 130 if it was stopped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="YAML file")
    parser.add_argument("--output", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--parallel", type=int, default=1, help="runs that share the machine")
    parser.add_argument("--tables", action="store_true", help="train nothing, write tables alone")
    options = parser.parse_args()
    try:
        runs = planned(yaml.safe_load(options.study.read_text(encoding="utf-8")), options.output)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    everything = [run for of_seed in zip(*runs.values(), strict=True) for run in of_seed]
    failures: dict[str, str] = {}
    try:
        for run in everything:
            check_unchanged(run)
        if not options.tables:
            everything.sort(key=lambda run: run.seed)
            failures = execute(
                everything, program=[sys.executable, str(SCRIPT)], parallel=options.parallel
            )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; what is done is saved. The same command continues.", file=sys.stderr)
        return 130
    for name, of_set in runs.items():
        if finished := [run for run in of_set if run.finished()]:
            died = {run.name: failures[run.name] for run in of_set if run.name in failures}
            write_table(name, finished, died, options.output / name)
    return 1 if failures else 0


def planned(study: Mapping[str, Any], output: Path) -> dict[str, list[PlannedRun]]:
    """Return the runs of each set of rewards, as many of each, in one order.

    Raises:
        ConfigError: If a run cannot be made.
    """
    found = {}
    for name, chosen in study["sets"].items():
        found[name] = [
            PlannedRun(
                method=way,
                seed=seed,
                folder=(folder := output / f"{name}-{way.replace(' ', '_')}-{seed}"),
                settings=settings(
                    study["recipes"][name], study["common"] | chosen | own, seed, folder
                ),
            )
            for seed in study["seeds"]
            for way, own in study["ways"].items()
        ]
    return found


def settings(recipe: str, options: Mapping[str, Any], seed: int, folder: Path) -> Config:
    """Return a recipe's configuration with dotted options; ``method`` drops those of others."""
    given = []
    for key, value in options.items():
        if key != "method":
            given += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    if "method" in options:
        made, _ = method_settings(recipe, given, options["method"])
    else:
        made = config.load(recipe, given)
    return dataclasses.replace(made, seed=seed, output_dir=str(folder))


def passes(settings: Config) -> int:
    """Return the forward passes of the transformer that an image costs, in training and before."""
    loss, decisions = settings.loss, settings.sampling.window or settings.sampling.steps - 1
    anchors = int(loss.kl_weight > 0 or loss.norm_weight > 0)
    if loss.kind == "forward":
        rules = forward_rules(loss.forward)
        decisions = rules.draws
        anchors += sum(copy.weight > 0 for copy in rules.copies.values())
    return settings.sampling.steps + decisions * (1 + anchors)


def write_table(
    name: str, runs: list[PlannedRun], failures: Mapping[str, str], folder: Path
) -> None:
    """Write ``table.md`` and ``results.json``, and print the table."""
    compared = results.compare([run.read() for run in runs])
    costs = {run.method: passes(run.settings) for run in runs}
    table = results.table(compared, failures)
    forwards = ", ".join(f"{way} {count}" for way, count in costs.items())
    table += f"\nForward passes of the transformer per image: {forwards}.\n"
    versions = {library: version(library) for library in LIBRARIES}
    report = results.as_json(compared) | {
        "forwards_per_image": costs,
        "versions": versions | {"python": platform.python_version()},
        "machine": platform.processor() or platform.machine(),
    }
    write_text(folder / "table.md", table)
    write_text(folder / "results.json", json.dumps(report, indent=1) + "\n")
    print(f"\n{name}\n\n{table}")


if __name__ == "__main__":
    sys.exit(main())
