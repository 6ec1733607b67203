"""What an evaluation will do, and what is refused before anything is drawn."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from evaluated_runs import ask

from moa_diffusion.evaluation.evaluate import evaluate
from moa_diffusion.policies.lora_files import DIFFUSERS
from moa_diffusion.storage import checkpoint
from moa_diffusion.types import ConfigError


def test_bad_input_is_told_before_anything_is_drawn(two_runs: Path, tmp_path: Path):
    a, b = str(two_runs / "a"), str(two_runs / "b")
    other, damaged = tmp_path / "other", tmp_path / "damaged"
    for copy in (other, damaged):
        shutil.copytree(two_runs / "a", copy)
    config = (other / "config.yaml").read_text()
    (tmp_path / "x").mkdir()
    (other / "config.yaml").write_text(config.replace("path: tiny", f"path: {tmp_path}/x"))
    weights = checkpoint.step_folder(damaged, 1) / "ema" / DIFFUSERS
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "empty.txt").write_text("\n\n")
    cases = [
        ({"checkpoints": "base,step-7"}, "'step-7' is not in .*There are: step-1, step-2"),
        ({"every": 5}, "no checkpoint of .* is a multiple of 5. There are: step-1"),
        ({"every": 1, "checkpoints": "1"}, "--every: should stand without --checkpoints"),
        ({"run": [str(damaged)]}, f"{DIFFUSERS}` are damaged"),
        ({"run": [str(tmp_path)]}, "--run: should be the folder of a run"),
        ({"run": ["nowhere"]}, "--run: should be a folder. Found none at `nowhere`"),
        ({"run": [a, a]}, "--run: should have another name than base, a"),
        ({"run": [a, str(other)]}, "policy.path: should be the same for all models"),
        ({"prompts": str(tmp_path / "empty.txt")}, "should hold at least one prompt. Found none"),
        ({"seeds": "one"}, "--seeds: should be a number of seeds"),
        ({"rewards": "sharpness,"}, "--rewards: should be different names"),
        ({"run": [a, b], "soup": "a,c"}, "unknown model 'c'. Known: a, a/step-1, a/step-2, b"),
        ({"soup": "a"}, "--soup: should name at least two"),
        ({"run": [], "config": None}, "should come from --run, or .* Found none of them"),
        ({"pipeline": "tiny"}, "Found --run, --pipeline"),
        ({"lora": [f"a={b}"]}, "--lora: should have another name than a run"),
        ({"run": [a, b], "lora": [b]}, "--lora: should have another name than a run"),
        ({"lora": [f"c={b}"]}, "Found the folder of a run; --run evaluates"),
        ({"resolution": "65"}, "sampling.resolution: should be a multiple of 16"),
        ({"shown": 0}, "--shown: should be at least 1"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            ask(two_runs, tmp_path / "out", **({"run": [a]} | options))

    changed = tmp_path / "b"
    shutil.copytree(two_runs / "b", changed)
    text = (changed / "config.yaml").read_text()
    (changed / "config.yaml").write_text(text.replace("steps: 2", "steps: 5"))
    with pytest.raises(ConfigError, match=r"evaluation.steps: .* Give one for both: --steps"):
        ask(two_runs, tmp_path / "out", run=[a, str(changed)])
    ask(two_runs, tmp_path / "out", run=[a, str(changed)], steps="4")

    target = f"--rewards.target.path={two_runs}/mine.py:target"
    with pytest.raises(ConfigError, match=r"metadata `wanted`.*3 of 3 lack it, first 'a red"):
        evaluate(ask(two_runs, tmp_path / "out", target, run=[a]))
    with pytest.raises(ConfigError, match='Unknown reward head "sharpnes"'):
        evaluate(ask(two_runs, tmp_path / "out", run=[a], rewards="sharpnes"))
    with pytest.raises(ConfigError, match=r"--seeds: .* or different seeds"):
        evaluate(ask(two_runs, tmp_path / "out", run=[a], seeds="1,1"))
    assert not (tmp_path / "out").exists()
