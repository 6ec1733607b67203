"""Train the shipped tiny Stable Diffusion 3 on a CPU with two recipes and draw what they did.

Takes a few minutes; writes runs/demo/demo.png. Run again, it continues where it stopped.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("runs/demo")
RECIPES = {"static": "tiny_static.yaml", "dual_stage": "tiny_dual_stage.yaml"}


def start(name: str, recipe: str) -> subprocess.Popen[bytes]:
    """Start one run in its own process; its log goes beside its folder."""
    folder = FOLDER / name
    command = [
        sys.executable,
        str(ROOT / "scripts" / "train_sd.py"),
        *("--config", str(ROOT / "configs" / recipe), "--output_dir", str(folder)),
        *(("--resume", "latest") if (folder / "checkpoints").exists() else ()),
    ]
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def follow(processes: dict[str, subprocess.Popen[bytes]], totals: dict[str, int]) -> None:
    """One progress bar per run, until all have ended."""
    from tqdm import tqdm

    from moa_diffusion.metrics import read_metrics

    bars = {
        name: tqdm(total=totals[name], desc=f"{name:>10}", unit="rollout", position=i)
        for i, name in enumerate(processes)
    }
    running = True
    while running:
        running = any(process.poll() is None for process in processes.values())
        for name, bar in bars.items():
            path = FOLDER / name / "metrics.jsonl"
            bar.update((read_metrics(path)[-1]["step"] if path.exists() else 0) - bar.n)
        time.sleep(0.5)
    for bar in bars.values():
        bar.close()


def main() -> int:
    """Run both recipes side by side, then draw the picture; 0 if all went well."""
    from moa_diffusion import config
    from moa_diffusion.evaluation.curves import picture

    began = time.monotonic()
    totals = {
        name: config.load(ROOT / "configs" / recipe).trainer.steps
        for name, recipe in RECIPES.items()
    }
    processes = {name: start(name, recipe) for name, recipe in RECIPES.items()}
    follow(processes, totals)
    for name, process in processes.items():
        if process.returncode:
            log = FOLDER / f"{name}.log"
            print(f"The run {name} failed; the end of {log}:\n{log.read_text()[-2000:]}")
            return 1
    target = FOLDER / "demo.png"
    picture({name: FOLDER / name for name in RECIPES}, target)
    print(f"{target} shows what happened ({(time.monotonic() - began) / 60:.1f} minutes).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
