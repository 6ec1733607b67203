"""Train the shipped tiny Stable Diffusion 3 with two recipes, and draw what they did.

Writes runs/demo/demo.png, continues where it stopped. Options go to both runs.
"""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from moa_diffusion import config
from moa_diffusion.comparison.curves import plot_curves
from moa_diffusion.processes.stopping import handled
from moa_diffusion.storage import checkpoint
from moa_diffusion.storage.log import read_metrics

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("runs/demo")
RECIPES = {"static": "tiny_static.yaml", "apex": "tiny_apex.yaml"}


def start(name: str, recipe: str) -> subprocess.Popen[bytes]:
    """Start one run in its own process; its log goes beside its folder."""
    folder = FOLDER / name
    saved = checkpoint.list_checkpoints(folder)
    if not saved:  # nothing to continue from
        shutil.rmtree(folder, ignore_errors=True)
    command = [
        sys.executable,
        str(ROOT / "scripts" / "train_sd.py"),
        *("--config", str(ROOT / "configs" / recipe), *sys.argv[1:]),
        *("--output_dir", str(folder)),
        *(("--resume", "latest") if saved else ()),
    ]
    FOLDER.mkdir(parents=True, exist_ok=True)
    log = (FOLDER / f"{name}.log").open("wb")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def follow(processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Show one progress bar per run, until all have ended or one has failed."""
    bars = {}
    for i, name in enumerate(processes):
        total = config.load(ROOT / "configs" / RECIPES[name], sys.argv[1:]).trainer.steps
        bars[name] = tqdm(total=total, desc=f"{name:>10}", unit="rollout", position=i)
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


def main() -> int:
    """Run both recipes side by side, then draw the plot; 0 if all went well."""
    began = time.monotonic()
    processes = {name: start(name, recipe) for name, recipe in RECIPES.items()}
    with handled(signal.default_int_handler):
        try:
            follow(processes)
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


if __name__ == "__main__":
    sys.exit(main())
