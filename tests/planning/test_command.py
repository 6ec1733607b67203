"""The command: what it prints, what it writes, what it advises, and what it refuses."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from moa_diffusion import config
from moa_diffusion.commands.plan import measured, plan
from moa_diffusion.planning.gpus import GPUS
from moa_diffusion.planning.planner import Planner
from moa_diffusion.planning.present import Plan
from moa_diffusion.planning.variants import remedy, variants
from moa_diffusion.types import ConfigError

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "policy": {"path": "tiny", "max_sequence_length": 16, "lora": {"rank": 4}},
    "sampling": {"resolution": 64, "steps": 6, "guidance": 1.0, "window": 2},
    "prompts": {"train": "tiny", "heldout": "tiny"},
    "rewards": {
        "clipscore": {"model": "package://moa_diffusion/tiny/judges/clip"},
        "mine": {"path": f"{ROOT}/configs/brightness.py:brightness"},
    },
    "trainer": {"steps": 40, "groups": 8, "group_size": 8, "micro_batch": 8, "sample_batch": 8},
}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def planner(stated_costs: None) -> Planner:
    return Planner(config.from_dict(SETTINGS), gpus=2)


@pytest.mark.slow
def test_training_says_what_it_needs_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, file = tmp_path / "recipe.yaml", tmp_path / "plan.json"
    recipe.write_text(yaml.safe_dump({**SETTINGS, "output_dir": str(tmp_path / "run")}))
    given = ["--config", str(recipe), "--dry_run", "--gpus", "2", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["train_sd.py", *given])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "train_sd.py"), run_name="__main__")
    assert ended.value.code == 0
    assert not (tmp_path / "run").exists()
    text = capsys.readouterr().out
    assert text.startswith("Computed from the configuration, not measured")
    assert "64 samples per rollout on 2 processes" in text
    for name in ("load", "encode", "sample", "decode", "score", "update", "evaluate", *GPUS):
        assert f" {name} " in text
    assert "Reward mine: unknown, not counted" in text
    last = text.strip().splitlines()[-1]
    assert last.startswith("Fits on: 3090, 4090")
    assert last.endswith("without mine (computed, not measured).")
    written = json.loads(file.read_text())
    assert written["computed"] is True
    assert [card["name"] for card in written["cards"]] == list(GPUS)
    changes = [change for row in written["what_if"] for change in row["changes"]]
    assert "policy.gradient_checkpointing true" in changes
    assert "sampling.guidance 4.5" in changes


def test_variants_differ_by_a_setting_each(planner: Planner) -> None:
    own, *others = variants(planner)
    assert own.changes == ()
    assert own.forecast(planner) == planner.forecast()
    names = [" ".join(other.changes) for other in others]
    assert names == [
        "sampling.window 0",
        "sampling.guidance 4.5",
        "policy.gradient_checkpointing true",
        "policy.shard true",
        "trainer.micro_batch 16",
        "trainer.micro_batch 4",
        "trainer.micro_batch 2",
        "trainer.micro_batch 1",
        "scoring.offload true",
        "reward models on a server (the head `remote`)",
    ]
    for other, name in zip(others, names, strict=True):
        smaller = name.endswith(("true", "4", "2", "1", "`)")) and "guidance" not in name
        changed, before = other.forecast(planner), planner.forecast()
        if "window" not in name:
            assert (changed.peak.peak < before.peak.peak) == smaller, name


def test_the_cheapest_change_that_fits_is_named(planner: Planner) -> None:
    def needs(changes: tuple[str, ...]) -> float:
        found = next(v for v in variants(planner) if v.changes == changes)
        return 2 + found.forecast(planner).peak.peak / 1e9 + 1e-9

    card = GPUS["4090"]
    fitting = remedy(planner, replace(card, memory=needs(("trainer.micro_batch 4",))))
    assert fitting is not None
    assert fitting.changes == ("trainer.micro_batch 4",)
    assert remedy(planner, replace(card, memory=2)) is None
    small = replace(card, name="small", memory=2.001)
    text = Plan(planner, small, {}).text()
    assert "Fits on: none of these cards" in text
    assert "none of the settings below is enough" in text


def test_what_was_measured_counts(tmp_path: Path, planner: Planner) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"share": {"sample": 0.5, "update": 0.4}, "matrix_rate": 700e12}))
    card = GPUS["h100"]
    reached = measured(file, card)
    assert reached == {"sample": 0.5 * 700 / 989, "update": 0.4 * 700 / 989}
    own = planner.forecast()
    times = {phase.name: phase.seconds(card, reached) for phase in own.phases}
    flops = {phase.name: sum(work.flops for work in phase.work) for phase in own.phases}
    single = {name: rate * card.rate("float32") for name, rate in reached.items()}
    assert times["sample"] == pytest.approx(flops["sample"] / single["sample"])
    assert "35% in sample" in Plan(planner, card, reached).text()
    with pytest.raises(ConfigError, match="--card: should name the card"):
        measured(file, None)
    file.write_text("[]")
    with pytest.raises(ConfigError, match=r"--bench: should be a JSON file of `bench\.py gpu`"):
        measured(file, card)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--card", "h101"], "--card: should be one of"),
        (["--gpus", "0"], "--gpus: should be at least 1. Found 0"),
        (["--policy.name", "causal_lm"], "policy.name: should be sd3"),
        (["--policy.path", "someone/model"], "policy.path: should be a folder"),
        (["--trainer.groups", "7", "--gpus", "5"], "should be a multiple of the number of"),
    ],
)
def test_a_bad_option_is_named(
    options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = ["--config", str(ROOT / "configs" / "tiny_static.yaml")]
    assert plan([*rewards, *options]) == 2
    assert complaint in capsys.readouterr().err


def test_one_process_of_several_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert plan(["--config", "missing.yaml"]) == 0
    assert capsys.readouterr() == ("", "")
