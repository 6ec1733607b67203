"""The cards at the head of a page: a model for each series, and its gains."""

from __future__ import annotations

import math
from pathlib import Path

import numpy

from moa_diffusion.report.page import cards as headline
from moa_diffusion.report.page.page import write_report
from report_pages import Page, short_summary, table_of


def test_a_card_names_the_model_with_the_largest_worst_gain(tmp_path: Path):
    values = numpy.zeros((4, 2, 3, 2))
    values[:, :, :, 1] = 2.0**0.5  # the base model's std within a prompt is 1
    for e, (first, second) in enumerate([(5.0, -1.0), (0.5, 0.25), (2.0, 0.125)], start=1):
        values[e] += numpy.array([first, second])[:, None, None]
    table = table_of(values, None)
    (card,) = headline.cards(table, short_summary(table), {})
    assert (card.label, card.model) == ("run/step-2", 2)
    assert card.worst == "+0.25 (reward1)"
    assert [gain.sign for gain in card.gains] == ["up", "up"]
    assert card.gains[0].bar == (98.0, 98.0, 98.0)
    assert card.gains[1].bar == (74.0, 74.0, 74.0)
    assert card.alarms is None
    page = write_report(table, short_summary(table), {}, tmp_path / "report.html").read_text()
    assert '<strong class="up">+0.25 (reward1)</strong>' in page
    assert Page(tmp_path / "report.html").json("data")["first"] == 2


def test_one_seed_has_gains_in_the_units_of_the_rewards(tmp_path: Path):
    values = numpy.zeros((2, 2, 3, 1))
    values[1] = 0.5
    values[:, 1] = math.nan
    table = table_of(values, None)
    (card,) = headline.cards(table, short_summary(table), {})
    assert card.worst is None
    assert [gain.text for gain in card.gains] == ["+0.5 [+0.5, +0.5] points", "does not apply"]
    page = write_report(table, short_summary(table), {}, tmp_path / "report.html").read_text()
    assert "there are no standard deviations" in page
