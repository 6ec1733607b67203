"""Run the trainings behind a table of docs/results.md, and write the table.

python scripts/dev/study.py docs/results/methods.yaml --output runs/methods --parallel 2 \\
    --records docs/results/methods

The YAML file names sets of rewards (a recipe each, and options), ways to train (options by label),
options of all runs, and seeds; and, if there is one, the way in question (``subject``) and the one
whose best the others are to reach (``reference``). The same command continues where it stopped; a
run whose record is there is not made again, on whatever machine. Tables are of the runs that have
finished. A record names the versions of libraries and the commit that its run finished with; of a
run that had finished before it was recorded, the versions are those of the recording, and no commit
is named. Seeds come one after the other, so that a part of the runs is a smaller table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from moa_diffusion import config
from moa_diffusion.comparison import results, versus
from moa_diffusion.comparison.execute import execute
from moa_diffusion.comparison.plan import PlannedRun, check_unchanged, method_settings
from moa_diffusion.comparison.plot import plot_comparison
from moa_diffusion.comparison.record import read_record, write_record
from moa_diffusion.config.presets import forward_rules
from moa_diffusion.config.schema import Config
from moa_diffusion.files.json_values import without_nan
from moa_diffusion.files.writing import write_text
from moa_diffusion.types import ConfigError
from rewards.suggestions import did_you_mean

SCRIPT = Path(__file__).parents[1] / "train_sd.py"
LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def command_line() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="YAML file")
    parser.add_argument("--output", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--parallel", type=int, default=1, help="runs that share the machine")
    parser.add_argument("--records", type=Path, help="folder of what is kept of finished runs")
    parser.add_argument("--tables", action="store_true", help="train nothing, write tables alone")
    return parser


def main() -> int:
    """Train, write, print; 0, 1 if a run died, 2 for bad input, 130 if it was stopped."""
    options = command_line().parse_args()
    records: Path = options.records or options.output / "records"
    failures: dict[str, str] = {}
    stopped = False
    try:
        study = yaml.safe_load(options.study.read_text(encoding="utf-8"))
        runs = planned(study, options.output)
        everything = [run for of_seed in zip(*runs.values(), strict=True) for run in of_seed]
        for run in everything:
            check_unchanged(run)
            if (path := records / f"{run.name}.json").is_file():
                read_record(path, run)  # or it says what differs
        waiting = [run for run in everything if not (records / f"{run.name}.json").is_file()]
        earlier = {run.name for run in waiting if run.finished()}
        code, versions = commit(), made_with()
        try:
            if not options.tables:
                waiting.sort(key=lambda run: run.seed)
                program = [sys.executable, str(SCRIPT)]
                failures = execute(waiting, program=program, parallel=options.parallel)
        except KeyboardInterrupt:
            print("Stopped; what is done is saved. The same command continues.", file=sys.stderr)
            stopped = True
        finally:
            for run in waiting:
                if run.finished():  # of an earlier call's code nothing is known
                    known = {"commit": code} if code and run.name not in earlier else {}
                    write_record(records / f"{run.name}.json", run, versions | known)
        for name, of_set in runs.items():
            if finished := [run for run in of_set if (records / f"{run.name}.json").is_file()]:
                died = {run.name: failures[run.name] for run in of_set if run.name in failures}
                write_tables(study, name, finished, died, records)
    except (ConfigError, ValueError) as error:  # the second: runs that cannot be compared
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 130 if stopped else 1 if failures else 0


def planned(study: Mapping[str, Any], output: Path) -> dict[str, list[PlannedRun]]:
    """Return the runs of each set of rewards, as many of each, in one order.

    Raises:
        ConfigError: If a run cannot be made, or if the study asks about a way that it lacks.
    """
    found, ways = {}, study["ways"]
    for role in [key for key in ("subject", "reference") if key in study]:
        if (way := study[role]) not in ways:
            raise ConfigError(
                f"{role}: should be one of {', '.join(ways)}. Found {way!r}."
                + did_you_mean(str(way), ways)
            )
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
            for way, own in ways.items()
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


def made_with() -> dict[str, str]:
    """Return the versions that a run's numbers may depend on, and the kind of processor."""
    versions = {library: version(library) for library in LIBRARIES}
    versions["kernels"] = torch.backends.cpu.get_cpu_capability()
    return versions | {"python": platform.python_version(), "machine": platform.machine()}


def commit() -> str:
    """Return the last commit of the code, with a plus if it has changed since; "" if unknown."""
    root, code = SCRIPT.parents[1], ("--", "moa_diffusion", "rewards")
    if shutil.which("git") is None or not (root / ".git").exists():
        return ""
    log, changes = (
        subprocess.run(
            ["git", *words, *code], cwd=root, capture_output=True, text=True, check=False
        ).stdout.strip()
        for words in (("log", "-1", "--format=%h", "--abbrev=12"), ("status", "--porcelain"))
    )
    return log and log + ("+" if changes else "")  # it says nothing of another user's clone


def write_tables(
    study: Mapping[str, Any],
    name: str,
    runs: list[PlannedRun],
    failures: Mapping[str, str],
    folder: Path,
) -> None:
    """Write a set's ``NAME.md``, ``NAME.json`` and ``NAME.png``, and print the tables."""
    read = [read_record(folder / f"{run.name}.json", run) for run in runs]
    found = [data for data, _ in read]
    compared = results.compare(found)
    settings = {run.method: run.settings for run in runs}
    costs = {way: passes(one) for way, one in settings.items()}
    images = {way: one.trainer.groups * one.trainer.group_size for way, one in settings.items()}
    table = results.table(compared, failures)
    seconds = {
        one.method: 60 * one.minutes / (one.rollouts * images[one.method])
        for one in compared.methods
    }
    forwards = ", ".join(f"{way} {count}" for way, count in costs.items())
    times = ", ".join(f"{way} {seconds[way]:.3f}" for way in costs)
    table += f"\nForward passes of the transformer per image: {forwards}.\n"
    table += f"\nSeconds of training per image, without evaluations: {times}.\n"
    report = results.as_json(compared) | {"forwards_per_image": costs}
    report |= {"seconds_per_image": seconds}
    if (subject := study.get("subject")) in settings and len(settings) > 1:
        pairs = {
            way: versus.paired_worst(found, subject, way, compared.units)
            for way in settings
            if way != subject
        }
        table += "\n" + versus.paired_table(pairs, subject)
        report["differences"] = {way: dataclasses.asdict(one) for way, one in pairs.items()}
    if (reference := study.get("reference")) in settings:
        report["reached"] = {}
        for value in ("worst gain", "hypervolume"):
            volume = value == "hypervolume"
            rows = versus.reached(compared, reference, images=images, volume=volume)
            table += "\n" + versus.reached_table(rows, reference, value)
            report["reached"][value] = [dataclasses.asdict(one) for one in rows]
    with_what = Counter(json.dumps(one, sort_keys=True) for _, one in read)
    report["made_with"] = [json.loads(one) | {"runs": with_what[one]} for one in sorted(with_what)]
    for one in report["made_with"]:
        names = ", ".join(f"{key} {value}" for key, value in one.items() if key != "runs")
        table += f"\nRuns made with {names}: {one['runs']}.\n"
    write_text(folder / f"{name}.md", table)
    write_text(folder / f"{name}.json", json.dumps(without_nan(report), indent=1) + "\n")
    plot_comparison(compared, found, folder / f"{name}.png")
    print(f"\n{name}\n\n{table}")


if __name__ == "__main__":
    sys.exit(main())
