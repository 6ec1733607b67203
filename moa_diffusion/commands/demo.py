"""Train the shipped tiny Stable Diffusion 3 with two recipes, and draw what they did.

Writes runs/demo/demo.png, continues where it stopped. Options go to both runs.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from moa_diffusion.files import program

FOLDER = Path("runs/demo")
RECIPES = {"static": "tiny_static.yaml", "apex": "tiny_apex.yaml"}


@program.entry
def main() -> int:
    """Run both recipes side by side, then draw the plot; 0 if all went well."""
    parser = argparse.ArgumentParser(
        prog=program.name(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options = parser.parse_known_args()[1]

    from moa_diffusion.comparison.curves import plot_curves
    from moa_diffusion.processes.stopping import handled

    began = time.monotonic()
    processes = {name: _start(name, recipe, options) for name, recipe in RECIPES.items()}
    with handled(signal.default_int_handler):
        try:
            _follow(processes, options)
        finally:
            for process in processes.values():  # one that has not ended saves and ends
                process.terminate()
                process.wait()
    for name, process in processes.items():
        if process.returncode:
            print(f"{name} failed: {(FOLDER / f'{name}.log').read_text()[-2000:]}")
            return 1
    plot_curves({name: FOLDER / name for name in RECIPES}, target := FOLDER / "demo.png")
    print(f"{target} shows it, after {(time.monotonic() - began) / 60:.1f} minutes.")
    return 0


def _start(name: str, recipe: str, options: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start one run in its own process; its log goes beside its folder."""
    from moa_diffusion.storage import checkpoint

    folder = FOLDER / name
    saved = checkpoint.list_checkpoints(folder)
    if not saved:  # nothing to continue from
        shutil.rmtree(folder, ignore_errors=True)
    command = [
        *program.training("train-sd"),
        *("--config", str(program.recipes() / recipe), *options),
        *("--output_dir", str(folder)),
        *(("--resume", "latest") if saved else ()),
    ]
    FOLDER.mkdir(parents=True, exist_ok=True)
    log = (FOLDER / f"{name}.log").open("wb")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _follow(processes: dict[str, subprocess.Popen[bytes]], options: Sequence[str]) -> None:
    """Show one progress bar per run, until all have ended or one has failed."""
    from moa_diffusion import config
    from moa_diffusion.storage.log import read_metrics
    from rewards.progress_bar import progress_bar

    bars = {}
    for i, name in enumerate(processes):
        total = config.load(program.recipes() / RECIPES[name], options).trainer.steps
        bars[name] = progress_bar(title=f"{name:>10}", total=total, unit="rollout", position=i)
    running = True
    while running and not any(process.returncode for process in processes.values()):
        running = None in [process.poll() for process in processes.values()]  # asks each of them
        for name, bar in bars.items():
            path = FOLDER / name / "metrics.jsonl"
            rows = read_metrics(path) if path.exists() else []
            bar.update((rows[-1]["step"] if rows else 0) - bar.n)
        time.sleep(0.5)
    for bar in bars.values():
        bar.close()
