"""What processes have to share: facts, and the first one in which they differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moa_diffusion.assembly.agreement import check_same, facts
from moa_diffusion.config import from_dict
from moa_diffusion.distributed import LocalComm
from moa_diffusion.types import ConfigError

SETTINGS = from_dict({"rewards": {"jpeg_compressibility": {}}, "evaluation": {"every": 0}})


class Others(LocalComm):
    """Two more processes, of which the last has one fact changed."""

    def __init__(self, changed: dict[str, str]) -> None:
        self.changed = changed

    def gather_objects(self, items: Any) -> Any:
        (host, own), *_ = items
        return [[host, own], [host, own], ["other", {**own, **self.changed}]]


def test_equal_processes_pass():
    check_same(Others({}), facts(SETTINGS, None, {"prompts": ("a",)}))


@pytest.mark.parametrize("name", ["seed", "version of torch", "contents of prompts", "new"])
def test_the_first_difference_is_named_with_its_process(name):
    own = facts(SETTINGS, None, {"prompts": ("a",)})
    assert name in own or name == "new"
    with pytest.raises(
        ConfigError, match=rf"^{name}: should be the same .* other on process 2 \(other\)"
    ):
        check_same(Others({name: "other"}), own)


def test_contents_count_and_not_only_names(tmp_path: Path):
    file = tmp_path / "calibration.json"
    objectives = dataclasses.replace(SETTINGS.objectives, calibration=str(file))
    settings = dataclasses.replace(SETTINGS, objectives=objectives)
    file.write_text("1")
    one = facts(settings, None, {})
    file.write_text("2")
    two = facts(settings, None, {})
    assert {name for name in one if one[name] != two[name]} == {
        "contents of objectives.calibration"
    }
