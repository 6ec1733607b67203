"""The benchmarks run and report; how fast is not a test's business."""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import methods, pipelines, train
from benchmarks.phases import REST, Phases
from benchmarks.pipelines import MEDIUM, SMALLEST, random_pipeline
from benchmarks.precision import PAMA, measure_precision
from moa_diffusion.training.stepper import first_scale

ROOT = Path(__file__).parents[2]
Bench = Callable[..., tuple[int, str]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs the script in this process: exit status, stdout."""
    script = str(ROOT / "scripts" / "bench.py")
    for name in ("OMP_NUM_THREADS", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # the script sets them for good

    def start(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
        return int(str(ended.value.code)), capsys.readouterr().out

    return start


class Clock:
    """Counts seconds when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> float:
        self.now += seconds
        return seconds


def test_a_second_belongs_to_the_innermost_phase() -> None:
    clock = Clock()
    phases = Phases(clock)
    clock.work(1)
    with phases.phase("outer"):
        clock.work(2)
        with phases.phase("inner"):
            assert phases.inside("outer")
            clock.work(4)
        clock.work(8)
    assert phases.take() == {REST: 1, "outer": 10, "inner": 4}
    assert phases.take() == {REST: 0}


def test_a_watched_method_is_a_phase_and_is_given_back() -> None:
    clock = Clock()
    phases = Phases(clock)
    with phases.watching((clock, "work", "work"), (clock, "__doc__", "never called")):
        assert clock.work(3) == 3
    clock.work(5)
    assert phases.take() == {REST: 5, "work": 3}


def test_a_peak_is_kept_per_phase() -> None:
    readings = iter([7, 9, 3, 1])
    phases = Phases(Clock(), lambda: {"allocated": next(readings)})
    for _ in range(2):
        with phases.phase("step"):
            pass
    assert phases.peaks == {REST: {"allocated": 7}, "step": {"allocated": 9}}


def test_the_innermost_phase_of_a_failure_is_known() -> None:
    phases = Phases(Clock())
    with pytest.raises(RuntimeError), phases.phase("outer"), phases.phase("inner"):
        raise RuntimeError
    assert phases.interrupted == "inner"
    phases.take()
    assert phases.interrupted is None


def test_random_pipelines_are_equal_for_equal_seeds_and_leave_the_generator() -> None:
    before = torch.get_rng_state()
    first, second = (random_pipeline(SMALLEST, vae_dtype=torch.bfloat16) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("transformer", "text_encoder", "text_encoder_3", "vae"):
        expected = torch.bfloat16 if name == "vae" else torch.float32
        pairs = zip(
            getattr(first, name).parameters(), getattr(second, name).parameters(), strict=True
        )
        for one, other in pairs:
            assert one.dtype == expected
            assert torch.equal(one, other)


def test_the_full_size_has_the_published_number_of_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipelines, "made_as", lambda *_: torch.device("meta"))
    pipeline = random_pipeline(MEDIUM)
    encoders = [getattr(pipeline, f"text_encoder{suffix}") for suffix in ("", "_2", "_3")]
    parts = [pipeline.transformer, *encoders, pipeline.vae]
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    counts[0] += pipeline.transformer.pos_embed.pos_embed.numel()  # in the published 2.5 B
    assert [round(count / 1e6) for count in counts] == [2470, 124, 695, 4762, 84]


def test_train_measures_every_way() -> None:
    assert [(case.name, case.step_batch) for case in train.cases()] == [
        ("sampling alone", 1),
        *(
            (way, steps)
            for way in (
                "9 trained steps",
                "9 trained steps, KL",
                "window of 2",
                "window of 2, no CFG",
                "window of 2, no CFG, batch 8",
                "window of 2, no CFG, batch 8, shared start",
            )
            for steps in (1, 2)
        ),
    ]


def test_train_reports_what_it_measures(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, *others = train.cases()
    with_kl, shared = (next(c for c in others if what in c.name) for what in ("KL", "shared"))
    some = (alone, replace(with_kl, step_batch=2), shared)
    monkeypatch.setattr(train, "cases", lambda: some)
    pipeline, file = tmp_path / "pipeline", tmp_path / "new" / "train.json"
    random_pipeline(SMALLEST).save_pretrained(pipeline)
    status, said = bench("train", "--pipeline", str(pipeline), "--rounds", "1", "--json", str(file))
    assert status == 0
    report = json.loads(file.read_text())
    assert [case["name"] for case in report["cases"]] == [case.name for case in some]
    for case in report["cases"]:
        spent = {name for name, seconds in case["phases"].items() if seconds > 0}
        assert {"sampling", "decode", "rest"} <= spent
        assert ({"forward", "backward", "optimizer"} <= spent) == case["trained"]
        assert ("reference" in spent) == (case["kl_weight"] > 0)
        assert case["name"] in said
    assert report["plain"]["phases"]["encode"] > 0


def test_guards_reports_steps_with_and_without(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {name: methods.GUARDS[name] for name in ("no guard", "KL and norm", "nft")}
    monkeypatch.setattr(methods, "GUARDS", some)
    status, said = bench("guards", "--rounds", "1", "--json", str(tmp_path / "guards.json"))
    assert status == 0
    report = json.loads((tmp_path / "guards.json").read_text())
    assert [row["name"] for row in report["methods"]] == list(some)
    assert report["methods"][0]["step_ratio"] == 1
    assert all(0 < row["update"] < row["step"] for row in report["methods"])
    assert "x no guard" in said


def test_gpu_without_a_gpu_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, said = bench("gpu")
    assert status == 2
    assert "needs a CUDA device" in said


def test_the_first_loss_scale_keeps_float16s_gradients() -> None:
    """At 2^16 most of an early step's gradient vanishes already here, where a latent is small.

    Rounding to 11 bits leaves an error of some thousandths; at full size (`scripts/bench.py
    precision`) it is 0.001 to 0.006, and at 2^16 up to 0.76.
    """
    report = measure_precision(layers=2, heads=1, side=16, steps=(0, 8))
    usual, first = 2.0**16, first_scale(16 * 16 * 16)
    error = {
        (r["window"], r["advantages"], r["scale"], r["step"]): r["error"] for r in report["rows"]
    }
    for window, size in ((2, 1.0), (2, PAMA), (9, 1.0), (9, PAMA)):
        for step in (0, 8):
            assert error[window, size, first, step] < 0.01
        assert error[window, size, usual, 0] > 2 * error[window, size, first, 0]
