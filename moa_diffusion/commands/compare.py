"""Train every method with several seeds on the same configuration, and compare what they reach.

moa-diffusion compare --config configs/tiny_dual_stage.yaml --methods static,gdpo,apex --seeds 3
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from moa_diffusion.files import program
from moa_diffusion.files.paths import expanded as place


@program.entry
def main() -> int:
    """Run, write, print; 0, 1 if a run died, 2 for bad input, 130 if it was stopped."""
    parser = argparse.ArgumentParser(
        prog=program.name(),
        description=f"{program.described(__doc__, 'compare')}\n"
        "Other options (--dotted.key value) override YAML for every run. "
        "The same command continues where it stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="YAML file of a training run")
    parser.add_argument("--methods", required=True, help="names or YAML files, comma-separated")
    parser.add_argument("--seeds", default="3", help="how many (default 3), or which: 0,1,2")
    parser.add_argument("--minutes-per-run", type=float, help="of training, at most (wall time)")
    parser.add_argument("--output", type=place, default=Path("runs/compare"), help="folder")
    parser.add_argument("--parallel", type=int, default=1, help="runs that share the machine")
    parser.add_argument("--pair", help="objectives a,b of the front plot; the most opposed if none")
    options, overrides = parser.parse_known_args()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        parser.error("a comparison starts processes itself: start it with `python`.")

    from moa_diffusion.comparison import results as compare
    from moa_diffusion.comparison.execute import execute
    from moa_diffusion.comparison.plan import plan_comparison
    from moa_diffusion.comparison.plot import plot_comparison
    from moa_diffusion.files.writing import write_text
    from moa_diffusion.report.libraries import PLOTS, check_libraries
    from moa_diffusion.types import ConfigError

    folder: Path = options.output
    try:
        planned = plan_comparison(
            options.config,
            overrides,
            methods=options.methods,
            seeds=options.seeds,
            output=folder,
            minutes=options.minutes_per_run,
            parallel=options.parallel,
        )
        pair = compare.read_pair(options.pair, planned.names)
        check_libraries(PLOTS)
    except (ConfigError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*planned.notes, sep="\n", end="\n" if planned.notes else "", flush=True)
    try:
        failures = execute(
            planned.runs, program=program.training("train-sd"), parallel=options.parallel
        )
        runs = [run.read() for run in planned.runs if run.name not in failures]
        compared = compare.compare(runs)
        table = compare.table(compared, failures)
        result = compare.as_json(compared) | {"failures": failures}
        write_text(folder / "results.json", json.dumps(result, indent=2) + "\n")
        write_text(folder / "table.md", table)
        plot_comparison(compared, runs, folder / "compare.png", pair=pair)
    except KeyboardInterrupt:
        print("Stopped; what is done is saved. The same command continues.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table + f"\nWritten: {', '.join(str(folder / name) for name in compare.FILES)}")
    return 1 if failures else 0
