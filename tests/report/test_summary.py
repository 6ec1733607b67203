"""The summary of an evaluation: each of its numbers, from the table alone."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy
import pytest
from pyarrow import parquet

from moa_diffusion.evaluation.records import ScoredSamples
from moa_diffusion.report.summary import summarise, text
from moa_diffusion.report.table import read_table


def test_the_summary_says_what_the_table_holds(evaluated: tuple[Path, ScoredSamples]):
    """Recomputed from the file alone."""
    output, _ = evaluated
    rows = parquet.read_table(output / "scores.parquet").to_pylist()
    assert len(rows) == 6 * 3 * 2 * 3
    said = (output / "summary.md").read_text()
    names = list(dict.fromkeys(row["checkpoint"] for row in rows))
    assert names == ["base", "a/step-1", "a/step-2", "b/step-1", "b/step-2", "a+b 50:50"]
    draws = numpy.random.default_rng(0).multinomial(3, [1 / 3] * 3, size=2000)
    checked = 0
    for reward in ("colourfulness", "sharpness", "signs"):
        section = said.split(f"## {reward}")[1].split("\n## ")[0]
        scores = {
            (row["checkpoint"], row["prompt_index"], row["seed"]): row["score"]
            for row in rows
            if row["reward"] == reward and row["score"] is not None
        }
        prompts = sorted({key[1] for key in scores})
        assert prompts == ([0] if reward == "signs" else [0, 1, 2])
        base = {p: [scores["base", p, s] for s in (0, 1)] for p in prompts}
        std = math.sqrt(numpy.mean([numpy.var(pair, ddof=1) for pair in base.values()]))
        for name in names:
            mine = {p: [scores[name, p, s] for s in (0, 1)] for p in prompts}
            line = next(row for row in section.splitlines() if row.startswith(f"| {name} "))
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            gains = {p: numpy.subtract(mine[p], base[p]).mean() for p in prompts}
            sums = numpy.array([[sum(mine[p]) if p in mine else 0.0 for p in range(3)]])
            counts = numpy.array([2.0 if p in mine else 0.0 for p in range(3)])
            with numpy.errstate(invalid="ignore"):
                again = (sums @ draws.T)[0] / (draws @ counts)
            low, high = numpy.nanquantile(again, [0.025, 0.975])
            mean = numpy.mean(list(mine.values()))
            assert cells[1] == f"{mean:.4g} [{low:.4g}, {high:.4g}]"
            if name == "base":
                assert cells[2:5] == ["-", "-", "-"]
                continue
            gain = numpy.mean(list(gains.values()))
            assert cells[2].split()[0] == f"{gain:+.4g}"
            assert cells[3].split()[0] == f"{gain / std:+.2f}"
            assert cells[4] == f"{numpy.mean([g > 0 for g in gains.values()]):.0%}"
            assert cells[5] == str(2 * len(prompts))
            checked += 1
    assert checked == 15

    # The volume of one point is a product.
    table = read_table(output)
    numbers = summarise(table)
    for model in numbers.models:
        gains = [max(0.0, one.gain_in_stds.value) for one in model.rewards.values()]
        assert model.hypervolume.value == pytest.approx(math.prod(gains))  # float64
        assert f"| {model.label} " in said.split("## Front")[1]
    assert json.loads((output / "summary.json").read_text())["units"] == dict(numbers.units)


def test_one_seed_has_no_unit(evaluated: tuple[Path, ScoredSamples]):
    table = read_table(evaluated[0])
    one = dataclasses.replace(
        table,
        seeds=table.seeds[:1],
        values=table.values[..., :1],
        images=tuple(tuple(row[:1] for row in model) for model in table.images),
    )
    found = summarise(one, resamples=20)
    assert all(math.isnan(unit) for unit in found.units.values())
    assert math.isnan(found.together.value)
    assert "so there is no std" in text(one, found)
