"""The options of a head, as the list shows them and as the documentation explains them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from heads_command import HeadsCommand

from rewards.commands.head_cards import CARDS
from rewards.commands.head_options import about

OPTIONS = Path(__file__).parents[3] / "moa_diffusion" / "config" / "options.json"


def cells_of(printed: str) -> dict[str, list[str]]:
    """Cells of a table by the first of the row; those of lines that go on are joined."""
    rows: dict[str, list[str]] = {}
    for line in printed.splitlines():
        if "│" in line:
            cells = [cell.strip() for cell in line.split("│")[1:-1]]
            name = cells[0] or list(rows)[-1]
            before = rows.get(name, [""] * len(cells))
            rows[name] = [f"{a} {b}".strip() for a, b in zip(before, cells, strict=True)]
    return rows


def test_list_shows_the_options_of_a_head(heads_command: HeadsCommand) -> None:
    status, printed, _ = heads_command("list", "prompt_colour")
    assert status == 0
    assert printed.startswith("prompt_colour: ")
    assert "unit share of named colours; range 0 to 1; weights none" in printed
    rows = cells_of(printed)
    assert list(rows) == ["share", "tolerance"]
    assert rows["share"][1:3] == ["a number", "0.15"]
    assert rows["share"][3].startswith("Part of the pixels")
    assert "in (0, 1]" in rows["share"][3]


def test_list_of_what_has_no_options_or_is_none(heads_command: HeadsCommand, grey: str) -> None:
    assert "It has no options." in heads_command("list", "sharpness")[1]
    assert cells_of(heads_command("list", grey)[1])["limit"][1:3] == ["a number", "300.0"]
    status, _, error = heads_command("list", "sharpnes")
    assert status == 2
    assert "Did you mean 'sharpness'?" in error


@pytest.mark.parametrize("name", list(CARDS))
def test_every_option_of_a_built_in_head_is_explained_as_in_the_documentation(name: str) -> None:
    known = json.loads(OPTIONS.read_text(encoding="utf-8"))
    sentence, options = about(name)
    assert sentence == known["heads"][name]["meaning"]
    said = {one.name: one.meaning for one in options}
    assert said == {row["name"]: row["meaning"] for row in known["heads"][name]["options"]}
