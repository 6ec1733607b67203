"""A gain has one unit, whoever says it; a prompt that is held out twice is one prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from moa_diffusion.calibration.describe import describe
from moa_diffusion.comparison.curves import changes
from moa_diffusion.comparison.read import RunData, read_run
from moa_diffusion.comparison.results import compare, start_units
from moa_diffusion.config.schema import EvaluationConfig
from moa_diffusion.distributed import LocalComm
from moa_diffusion.monitoring.heldout import HeldOut
from moa_diffusion.monitoring.progress import Progress
from moa_diffusion.report.summary import base_spread, summarise
from moa_diffusion.report.table import Column, Table
from moa_diffusion.scoring import Scorer
from moa_diffusion.storage.log import RunLog
from moa_diffusion.types import Generated, Request
from rewards import RewardBatch, RewardHead

NAN = math.nan


class Red(RewardHead):
    """Mean red channel; does not apply to an image without any blue."""

    name = "red"

    def score(self, batch: RewardBatch) -> Tensor:
        assert batch.images is not None
        red, _, blue = batch.images.double().mean((2, 3)).T
        return torch.where(blue > 0, red, NAN)


class Drawn:
    """Draws a pixel of the colour that it was told for the seed."""

    lockstep = False

    def __init__(self) -> None:
        self.red: dict[int, float] = {}

    def trainable(self) -> dict[str, Parameter]:
        return {"none": Parameter(torch.zeros(1))}

    def expect(self, prompts: Sequence[str]) -> None:
        pass

    def generate(self, requests: Sequence[Request]) -> Generated:
        red = torch.tensor([self.red[request.seed] for request in requests])
        known = ~red.isnan()
        pixel = torch.stack([red.nan_to_num(nan=0.0), torch.zeros(len(red)), known.float()], 1)
        return Generated(outputs=pixel[:, :, None, None])


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., Any]:
    def run(
        prompts: Sequence[str],
        groups: Sequence[int],
        evaluations: Sequence[Sequence[float]],
        *,
        whole: bool = False,
    ) -> Any:
        """Evaluations in which sample i scores ``evaluations[step][i]``; or ``HeldOut`` too."""
        policy, comm = Drawn(), LocalComm()
        scorer = Scorer({"red": Red()}, comm)
        heldout = HeldOut(
            [
                Request(prompt=prompt, group=group, sibling=groups[:i].count(group), seed=i)
                for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
            ],
            settings=EvaluationConfig(pictures=0, rollout_images=0),
            drawing="",
            policy=policy,  # type: ignore[arg-type]  # what drawing needs
            scorer=scorer,
            training=scorer,
            batch=4,
            log=RunLog(tmp_path, main=True),
            progress=Progress(comm, bars=False),
        )
        found = []
        for step, values in enumerate(evaluations):
            policy.red = dict(enumerate(values))
            found.append(heldout(step, before_batch=lambda: None))
        scorer.close()
        return (heldout, found) if whole else found

    return run


def run_data(
    folder: Path, samples: Sequence[tuple[int, int, str]], values: Sequence[Sequence[float]]
) -> RunData:
    (folder / "evaluation").mkdir(parents=True)
    for step, column in enumerate(values):
        lines = [
            json.dumps(
                {
                    "group": group,
                    "sibling": sibling,
                    "prompt": prompt,
                    "seed": i,
                    "reward/red": None if math.isnan(value) else value,
                }
            )
            for i, ((group, sibling, prompt), value) in enumerate(zip(samples, column, strict=True))
        ]
        path = folder / "evaluation" / f"step-{step:06d}.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
    (folder / "metrics.jsonl").write_text('{"step": 1, "seconds/total": 1.0}\n', encoding="utf-8")
    return read_run(folder, method="m", seed=0, names=["red"])


def table_of(prompts: Sequence[str], values: Any) -> Table:
    """One reward; ``values`` are ``[E, P, S]``."""
    array = numpy.array(values)[:, None]
    return Table(
        models=tuple(
            Column(
                label=str(e),
                series="" if e == 0 else "run",
                step=e,
                weights=None,
                model_digest="",
                adapter_digest="",
            )
            for e in range(len(array))
        ),
        prompts=tuple(prompts),
        seeds=tuple(range(array.shape[3])),
        rewards=("red",),
        values=array,
        images=None,
        texts=tuple(tuple(("",) * array.shape[3] for _ in prompts) for _ in array),
        units={"red": "share"},
        scorers={},
        sampler={},
    )


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("missing", [False, True])
def test_all_gains_have_the_same_unit(evaluate, size, missing, tmp_path):
    noise = 0.8 * torch.rand(3, size, generator=torch.Generator().manual_seed(size))
    if missing:
        noise[1, 1:] = NAN  # a single value: no spread within this prompt
        noise[2] = NAN
    flat = noise.flatten().tolist()
    texts = [f"prompt {p}" for p in range(3) for _ in range(size)]
    groups = [p for p in range(3) for _ in range(size)]
    squares = [float(row.double().var()) for row in noise if not row.isnan().any()]
    unit = math.sqrt(sum(squares) / len(squares))

    after = [value + 0.1 for value in flat]
    _, found = evaluate(texts, groups, [flat, after])
    samples = list(zip(groups, [i % size for i in range(3 * size)], texts, strict=True))
    # Noise of float32, in which 0.1 more is rounded by 6e-8: 6e-7 of the gain.
    assert found.metrics["eval_gain/red"] == pytest.approx(0.1 / unit, rel=1e-5)
    (compared,) = start_units([run_data(tmp_path / "run", samples, [flat, after])])
    (summed,) = base_spread(table_of(texts[::size], noise.view(1, 3, size).tolist()))
    described = describe(noise.flatten().double(), torch.tensor(groups))["std_within"]
    # Float64, as all below, whose sums go in another order.
    assert [compared, summed, described] == pytest.approx([unit] * 3, rel=1e-6)


def test_a_checkpoint_of_an_earlier_version_has_gains_without_errors(evaluate):
    """It has mean and spread of the start, and no samples."""
    draws = torch.Generator().manual_seed(0)
    before = (0.5 * torch.rand(6, generator=draws)).tolist()
    after = [value + 0.1 * i for i, value in enumerate(before)]
    (heldout, _) = evaluate(["a"] * 3 + ["b"] * 3, [0] * 3 + [1] * 3, [before, after], whole=True)
    (now,) = heldout.standings()
    state = heldout.state_dict()
    del state["start"]
    heldout.start = torch.full_like(heldout.start, NAN)
    heldout.load_state_dict(state)
    (old,) = heldout.standings()
    assert now.error > 0
    assert old.gain == now.gain
    assert math.isnan(old.error)
    assert math.isnan(old.interval.value)


def test_a_prompt_held_out_twice_is_one_prompt(evaluate, tmp_path):
    """As two groups of three images, which tells what one group of six does."""
    values = 0.6 * torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0))
    values[1] += 0.3 * torch.rand(4, 1, generator=torch.Generator().manual_seed(1))
    before, after = values.flatten(1).tolist()
    texts = [f"prompt {p}" for p in range(4) for _ in range(6)]
    once = [p for p in range(4) for _ in range(6)]
    twice = [2 * p + i // 3 for p in range(4) for i in range(6)]

    errors = []
    for groups in (once, twice):
        _, found = evaluate(texts, groups, [before, after])
        errors.append((found.metrics["eval_mean/red"], found.metrics["eval_sem/red"]))
        assert len(found.prompts.unique()) == 4  # what an alarm's standard error is over
        errors.append(tuple(float(column[-1]) for column in changes(tmp_path, "red")[1:]))
    assert errors[2:] == [pytest.approx(pair) for pair in errors[:2]]

    tables = []
    for groups in (once, twice):
        siblings = [groups[:i].count(group) for i, group in enumerate(groups)]
        found = compare(
            [
                run_data(
                    tmp_path / f"run-{len(tables)}",
                    list(zip(groups, siblings, texts, strict=True)),
                    [before, after],
                )
            ]
        )
        (method,) = found.methods
        assert found.prompts == 4
        low, high = (
            bound * found.units["red"]
            for bound in (method.gains["red"].low, method.gains["red"].high)
        )
        tables.append([low, high])
    assert tables[1] == pytest.approx(tables[0])

    sums = [
        summarise(table_of([f"prompt {p}" for p in range(4)], values.tolist())),
        summarise(table_of([f"prompt {p // 2}" for p in range(8)], values.view(2, 8, 3).tolist())),
    ]
    one, two = (found.models[1].rewards["red"] for found in sums)
    assert (two.gain.low, two.gain.high) == pytest.approx((one.gain.low, one.gain.high))
    assert two.improved == one.improved
