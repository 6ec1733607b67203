"""Two runs of two checkpoints, whose weights are drawn and not trained, and their evaluation."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moa_diffusion import assembly
from moa_diffusion.config import from_dict
from moa_diffusion.evaluation.evaluate import evaluate
from moa_diffusion.evaluation.plan import EvaluationPlan, plan_evaluation
from moa_diffusion.evaluation.records import ScoredSamples
from moa_diffusion.evaluation.write import write_results
from moa_diffusion.policies.lora_files import DIFFUSERS
from moa_diffusion.storage import checkpoint

ROOT = Path(__file__).resolve().parents[1]

PROMPTS = ['a red sign that says "BUSH"', "a blue star on a white background", "a green square"]

SETTINGS = {
    "policy": {"max_sequence_length": 16, "lora": {"rank": 4}},
    "sampling": {"resolution": 32, "steps": 3},
    "prompts": {"train": "tiny", "heldout": "tiny"},
    "rewards": {"colourfulness": {"weight": 2.0}, "sharpness": {}},
    "trainer": {"groups": 2, "group_size": 2, "updates": 1, "sample_batch": 4},
    "evaluation": {"steps": 2, "guidance": 1.5, "prompts": 3},
    "log": {"trackers": []},
}

MINE = """
calls = 0

def length(images, prompts):
    global calls
    calls += len(prompts)
    return [float(len(prompt)) for prompt in prompts]

def target(images, prompts, wanted):
    return [float(value) for value in wanted]

def signs(images, prompts):
    return [1.0 * i.mean() if "sign" in p else float("nan") for i, p in zip(images, prompts)]
"""

OPTIONS = {
    "run": [],
    "lora": [],
    "config": None,
    "pipeline": None,
    "checkpoints": None,
    "every": None,
    "ema": True,
    "prompts": None,
    "seeds": "0,1",
    "rewards": None,
    "steps": None,
    "guidance": None,
    "resolution": None,
    "temperature": None,
    "soup": None,
    "points": 3,
    "shown": 12,
    "output": None,
    "cache": None,
}


def make_run(folder: Path, seed: int, **sections: object) -> None:
    """A run's folder with two checkpoints, whose weights are drawn and not trained."""
    settings = from_dict(SETTINGS | {"output_dir": str(folder), "seed": seed} | sections)
    assembly.write_config(settings)
    policy = assembly.policy(settings, torch.device("cpu"))
    noise = torch.Generator().manual_seed(seed)
    for step in (1, 2):
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.data.add_(0.03 * torch.randn(parameter.shape, generator=noise))
        with checkpoint.atomic_folder(checkpoint.step_folder(folder, step)) as partial:
            policy.save(partial / "ema")
            policy.save(partial)
            (partial / checkpoint.STATE).write_bytes(checkpoint.packed({"step": step}))
        live = checkpoint.step_folder(folder, step) / DIFFUSERS
        doubled = {name: 2 * value for name, value in load_file(live).items()}
        save_file(doubled, live)  # so that averaged and last weights differ


def ask(runs: Path, output: Path, *overrides: str, **options: object) -> EvaluationPlan:
    given = {"run": [str(runs / "a"), str(runs / "b")], "prompts": str(runs / "three.txt")}
    return plan_evaluation(OPTIONS | given | {"output": output} | options, overrides)


def make_two_runs(folder: Path) -> Path:
    """Two runs, prompts, and rewards of one's own."""
    make_run(folder / "a", 1)
    make_run(folder / "b", 2, policy={"max_sequence_length": 16, "lora": {"rank": 2, "alpha": 6}})
    (folder / "three.txt").write_text("\n".join(PROMPTS))
    (folder / "mine.py").write_text(MINE)
    return folder


def evaluate_two_runs(runs: Path, output: Path) -> tuple[Path, ScoredSamples]:
    """Two runs of two checkpoints, a soup, and a reward that does not apply to every prompt."""
    found = evaluate(ask(runs, output, f"--rewards.signs.path={runs}/mine.py:signs", soup="a,b"))
    write_results(found, output, shown=2, runs={})
    return output, found
