"""Cards: every built-in head has one, and the list shows them."""

from __future__ import annotations

import pytest
from heads_command import HeadsCommand

from rewards import available, register, registry
from rewards.commands import cli
from rewards.commands.head_cards import CARDS


def test_every_built_in_head_has_a_card_and_the_reverse() -> None:
    assert set(CARDS) == set(registry._BUILT_IN)


def test_list_shows_all_heads(heads_command: HeadsCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    available()  # imports the built-in heads, which register themselves for good
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    register("my_own_head", unit="[kg]")(lambda images, prompts: [0.0] * len(prompts))
    status, printed, _ = heads_command("list")
    assert status == 0
    lines = [line.split("│") for line in printed.splitlines()]
    rows = {cells[1].strip(): cells for cells in lines if len(cells) > 8}
    assert set(CARDS) <= set(rows)
    assert [cell.strip() for cell in rows["my_own_head"][2:9]] == ["[kg]", *["-"] * 6]
    assert "quoted text" in rows["ocr"][4]
    header = next(line.split("┃") for line in printed.splitlines() if "licence" in line)
    assert header[8].strip() == "packages"  # not "installed": weights are not looked for
    assert rows["sharpness"][8].strip() == "none needed"


def test_list_names_the_packages_that_are_missing(heads_command: HeadsCommand, monkeypatch) -> None:
    found = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == "rapidocr" else found(name)
    )
    assert "missing: rapidocr" in heads_command("list")[1]
