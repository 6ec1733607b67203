"""Measure what training costs: on the CPU, or on a GPU.

On the CPU `train`, `gradients`, `methods`, `guards`, `ocr`, `remote`, and `precision` (of gradients
in float16; half an hour); on a GPU `gpu`, once and for ten minutes.

python scripts/bench.py train --pipeline base; python scripts/bench.py methods --pipeline wide
python scripts/bench.py gpu --config configs/sd35_medium_dual_stage.yaml
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Measure, print, and return the exit status: 1 if a part failed, 2 if nothing can begin."""
    recipe = Path(__file__).parents[1] / "configs" / "sd35_medium_dual_stage.yaml"
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="CPU seconds per trained image / plain image")
    pipeline: dict[str, Any] = {"dest": "name", "default": "tiny"}
    train.add_argument("--pipeline", **pipeline, help="tiny, base (random weights), or a path")
    gpu = commands.add_parser("gpu", help="time and memory of SD3.5-Medium, random weights")
    gpu.add_argument("--config", type=Path, default=recipe, help="further --key value override it")
    gpu.add_argument("--scale", type=int, default=2, help="groups per rollout, on this one card")
    gpu.add_argument("--rollouts", type=int, default=2, help="measured, after a warm-up")
    gpu.add_argument("--minutes", type=float, default=10.0, help="about how long it takes")
    gpu.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try it")
    gpu.add_argument("--size", choices=("medium", "base", "tiny"), default="medium")
    gradients = commands.add_parser("gradients", help="CPU seconds of K gradients / one backward")
    gradients.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    methods = commands.add_parser("methods", help="CPU seconds of a step with each method")
    guards = commands.add_parser("guards", help="CPU seconds of a step with each loss and guard")
    for command in (methods, guards):
        command.add_argument("--pipeline", **pipeline, choices=("tiny", "base", "wide"))
    ocr = commands.add_parser("ocr", help="accuracy and CPU ms per image of the OCR engines")
    ocr.add_argument("--images", type=int, default=50, help="per size and level of noise")
    remote = commands.add_parser("remote", help="images/s and CPU ms of a head behind a server")
    remote.add_argument("--images", type=int, default=64, help="in a batch")
    remote.add_argument("--against", type=Path, help="another checkout, measured in turns")
    precision = commands.add_parser("precision", help="errors of float16's LoRA gradients")
    precision.add_argument("--layers", type=int, default=6)
    precision.add_argument("--heads", type=int, default=4, help="of 64: the transformer's width")
    precision.add_argument("--side", type=int, default=64, help="of the latents; 64 is 512 px")
    for command in (train, gradients, methods, guards, remote):
        command.add_argument("--rounds", type=int, default=9, help="interleaved, for medians")
    for command in commands.choices.values():
        command.add_argument("--json", type=Path, help="file for all numbers")
    gpu.set_defaults(json=Path("bench-gpu.json"))
    options, overrides = parser.parse_known_args()
    if overrides and options.command != "gpu":
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    cpu = options.command != "gpu" or options.device == "cpu"
    if cpu:
        os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}  # read by torch
    import torch

    from moa_diffusion import config
    from moa_diffusion.types import ConfigError

    sys.path.insert(0, str(Path(__file__).parent / "dev"))  # what measures is not installed
    from benchmarks.commands import MEASURE
    from benchmarks.gpu import measure_gpu
    from benchmarks.tables import show

    if not cpu and not torch.cuda.is_available():
        print("error: `gpu` needs a CUDA device. Found none; nothing was measured.")
        return 2
    try:
        if options.command == "gpu":
            settings = config.load(options.config, overrides)
            chosen = {name: vars(options)[name] for name in ("size", "device", "rollouts")}
            chosen |= {"groups": options.scale, "minutes": options.minutes}
            return measure_gpu(settings, options.json.expanduser(), **chosen)
        given = vars(options).items()
        own = {name: value for name, value in given if name not in ("command", "json")}
        report = MEASURE[options.command](**own)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(options.command, report, options.json and options.json.expanduser())
    return 0


if __name__ == "__main__":
    sys.exit(main())
