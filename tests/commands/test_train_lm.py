"""The command line for language models: online, with value heads, from preferences.

Run as a script, this file is one of two processes.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moa_diffusion import assembly, tiny
from moa_diffusion.config import check, from_dict, parse
from moa_diffusion.storage.log import read_metrics
from moa_diffusion.training.loop import Run
from moa_diffusion.training.offline import OfflineTrainer
from moa_diffusion.types import ConfigError
from waiting import AS_SCRIPT, HANG, python

pytestmark = pytest.mark.filterwarnings(  # peft asks transformers by the old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "train_lm.py"
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true"}
FAST: dict[str, Any] = {
    "policy": {"name": "causal_lm", "path": "tiny", "lora": {"rank": 2, "alpha": 4}},
    "generation": {"max_new_tokens": 12},
    "prompts": {"train": "tiny", "heldout": "tiny"},
    "rewards": {
        "brevity": {"head": "length", "scale": 5, "low": 0, "high": None, "direction": "shorter"},
        "thanks": {"head": "keyword", "words": ["thank you", "please", "kind"]},
    },
    "objectives": {"method": "pama"},
    "loss": {"clip_range": 0.2, "kl_weight": 0.01},
    "optimizer": {"lr": 0.01},
    "ema": {"decay": 0.5, "every": 1},
    "trainer": {
        "steps": 3,
        "groups": 4,
        "group_size": 4,
        "updates": 2,
        "sample_batch": 8,
        "micro_batch": 4,
    },
    "evaluation": {"every": 3, "prompts": 3, "images_per_prompt": 2, "rollout_images": 2},
    "checkpoint": {"every": 1, "keep": 0},
    "log": {"trackers": []},
}
RESPONSES = ["Thank you so much. Anna.", "No.", "Send it back now. Do it."]


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if both else value
    return found


def make(output: Path, **changes: Any) -> Run:
    settings = from_dict(merged(FAST, {"output_dir": str(output)} | changes))
    check(settings)
    run = assembly.text_trainer(settings)
    run.progress.bars = False
    return run


def preferences(path: Path) -> dict[str, Any]:
    """A file of pairs, and the settings that learn from it."""
    prompts = (tiny.PROMPTS_PATH / "letters_train.txt").read_text().splitlines()[:6]
    pairs = {"short": [[1, 0], [1, 2], [2, 0]], "polite": [[0, 1], [0, 2], [1, 2]]}
    rows = [{"prompt": p, "responses": RESPONSES, "preferences": pairs} for p in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "preferences": {"data": str(path), "objectives": ["short", "polite"], "batch": 6},
        "objectives": {
            "method": "mopo",
            "weighting": {"primary": "short", "bounds": 0.4, "lag": 2},
        },
        "trainer": {"steps": 4},
        "generation": {"max_new_tokens": 24},
        "loss": {"kl_weight": 0.0},
    }


def rows(folder: Path) -> list[dict[str, Any]]:
    """Metrics without what a clock measured."""
    return [
        {name: value for name, value in row.items() if not name.startswith("seconds/")}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def adapter(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:06d}" / "adapter_model.safetensors")


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


KINDS: dict[str, dict[str, Any]] = {
    "pama": {},
    "ppo": {"loss": {"kind": "ppo"}},  # value heads have the same state for whole samples
    "apex_gradients": {"objectives": {"method": "apex", "weighting": {"conflict": "gradients"}}},
    "upgrad": {"objectives": {"method": "upgrad"}},
    "mopo": {"objectives": {"method": "mopo", "normalizer": {"pool_size": 4}}},
}


@pytest.mark.parametrize("kind", [*KINDS, "offline"])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, kind: str) -> None:
    """From what a run left that was killed before its last checkpoint."""
    changes = preferences(tmp_path / "pairs.jsonl") if kind == "offline" else KINDS[kind]
    changes = merged({"trainer": {"steps": 2}}, changes)
    if kind != "pama":  # evaluations are the same for all
        changes = merged({"evaluation": {"every": 0}}, changes)
    steps = changes["trainer"]["steps"]
    make(tmp_path / "straight", **changes).run()
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    for step in range(2, steps + 1):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")
    make(tmp_path / "run", **changes, resume="latest").run()
    assert difference(adapter(tmp_path / "run", steps), adapter(tmp_path / "straight", steps)) == 0
    assert rows(tmp_path / "run")[-1] == rows(tmp_path / "straight")[-1]
    moved = difference(adapter(tmp_path / "run", steps), adapter(tmp_path / "run", 1))
    assert moved > 1e-4  # any number above 0 would do


def test_a_run_leaves_texts_scores_and_an_adapter_for_peft(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = make(tmp_path / "run", loss={"kind": "ppo"})
    trainer.run()
    last = rows(tmp_path / "run")[-1]
    assert last["policy/value_loss"] > 0
    assert {"eval_gap/brevity", "eval_text/words", "text/length", "text/diversity"} <= last.keys()
    table = (tmp_path / "run" / "scores" / "step-000001.jsonl").read_text().splitlines()
    sample = json.loads(table[0])
    assert len(table) == 16
    assert isinstance(sample["text"], str)
    # A quotient in float32: within 6e-8 of it.
    assert sample["reward/brevity"] == pytest.approx(-len(sample["text"].split()) / 5)
    shown = (tmp_path / "run" / "samples" / "step-000003.txt").read_text()
    evaluated = (tmp_path / "run" / "evaluation" / "step-000003.jsonl").read_text().splitlines()
    assert shown.startswith(f"{json.loads(evaluated[0])['prompt']}\n-> ")

    folder = tmp_path / "run" / "checkpoints" / "step-000003" / "ema"
    base = AutoModelForCausalLM.from_pretrained(tiny.LM_PATH)
    model = PeftModel.from_pretrained(base, folder).eval()
    ids = AutoTokenizer.from_pretrained(tiny.LM_PATH)("To the baker", return_tensors="pt")
    with torch.no_grad():
        theirs = model(**ids).logits.log_softmax(-1)
        with trainer.learner.stepper.ema.applied():
            mine = trainer.policy.model(**ids).logits.log_softmax(-1)
    # peft adds B A x where the policy may have it in the weight. Some 30 products follow each
    # other: 32 eps of log-probs of up to 20 are 8e-5; 6e-6 was found.
    torch.testing.assert_close(theirs, mine, atol=1e-4, rtol=0)


def test_a_second_stage_learns_from_preferences_over_its_start(tmp_path: Path) -> None:
    """Before it has learned, its win rates over the responses are those of the data."""
    options = merged(preferences(tmp_path / "pairs.jsonl"), {"trainer": {"steps": 2}})
    options["evaluation"] = {"every": 0}  # nothing is drawn
    make(tmp_path / "one", **options).run()
    trained = tmp_path / "one" / "checkpoints" / "step-000002"
    run = make(tmp_path / "two", **merged(options, {"policy": {"adapter": str(trained)}}))
    assert isinstance(run.learner, OfflineTrainer)
    run.run()
    one, two = (
        [[row[f"eval_level/{name}"] for name in ("short", "polite")] for row in rows(folder)[::2]]
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    # A response's log-probs, sums of tens of nats in float32, are asked for twice.
    data = run.learner.data.win_rates.mean((1, 2)).tolist()
    assert one[0] == pytest.approx(data, abs=1e-4)
    assert two[0] == pytest.approx(data, abs=1e-4)
    assert one[-1] != pytest.approx(data, abs=1e-2)
    assert two[-1] != pytest.approx(data, abs=1e-2)


def test_value_heads_give_decisions_of_one_text_different_advantages(tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", loss={"kind": "ppo"}, trainer={"steps": 2})
    seen: list[torch.Tensor] = []
    descend = trainer.learner.update.descend

    def watched(rollout: Any, advantage: torch.Tensor, **options: float) -> dict[str, float]:
        seen.append(torch.where(rollout.mask, advantage, torch.nan))
        return descend(rollout, advantage, **options)

    trainer.learner.update.descend = watched
    trainer.run()
    assert seen[-1].shape == (16, 12)
    within = seen[-1].nan_to_num(0).std(1)
    assert (within > 0).any()
    assert (seen[-1].nan_to_num(0) >= 0).all()  # Noon


def arguments(folder: Path, name: str) -> list[str]:
    return ["--config", str(folder / f"{name}.yaml"), "--output_dir", str(folder / name / "two")]


def one_of_two_processes(folder: Path, names: list[str]) -> None:
    """The last run through the script, which also leaves the process group."""
    for name in names[:-1]:
        assembly.text_trainer(parse(arguments(folder, name))).run()
    sys.argv = [str(SCRIPT), *arguments(folder, names[-1])]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_two_processes_and_one_learn_the_same(tmp_path: Path) -> None:
    """Value heads, groups cut over processes, and texts gathered; then preferences."""
    offline = preferences(tmp_path / "pairs.jsonl")
    two = {"evaluation": {"every": 0}, "trainer": {"steps": 2}}
    changes = {"ppo": {"loss": {"kind": "ppo"}} | two, "offline": merged(offline, two)}
    for name, change in changes.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(merged(FAST, change)))
        make(tmp_path / name / "one", **change).run()
    done = subprocess.run(
        [
            *[python(), "-m", "torch.distributed.run", "--standalone"],
            *["--nproc_per_node", "2", __file__, str(tmp_path), *changes],
        ],
        env=ENVIRONMENT | AS_SCRIPT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Processes: 2") == len(changes)
    for name, change in changes.items():
        last = merged(FAST, change)["trainer"]["steps"]
        one, other = (adapter(tmp_path / name / kind, last) for kind in ("one", "two"))
        assert difference(one, other) == 0
        assert difference(one, adapter(tmp_path / name / "one", 1)) > 1e-3


Here = Callable[..., tuple[int, str]]


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Here:
    """Runs the script in this process with a configuration: exit status and stderr."""

    def start(**changes: Any) -> tuple[int, str]:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(merged(FAST, changes)))
        options = ["--config", str(path), "--output_dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return int(str(ended.value.code)), capsys.readouterr().err

    return start


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": {"name": "sd3"}}, "policy.name: should be causal_lm"),
        ({"rewards": {"sharpness": {}}}, "rewards.sharpness: should score texts"),
        (
            {"objectives": {"method": "apex"}, "loss": {"kind": "ppo"}},
            "loss.kind: should be grpo for the method apex",
        ),
        (
            {"objectives": {"method": "ddpo"}, "loss": {"kind": "ppo"}},
            "loss.kind: should be grpo for the method ddpo",
        ),
        ({"loss": {"kl": "gaussian"}}, "loss.kl: should be k3 or null for a language model"),
        (
            {"generation": {"max_new_tokens": 500}},
            "generation.max_new_tokens: should be less than the model's context of 192",
        ),
        (
            {"generation": {"max_prompt_tokens": 5}},
            "To the",  # the prompt that is too long is named
        ),
        ({"generation": {"temperature": 0}}, "generation.temperature: should be positive"),
        ({"policy": {"path": "nowhere"}}, "policy.path: should be a folder with a model"),
        (
            {"policy": {"lora": {"target_modules": ["to_q"]}}},
            "'to_q'",
        ),
    ],
)
def test_bad_input_ends_with_one_line(here: Here, changes: dict[str, Any], message: str) -> None:
    status, said = here(**changes)
    assert status == 2, said
    assert message in said
    assert said.startswith("error: ")
    assert "Traceback" not in said


ROW: dict[str, Any] = {"prompt": "p", "responses": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"preferences": {"shrt": [[0, 1]]}}, {}, "Did you mean 'short'?"),
        ({"responses": ["a"]}, {}, "at least two responses"),
        ({"preferences": {"short": [[0, 1], [1, 0]]}}, {}, "one winner"),
        ({"preferences": {"short": [[0, 1], [1, 2], [2, 0]]}}, {}, "run in a circle"),
        (
            {"preferences": {"short": [[0, 1]], "polite": [[1, 2]]}},
            {"objectives": {"weighting": {"primary": "long"}}},
            "objectives.weighting: Parameter `primary`",
        ),
        (
            {"preferences": {"short": [[0, 1]], "polite": [[1, 2]]}},
            {"objectives": {"weighting": {"tua": 1}}},
            "objectives.weighting.tua: unknown option of OfflineSettings. Did you mean 'tau'?",
        ),
        (
            {"preferences": {"short": [[0, 1]]}},
            {"objectives": {"method": "pama"}},
            "objectives.method: should be mopo",
        ),
        (
            {"preferences": {"short": [[0, 1]]}},
            {"preferences": {"pairs": {"short": "x.jsonl"}}},
            "preferences: should have `data` or `pairs`. Found both.",
        ),
        (
            {"preferences": {"short": [[0, 1]]}},
            {"preferences": {"objectives": []}},
            "preferences.objectives: should name",
        ),
        (
            {"preferences": {"short": [[0, 1]], "polite": [[1, 2]]}},
            {"loss": {"kind": "ppo"}},
            "loss.kind: should be grpo (the default) with preferences",
        ),
    ],
)
def test_bad_preferences_end_with_one_line(
    here: Here, tmp_path: Path, row: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    settings = preferences(tmp_path / "pairs.jsonl")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(ROW | row) + "\n")
    status, said = here(**merged(settings, changes))
    assert status == 2, said
    assert message in said


def test_images_are_not_learned_from_preferences(tmp_path: Path) -> None:
    settings = from_dict(merged(FAST, preferences(tmp_path / "pairs.jsonl")))
    with pytest.raises(ConfigError, match=r"^preferences: should be left out here"):
        assembly.trainer(settings)


def test_a_prompt_of_the_preferences_that_is_too_long_is_named(here: Here, tmp_path: Path) -> None:
    settings = preferences(tmp_path / "pairs.jsonl")
    pairs = {"short": [[0, 1]], "polite": [[1, 0]]}
    row = {"prompt": "bread " * 200, "responses": ["a", "b"], "preferences": pairs}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    status, said = here(**settings)
    assert status == 2, said
    assert "generation.max_prompt_tokens: every prompt should have at most" in said


def test_a_response_that_is_too_long_leaves_the_folder_free(here: Here, tmp_path: Path) -> None:
    settings = preferences(tmp_path / "pairs.jsonl")
    pairs = {"short": [[0, 1]], "polite": [[1, 0]]}
    row = {"prompt": "To the baker", "responses": ["bread " * 99, "b"], "preferences": pairs}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    status, said = here(**settings)
    assert status == 1, said
    assert "A response should have at most 24 tokens with its end" in said
    assert len(said) < 2000
    assert not (tmp_path / "out" / "checkpoints").exists()
    preferences(tmp_path / "pairs.jsonl")
    assert here(**merged(settings, {"trainer": {"steps": 1}, "evaluation": {"every": 0}}))[0] == 0


def test_other_value_heads_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    make(
        tmp_path / "run", loss={"kind": "ppo"}, trainer={"steps": 1}, evaluation={"every": 0}
    ).run()
    with pytest.raises(ConfigError, match="resume: critic has other settings"):
        make(tmp_path / "run", loss={"kind": "ppo"}, critic={"hidden": 8}, resume="latest")


if __name__ == "__main__":
    one_of_two_processes(Path(sys.argv[1]), sys.argv[2:])
