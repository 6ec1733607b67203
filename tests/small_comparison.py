"""A comparison that takes seconds, and a program that trains nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moa_diffusion.comparison.plan import plan_comparison

FAST: dict[str, Any] = {
    "policy": {"path": "tiny", "max_sequence_length": 16, "step_batch": 2, "lora": {"rank": 4}},
    "sampling": {"resolution": 32, "steps": 3, "guidance": 1.0},
    "prompts": {"train": "tiny", "heldout": "tiny"},
    "rewards": {"mine": {"path": "mine.py:mine"}, "colourfulness": {"weight": 0.5}},
    "objectives": {"method": "dual_stage", "normalizer": {"floor": 0.5}},
    "loss": {"clip_range": 1e-3},
    "optimizer": {"lr": 1e-2},
    "ema": {"decay": 0.0, "every": 1},
    "trainer": {"steps": 2, "groups": 2, "group_size": 4, "updates": 1},
    "evaluation": {
        "every": 2,
        "images_per_prompt": 2,
        "prompts": 3,
        "steps": 2,
        "guidance": 1.0,
        "pictures": 0,
    },
    "checkpoint": {"every": 1},
    "log": {"trackers": []},
}
REWARD = """
import os
import sys


def mine(images, prompts):
    \"\"\"Brightness; fails in one run, which tells itself by its command line.\"\"\"
    method, seed = (sys.argv[sys.argv.index(key) + 1] for key in ("--objectives.method", "--seed"))
    if (method, seed) == ("gdpo", "1") and os.path.exists("broken"):
        raise RuntimeError("out of paint")
    return images.mean(dim=(1, 2, 3)).tolist()
"""
MILD = {"objectives": {"method": "gdpo"}, "loss": {"kl_weight": 0.01}, "trainer": {"steps": 9}}
FAKE = """
import json, pathlib, sys, time

folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
(folder / "evaluation").mkdir(parents=True)
row = {"prompt": "a", "group": 0, "seed": 0, "reward/mine": 1.0, "reward/colourfulness": 1.0}
lines = [json.dumps(row | {"sibling": i}) for i in range(2)]
(folder / "evaluation" / "step-000000.jsonl").write_text("\\n".join(lines))
(folder / "metrics.jsonl").write_text('{"step": 0}\\n')
time.sleep(1e6)
"""
FAKE_PROGRAM = [sys.executable, "fake.py"]


def write_folder(folder: Path) -> None:
    """Write what ``planned`` reads: a configuration, a method's file and a reward."""
    (folder / "fast.yaml").write_text(yaml.safe_dump(FAST, sort_keys=False))
    (folder / "mild.yaml").write_text(yaml.safe_dump(MILD, sort_keys=False))
    (folder / "mine.py").write_text(REWARD)


def planned(*overrides: str, methods: Sequence[str] = ("static",), **options: Any) -> Any:
    options = {"seeds": "1", "output": Path("out")} | options
    return plan_comparison("fast.yaml", overrides, methods=methods, **options)
