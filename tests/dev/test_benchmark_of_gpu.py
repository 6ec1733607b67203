"""The benchmark of a GPU on a small model: what it leaves, whatever happens on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_sweep, random_judges
from benchmarks.gpu_report import Report, out_of_memory
from benchmarks.gpu_rollouts import Operations, denoised
from benchmarks.gpu_summary import summary
from moa_diffusion import assembly, config
from moa_diffusion.commands.plan import measured
from moa_diffusion.config import Config
from moa_diffusion.config.schema import PolicyConfig
from moa_diffusion.planning.gpus import GPUS
from moa_diffusion.policies.sd3 import SD3Policy
from moa_diffusion.scoring import RewardBatch
from moa_diffusion.training.trainer import Trainer
from moa_diffusion.types import Request

ROOT = Path(__file__).parents[2]
CONFIG = """
sampling: {steps: 2, guidance: 1.0}
rewards: {sharpness: {weight: 2}}
trainer: {group_size: 2, updates: 1, sample_batch: 2, micro_batch: 2}
evaluation: {every: 0}
"""
OPERATIONS = Operations(forward=2.0, trained=5.0, decode=3.0)
Measure = Callable[..., tuple[int, dict[str, Any]]]


def settings(tmp_path: Path, *overrides: str, text: str = CONFIG) -> Config:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return config.load(file, overrides)


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Runs the benchmark without what other tests look at: exit status, report."""
    monkeypatch.setattr(gpu, "count_operations", lambda *given: OPERATIONS)
    monkeypatch.setattr(
        gpu, "_precision", lambda *given: {"rows": [], "dtype": "", "layers": 0, "hidden": 0}
    )
    wanted = gpu_sweep.cells

    def run(*overrides: str, cells: int = 0, minutes: float = 60.0) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(gpu_sweep, "cells", lambda *a, **k: wanted(*a, **k)[:cells])
        file = tmp_path / "gpu.json"
        options = {"groups": 2, "rollouts": 1, "minutes": minutes}
        status = gpu.measure_gpu(
            settings(tmp_path, *overrides), file, size="tiny", device="cpu", **options
        )
        return status, json.loads(file.read_text())

    return run


def test_all_is_reported_on_a_small_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command as a user calls it, in float16 and with a probe, and no time for a sweep."""
    file, script = tmp_path / "new" / "gpu.json", str(ROOT / "scripts" / "bench.py")
    (tmp_path / "run.yaml").write_text(CONFIG)
    command = f"gpu --config {tmp_path}/run.yaml --device cpu --size tiny --minutes 0 --json {file}"
    overrides = "--policy.dtype float16 --objectives.method upgrad --gradients.mode probe"
    monkeypatch.setattr(sys, "argv", [script, *command.split(), *overrides.split()])
    for name in ("OMP_NUM_THREADS", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # the script sets them for good
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    said, report = capsys.readouterr().out, json.loads(file.read_text())
    assert ended.value.code == 0, report["problems"]
    assert report["finished"]
    assert report["images"] == 4
    assert report["sweep"] == []
    assert report["not_reached"][0]["micro_batch"] == 2
    assert report["matrix_rates"].keys() == {"float16", "bfloat16"}
    assert report["on_policy"] == {"ratio_gap": 0.0, "tolerance": 5e-5, "held": True}
    assert {row["dtype"] for row in [report["gradients"]]} == {"float16"}
    assert set(report["share"]) == {"sample", "decode", "probe", "update"}
    flops = report["flops"]
    assert 2 < flops["trained"] / flops["forward"] < 3
    [row] = report["rows"]
    assert row["flops"]["sample"] == 4 * 2 * flops["forward"]
    assert row["flops"]["update"] == 4 * flops["trained"]
    assert row["flops"]["probe"] == 2 * flops["trained"]  # a micro-batch
    assert row["flops"]["decode"] == 4 * flops["decode"]
    for phase in ("build", "encode prompts", "load judges", "sample", "decode", "score"):
        assert report["seconds"][phase] > 0
    for phase in ("statistics", "probe", "update", "rest"):
        assert report["seconds"][phase] > 0
    for word in ("| update |", ": held.", str(file)):
        assert word in said
    versions = ("torch", "cuda", "cudnn", "driver", "diffusers", "transformers", "peft", "commit")
    assert set(versions) <= report["machine"].keys()
    assert measured(file, GPUS["h100"]).keys() == {"sample", "update"}


def test_batches_are_halved_where_memory_runs_out(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = SD3Policy.log_probs

    def short(self: Any, rollout: Any, *given: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and len(rollout) > 1:
            raise torch.OutOfMemoryError("no memory left")
        return whole(self, rollout, *given, **options)

    monkeypatch.setattr(SD3Policy, "log_probs", short)
    status, report = measure(cells=3)
    assert status == 0
    [halved] = report["halved"]
    assert halved["phase"] == "update"
    assert halved["from"] == {"sample_batch": 2, "micro_batch": 2}
    assert halved["to"]["micro_batch"] == 1
    assert report["images"] == 4
    # The recipe's own, the other checkpointing, and twice as much.
    assert [cell["status"] for cell in report["sweep"]] == ["measured", "measured", "out of memory"]
    assert "no memory left" in report["sweep"][2]["error"]


def test_sampling_is_halved_by_itself(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = SD3Policy.sample

    def short(self: Any, requests: Any, *, step: int) -> Any:
        if len(requests) > 1:
            raise torch.OutOfMemoryError("no memory left")
        return draw(self, requests, step=step)

    monkeypatch.setattr(SD3Policy, "sample", short)
    status, report = measure()
    assert status == 0
    assert [entry["phase"] for entry in report["halved"]] == ["sample"]
    assert report["halved"][0]["to"] == {"sample_batch": 1, "micro_batch": 2}


def test_a_phase_that_fails_is_named_and_the_rest_goes_on(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Any, rollout: Any) -> Any:
        raise ValueError("no such kernel")

    monkeypatch.setattr(Trainer, "statistics", broken)
    status, report = measure(cells=1)
    assert status == 1
    assert report["problems"] == [
        {"stage": "training steps", "error": "ValueError: no such kernel"}
    ]
    assert report["interrupted"]["phase"] == "statistics"
    assert report["interrupted"]["seconds"]["update"] > 0
    assert "gradients" in report
    assert report["sweep"][0]["status"] == "measured"
    assert report["finished"]
    said = capsys.readouterr().out
    assert "FAILED: training steps: ValueError: no such kernel" in said
    assert "A rollout ended in statistics, after" in said


def test_what_was_measured_outlives_an_end_in_the_middle(
    tmp_path: Path, measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_sweep.Sweep, "_draw", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure(cells=1)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert not report["finished"]
    assert report["stage"] == "sweep"
    assert report["images_per_second"] > 0
    assert measured(tmp_path / "gpu.json", GPUS["h100"]).keys() == {"sample", "update"}


def test_the_recipes_own_policy_has_left_before_others_are_built(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card holds one of them beside what the update takes."""
    models: list[weakref.ref[Any]] = []
    build = gpu_sweep.trainer_on

    def built(pipeline: Any, *given: Any) -> Any:
        assert [model for model in models if model() is not None] == []
        models.append(weakref.ref(pipeline.transformer))
        return build(pipeline, *given)

    monkeypatch.setattr(gpu, "trainer_on", built)
    monkeypatch.setattr(gpu_sweep, "trainer_on", built)
    status, report = measure(cells=2)
    assert (status, len(models)) == (0, 3)
    assert report["sweep"][1]["status"] == "measured"


def test_a_judge_that_does_not_load_gets_a_stand_in(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(*given: Any) -> None:
        raise torch.OutOfMemoryError("16 GB")

    monkeypatch.setattr(random_judges, "random_clip", large)
    status, report = measure("--rewards", "{pickscore: {}, colourfulness: {}}")
    assert status == 1
    assert report["problems"][0]["stage"] == "load judges: pickscore"
    assert {judge["name"]: judge["kind"] for judge in report["judges"]} == {
        "sharpness": "as configured",
        "pickscore": "stand-in",
        "colourfulness": "as configured",
        "stand_in_4": "stand-in",
    }
    assert report["score_seconds"]["pickscore"] >= 0


def test_judges_have_the_architecture_of_the_recipe(tmp_path: Path) -> None:
    rewards = "{pickscore: {weight: 2.0}, deqa: {dtype: bfloat16, batch_size: 3}, qrealign: {}}"
    recipe = settings(tmp_path, "--rewards", rewards)
    chosen = random_judges.judges(recipe, tmp_path / "models", device="cpu", full=False)
    assert [(judge.name, judge.kind) for judge in chosen] == [
        ("sharpness", "as configured"),
        ("pickscore", "random weights"),
        ("deqa", "random weights"),
        ("qrealign", "stand-in"),
    ]
    assert "yuvalkirstain/PickScore_v1" in chosen[1].note
    heads = assembly.heads(
        dataclasses.replace(recipe, rewards={judge.name: dict(judge.options) for judge in chosen})
    )
    assert heads["deqa"].batch_size == 3
    images = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    for head in heads.values():
        assert head(RewardBatch(prompts=["a red circle"] * 4, images=images)).isfinite().all()
    assert next(heads["deqa"]._loaded().module.parameters()).dtype == torch.bfloat16
    full = random_judges.judges(recipe, tmp_path / "full", device="cpu", full=True)
    sizes = json.loads((Path(str(full[1].options["model"])) / "config.json").read_text())
    assert sizes["vision_config"]["num_hidden_layers"] == 32
    assert sizes["text_config"]["max_position_embeddings"] == 77


def test_a_start_that_is_shared_is_counted_once() -> None:
    policy: Any = SimpleNamespace(
        trained_steps=lambda step: range(3, 5), sampling=SimpleNamespace(steps=10)
    )
    own = [Request(prompt="a", seed=i) for i in range(6)]
    assert denoised(policy, own, 4, step=0) == 6 * 10
    shared = [dataclasses.replace(request, start_seed=1) for request in own]
    # Batches of four and two: a start each.
    assert denoised(policy, shared, 4, step=0) == 2 * 3 + 6 * 7


@dataclasses.dataclass
class Compiled(PolicyConfig):
    compile: str = "off"


def test_cells_begin_with_the_recipe_and_know_what_the_configuration_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = settings(tmp_path)
    with_key = dataclasses.replace(recipe, policy=Compiled(**vars(recipe.policy)))
    monkeypatch.setattr(gpu_sweep, "PolicyConfig", Compiled)
    plan = gpu_sweep.cells(with_key, 8, device="cpu")
    assert len(set(plan)) == len(plan)
    own = gpu_sweep.Cell(micro_batch=8, checkpointing=False, attention="native", compile="off")
    assert plan[0] == own
    assert plan[1] == dataclasses.replace(own, checkpointing=True)
    assert dataclasses.replace(own, compile="blocks") in plan[:4]
    assert {cell.micro_batch for cell in plan} == {1, 4, 8, 16, 32}
    assert {cell.attention for cell in plan} == {"native", "_native_math"}
    chosen = dataclasses.replace(own, compile="blocks", checkpointing=True).applied(with_key)
    assert (chosen.policy.gradient_checkpointing, vars(chosen.policy)["compile"]) == (
        True,
        "blocks",
    )
    other = [f for f in dataclasses.fields(PolicyConfig) if f.name != "compile"]
    monkeypatch.setattr(gpu_sweep.dataclasses, "fields", lambda kind: other)
    assert {cell.compile for cell in gpu_sweep.cells(recipe, 8, device="cpu")} == {None}


def test_a_report_is_whole_after_every_addition(tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json")
    report.add(rate=float("nan"))
    assert json.loads(report.file.read_text()) == {"finished": False, "problems": [], "rate": None}
    with report.stage("first"):
        raise ValueError("one\n  two")
    assert json.loads(report.file.read_text())["problems"] == [
        {"stage": "first", "error": "ValueError: one two"}
    ]
    failure = RuntimeError()
    failure.__cause__ = torch.OutOfMemoryError()
    assert out_of_memory(failure)
    assert out_of_memory(RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED"))
    assert not out_of_memory(ValueError())


def test_a_report_with_nothing_measured_can_be_shown(tmp_path: Path) -> None:
    report = {
        "machine": {"device": "card", "memory_bytes": 8e9}
        | dict.fromkeys(("torch", "cuda", "cudnn", "driver", "diffusers", "transformers", "peft")),
        **dict.fromkeys(("method", "size", "dtype", "vae_dtype", "resolution"), "x"),
        "judges": [],
        "problems": [{"stage": "build", "error": "RuntimeError: x"}],
    }
    report["machine"]["commit"] = None
    shown = summary(report, tmp_path)
    assert "No rollout was measured." in shown
    assert "### card with 8 GB" in shown
    assert "FAILED: build: RuntimeError: x" in shown
