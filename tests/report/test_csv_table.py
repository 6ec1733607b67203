"""``summary.csv``."""

from __future__ import annotations

import csv
import io
import math

import pytest

from moa_diffusion.report.csv_table import csv_text
from report_pages import random_values, short_summary, table_of


def test_every_model_has_a_line_per_reward_with_the_numbers_of_the_summary():
    values = random_values(3, 2, 4, 2)
    values[:, 1] = math.nan
    table = table_of(values, None)
    summary = short_summary(table)
    rows = list(csv.DictReader(io.StringIO(csv_text(table, summary))))
    assert [(row["model"], row["step"], row["reward"]) for row in rows] == [
        (label, step, reward)
        for label, step in (("base", ""), ("run/step-1", "1"), ("run/step-2", "2"))
        for reward in ("reward0", "reward1")
    ]
    one = summary.models[2].rewards["reward0"]
    assert float(rows[4]["gain"]) == one.gain.value
    assert float(rows[4]["gain_in_stds_low"]) == one.gain_in_stds.low
    assert float(rows[4]["win_rate_high"]) == one.win_rate.high
    assert (rows[4]["unit"], rows[4]["samples"]) == ("points", "8")
    assert rows[5]["mean"] == rows[5]["win_rate"] == "", "it does not apply"


def test_a_win_is_counted_per_sample_and_a_tie_half():
    values = random_values(2, 1, 2, 2)
    values[1, 0] = values[0, 0] + [[1.0, -1.0], [0.0, 2.0]]
    table = table_of(values, None)
    base, model = short_summary(table).models
    assert model.rewards["reward0"].win_rate.value == pytest.approx(2.5 / 4)
    assert base.rewards["reward0"].win_rate.value == 0.5
