"""Tables in Markdown."""

from __future__ import annotations

from moa_diffusion.report.markdown import markdown


def test_columns_are_padded_and_numbers_stand_right():
    assert markdown([["name", "gain"], ["a", "+10.5"], ["longer", "-"]]) == (
        "| name   |  gain |\n| ------ | ----: |\n| a      | +10.5 |\n| longer |     - |"
    )
