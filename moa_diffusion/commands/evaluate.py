"""Draw and score checkpoints on the same prompts and seeds, and say which is better at what.

moa-diffusion evaluate --run runs/tiny_apex --checkpoints base,step-15,latest
accelerate launch -m moa_diffusion evaluate --run runs/a --run runs/b --soup a,b --points 5
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from moa_diffusion.files import program
from moa_diffusion.files.paths import expanded as place


@program.entry
def main() -> int:
    """Draw, score, write, print; 0, 1 if it failed, 2 for bad input, 130 if it was stopped."""
    parser = argparse.ArgumentParser(
        prog=program.name(),
        description=f"{program.described(__doc__, 'evaluate')}\n"
        "Other options (--dotted.key value) override the runs' settings. "
        "What is drawn and scored is kept: the same command continues where it stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    several: dict[str, Any] = {"action": "append", "default": []}
    add("--run", metavar="[NAME=]FOLDER", help="of training; may be repeated", **several)
    add("--lora", metavar="[NAME=]PLACE", help="of LoRA weights, folder or file", **several)
    add("--config", help="YAML file of a run, where there is no --run")
    add(
        "--pipeline",
        help="folder or hub id of the base model, likewise; of a language model's hub "
        "id with --policy.name causal_lm",
    )
    add("--checkpoints", help="base,step-20,latest; all by default")
    add("--every", type=int, help="checkpoints whose number of rollouts is a multiple of this")
    add("--ema", action=argparse.BooleanOptionalAction, default=True, help="averaged weights")
    add("--prompts", type=place, help=".txt, .jsonl, .csv, .tsv; the run's held-out ones if none")
    add("--seeds", default="4", help="of the noise: how many (default 4), or which: 0,1,2")
    add("--rewards", help="names, comma-separated; the run's if none")
    add("--steps", help="of images: denoising steps; as the run evaluates if none")
    add("--guidance", help="of images: classifier-free guidance scale, likewise")
    add("--resolution", help="of images: side in pixels, likewise")
    add("--temperature", help="of texts: 0 takes the likeliest tokens, likewise")
    add("--soup", help="two or more runs or LoRA folders, whose weights are interpolated")
    add("--points", type=int, default=5, help="of a soup from end to end (default 5)")
    add("--shown", type=int, default=12, help="prompts in grid.png or completions.md (default 12)")
    add("--output", type=place, help="folder; RUN/evaluate or runs/evaluate by default")
    add("--cache", type=place, help="folder of samples and scores; the output's by default")
    options, overrides = parser.parse_known_args()

    from moa_diffusion.distributed import AccelerateComm, ProcessError, agreed
    from moa_diffusion.evaluation.errors import EvaluationError
    from moa_diffusion.evaluation.evaluate import evaluate
    from moa_diffusion.evaluation.plan import plan_evaluation
    from moa_diffusion.evaluation.write import write_results
    from moa_diffusion.processes.launcher import make_accelerator
    from moa_diffusion.scoring import RewardError
    from moa_diffusion.training.launch import BAD_INPUT, say, status_of

    try:
        with agreed(AccelerateComm(make_accelerator())):  # a file may lack on one node
            plan = plan_evaluation(vars(options), overrides)
        scored = evaluate(plan)
        if os.environ.get("RANK", "0") == "0":
            print(write_results(scored, plan.output, shown=options.shown, runs=plan.runs))
    except KeyboardInterrupt:
        print("Stopped; what is done is saved. The same command continues.", file=sys.stderr)
        return 130
    except (*BAD_INPUT, EvaluationError, RewardError, ProcessError, OSError) as error:
        say(error)
        return status_of(error)
    return 0
