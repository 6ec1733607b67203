"""What an evaluation leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
from pyarrow import parquet

from moa_diffusion.evaluation.records import ScoredSamples
from moa_diffusion.report.table import read_table


def test_the_table_names_what_scores_depend_on(evaluated: tuple[Path, ScoredSamples]):
    output, found = evaluated
    row = parquet.read_table(output / "scores.parquet").to_pylist()[-1]
    assert row["sampler_steps"] == 2
    assert row["sampler_guidance"] == 1.5
    assert row["sampler_scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert row["scorer_digest"] == found.versions["signs"].digest
    assert json.loads(row["weights"]) == {"a/step-2": 0.5, "b/step-2": 0.5}
    assert row["score"] is None
    assert (output / row["image"]).is_file()
    table = read_table(output)
    assert table.values.shape == (6, 3, 3, 2)
    assert numpy.isnan(table.values[:, 2, 1:]).all()
    assert not numpy.isnan(table.values[:, 2, 0]).any()
