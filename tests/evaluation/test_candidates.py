"""The models that are compared: checkpoints of runs, folders of LoRA weights, soups."""

from __future__ import annotations

from pathlib import Path

from evaluated_runs import OPTIONS

from moa_diffusion.evaluation.candidates import candidates
from moa_diffusion.evaluation.plan import plan_evaluation
from moa_diffusion.storage import checkpoint


def test_a_folder_of_lora_weights_needs_no_run(two_runs: Path, tmp_path: Path):
    folder = checkpoint.step_folder(two_runs / "b", 2) / "ema"
    plan = plan_evaluation(
        OPTIONS
        | {
            "lora": [f"mine={folder}"],
            "pipeline": "tiny",
            "prompts": str(two_runs / "three.txt"),
            "rewards": "colourfulness",
            "output": tmp_path,
        },
        ["--sampling.resolution", "32"],
    )
    assert [one.label for one in plan.candidates] == ["base", "mine"]
    assert (
        plan.candidates[1].digest
        == candidates(plan.medium, {"b": two_runs / "b"}, {}, chosen="latest")[1].digest
    )
