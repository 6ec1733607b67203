"""What the benchmark of a GPU does on a card, on one that is not there.

Its own transfers and dtypes, that is: the policy's are tested at full width, and so are the heads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from card import CARD, CPU, HostReads, NumberedScheduler, pretended_card
from fixed_objectives import FixedObjectives

from benchmarks import gpu_report, gpu_sweep, precision
from benchmarks.pipelines import SMALLEST, random_pipeline
from moa_diffusion import assembly, config
from moa_diffusion.training.geometry import Geometry

CONFIG = """
policy: {dtype: float16}
sampling: {steps: 3, guidance: 1.0, resolution: 8, window: 1}
trainer: {groups: 2, group_size: 2, updates: 1, sample_batch: 2, micro_batch: 2}
loss: {clip_range: 2.0}
rewards: {colourfulness: {}, sharpness: {}}
evaluation: {every: 0}
"""


def numbered(*given: Any, **options: Any) -> Any:
    pipeline = random_pipeline(*given, **options)
    pipeline.scheduler = NumberedScheduler()
    return pipeline


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostReads]:
    monkeypatch.setattr(Accelerator, "device", CARD)
    for module in (gpu_sweep, precision):
        monkeypatch.setattr(module, "random_pipeline", numbered)
    with pretended_card(real_inputs=True) as reads:
        yield reads


def test_other_settings_are_tried_on_the_card(
    host: HostReads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(CONFIG)
    settings, built = config.load(file, []), []
    build = gpu_sweep.trainer_on

    def remembered(*given: Any) -> Any:
        run, trainer = build(*given)
        built.append(trainer)
        return run, trainer

    def backward(*given: Any, **options: Any) -> None:  # the engine asks the driver of a card
        for parameter in built[-1].policy.trainable().values():
            parameter.grad = torch.zeros_like(parameter)

    def objectives(trainer: Any, rollout: Any) -> Any:  # weighing reads numbers
        weights = torch.full((2,), 0.5, dtype=torch.float64)
        return FixedObjectives(torch.zeros(2, len(rollout)), lambda _: weights)

    monkeypatch.setattr(gpu_sweep, "trainer_on", remembered)
    monkeypatch.setattr(torch.autograd, "backward", backward)
    monkeypatch.setattr(gpu_sweep, "even_objectives", objectives)
    monkeypatch.setattr(gpu_sweep, "clock_of", lambda device: time.perf_counter)
    width = int(SMALLEST.transformer["joint_attention_dim"])
    encoded = (torch.empty(1, 144, width, device=CARD), torch.empty(1, width, device=CARD))
    sweep = gpu_sweep.Sweep(
        settings,
        SMALLEST,
        device=str(CARD),
        encode=gpu_sweep.Embeddings(lambda _: encoded, prompts(settings), str(CARD)),
        rewards=settings.rewards,
        geometry=Geometry(
            groups=2, group_size=2, updates=1, world_size=1, sample_batch=2, micro_batch=2
        ),
    )
    own = gpu_sweep.Cell(micro_batch=8, checkpointing=False, attention="native", compile=None)
    monkeypatch.setattr(gpu_sweep, "cells", lambda *given, **options: (own,))
    report = gpu_report.Report(tmp_path / "gpu.json")
    sweep.measure(report, until=math.inf)
    [row] = report.values["sweep"]
    assert row["status"] == "measured", row
    assert {p.device for p in built[0].policy.transformer.parameters()} == {CARD}


def prompts(settings: Any) -> list[str]:
    return [prompt.text for prompt in assembly.train_prompts(settings).prompts]


def test_gradients_in_half_precision_are_compared_on_the_card(
    host: HostReads, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def grad(outputs: Any, inputs: Any, **options: Any) -> Any:
        asked.append({parameter.device for parameter in inputs})
        return [torch.zeros_like(parameter) for parameter in inputs]

    monkeypatch.setattr(torch.autograd, "grad", grad)
    monkeypatch.setattr(precision, "STEPS", 2)
    report = precision.measure_precision(
        layers=2, heads=1, side=4, steps=(0,), dtype="bfloat16", device=str(CARD)
    )
    assert {place for places in asked for place in places} == {CARD}
    assert report["dtype"] == "bfloat16"
    assert report["rows"]
    assert CPU not in asked[0]
