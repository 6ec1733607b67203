"""Measure a configuration's rewards before training: scale, noise, who wins.

moa-diffusion calibrate --config configs/tiny_dual_stage.yaml --rewards.colourfulness.weight 1
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from moa_diffusion.files import program
from moa_diffusion.files.paths import expanded as place


@program.entry
def main() -> int:
    """Draw, score, write, print; return 0, 1 if a reward failed, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog=program.name(),
        description=f"{program.described(__doc__, 'calibrate')}\n"
        "One process. Other options (--dotted.key value) override YAML.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="YAML file of a training run")
    parser.add_argument("--output", type=place, default=Path("runs/calibration"), help="folder")
    parser.add_argument("--prompts", type=int, default=32, help="training prompts (default 32)")
    parser.add_argument("--images", type=int, default=8, help="images per prompt (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    options, overrides = parser.parse_known_args()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        print("error: calibration runs in one process: start it with `python`.", file=sys.stderr)
        return 2

    from moa_diffusion import config
    from moa_diffusion.calibration.measure import measure, report
    from moa_diffusion.calibration.plot import plot_calibration
    from moa_diffusion.scoring import RewardError
    from moa_diffusion.storage.calibration_file import save
    from moa_diffusion.types import ConfigError

    folder: Path = options.output
    try:
        settings = config.load(options.config, [*overrides, "--seed", str(options.seed)])
        measured = measure(settings, prompts=options.prompts, images=options.images, folder=folder)
        calibration = measured.calibration(settings)
        save(calibration, folder / "calibration.json")
    except (ConfigError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RewardError, OSError) as error:
        print(f"error: {error}\nSo far: {folder / 'scores.jsonl'}", file=sys.stderr)
        return 1
    report(calibration, measured)
    print(f"Written: {folder / 'calibration.json'}, {folder / 'scores.jsonl'}")
    try:
        plot_calibration(calibration, measured.rewards, measured.units, folder / "calibration.png")
    except ImportError as error:
        print(f"No plot: {error}. Try: pip install 'moa-diffusion[report]'")
    else:
        print(f"Drawn:   {folder / 'calibration.png'}")
    return 0
