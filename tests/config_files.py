"""Configurations in files, for tests of all that reads them."""

from __future__ import annotations

from pathlib import Path

import yaml

from moa_diffusion.config import Config, load

BASE = {"rewards": {"red": {"weight": 1.0}}, "prompts": {"heldout": "tiny"}}


def written(folder: Path, values: dict | str) -> str:
    path = folder / "run.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return str(path)


def nested(key: str, value: object) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def loaded(folder: Path, values: dict | str, *overrides: str) -> Config:
    return load(written(folder, values), list(overrides))


OPEN = {
    "rewards": {"ocr": {"weight": 1.0, "workers": 3}, "red": {"weight": 0.5, "path": "m:f"}},
    "objectives": {"method": "dual_stage", "normalizer": {"floor": 0.2, "decay": 0.5}},
    "evaluation": {"every": 0},
}


MIXED = {
    "train": ["a.txt", {"path": "b.csv", "weight": 2, "column": "null"}, "tiny"],
    "heldout": ["c.txt", {"path": "d.csv", "column": "off"}],
}


def mixed(**prompts: object) -> dict:
    return BASE | {"prompts": MIXED | prompts}
