"""The cards at the head of a page: a model for each series, and its gains."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy

from moa_diffusion.files import program
from moa_diffusion.report.page import cards as headline
from moa_diffusion.report.page.page import write_report
from report_pages import Page, column, short_summary, table_of


def test_a_card_names_the_model_with_the_largest_worst_gain(tmp_path: Path):
    values = numpy.zeros((4, 2, 3, 2))
    values[:, :, :, 1] = 2.0**0.5  # the base model's std within a prompt is 1
    for e, (first, second) in enumerate([(5.0, -1.0), (0.5, 0.25), (2.0, 0.125)], start=1):
        values[e] += numpy.array([first, second])[:, None, None]
    table = table_of(values, None)
    (card,) = headline.cards(table, short_summary(table), {}, {}, tmp_path)
    best, last = card.shown
    assert (best.role, best.label, best.model) == ("best", "run/step-2", 2)
    assert best.worst == "+0.25 (reward1)"
    assert [gain.sign for gain in best.gains] == ["up", "up"]
    assert [gain.text for gain in best.gains] == ["+0.50 [+0.50, +0.50]", "+0.25 [+0.25, +0.25]"]
    assert [(gain.won, gain.won_within) for gain in best.gains] == [("100%", "[100%, 100%]")] * 2
    assert (last.role, last.label) == ("last", "run/step-3")
    assert card.sign == "up"
    assert card.answer == "run/step-2 is better in reward0 and reward1, and worse in none."
    assert (card.warning, card.command, card.cost, card.alarms) == ("", None, "", None)
    page = write_report(table, short_summary(table), {}, tmp_path / "report.html").read_text()
    assert 'worst gain <b class="up">+0.25 (reward1)</b>' in page
    assert Page(tmp_path / "report.html").json("data")["first"] == 2


def test_one_seed_has_gains_in_the_units_of_the_rewards(tmp_path: Path):
    values = numpy.zeros((2, 2, 3, 1))
    values[1] = 0.5
    values[:, 1] = math.nan
    table = table_of(values, None)
    (card,) = headline.cards(table, short_summary(table), {}, {}, tmp_path)
    (one,) = card.shown
    assert one.worst is None
    assert [gain.text for gain in one.gains] == ["+0.5 [+0.5, +0.5] points", "does not apply"]
    page = write_report(table, short_summary(table), {}, tmp_path / "report.html").read_text()
    assert "there are no standard deviations" in page


def test_a_run_that_collapsed_shows_its_last_checkpoint_too(tmp_path: Path):
    values = numpy.zeros((3, 2, 3, 2))
    values[:, :, :, 1] = 2.0**0.5
    values[2] += numpy.array([3.0, -4.0])[:, None, None]
    table = table_of(values, None)
    (card,) = headline.cards(table, short_summary(table), {}, {"run": Path("a b")}, tmp_path)
    assert card.answer == "run/step-1 does not differ from the base model beyond noise."
    assert card.warning == "The last one, run/step-2, is worse in reward1."
    assert [gain.won for gain in card.best.gains] == ["50%"] * 2, "ties count half"
    assert card.command == (
        f"{program.words('export')} --run 'a b' --checkpoint step-1 --output 'a b/exported' "
        f"--evaluation {tmp_path}"
    )


def test_a_soup_of_checkpoints_of_one_step_has_a_command(tmp_path: Path):
    folders = {"a": Path("runs/a"), "b": Path("runs/b")}

    def command(steps: tuple[int, int], ema: bool | None) -> str | None:
        parts = [column(f"{run}/step-{step}", step) for run, step in zip("ab", steps, strict=True)]
        weights = dict(zip((part.label for part in parts), (0.25, 0.75), strict=True))
        soup = dataclasses.replace(column("soup a+b/25:75"), weights=weights, ema=ema)
        table = table_of(numpy.zeros((4, 1, 1, 1)), None)
        table = dataclasses.replace(table, models=(column("base"), *parts, soup))
        return headline.export_command(table, 3, folders, Path("out"))

    assert command((2, 2), False) == (
        f"{program.words('export')} --run a=runs/a --run b=runs/b --checkpoint step-2 "
        "--weights 0.25,0.75 --no-ema --output exported --evaluation out"
    )
    assert command((2, 3), True) is None
