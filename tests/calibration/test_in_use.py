"""A calibration file supplies what a method aims at; what the configuration says goes before."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from moa_diffusion import assembly
from moa_diffusion.config import Config
from moa_diffusion.storage.calibration_file import ObjectiveCalibration
from moa_diffusion.types import ConfigError

LEVELS = {"ocr": (0.5, 0.7), "sharpness": (2000.0, 2300.0), "colourfulness": (84.0, 84.0)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    objectives = {
        name: {field.name: 0.0 for field in fields(ObjectiveCalibration)}
        | {"mean": base, "base": base, "target": target, "bound": 0.5}
        for name, (base, target) in LEVELS.items()
    }
    values = {"version": 1, "model": "tiny", "prompts": 2, "images": 2, "seed": 0}
    names = list(LEVELS)
    correlations = {"names": names, "values": [[1.0] * 3] * 3}
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(values | {"objectives": objectives, "correlations": correlations}))
    return file


def settings(path: Path, method: str, **weighting: object) -> Config:
    found = Config(rewards={name: {} for name in LEVELS})
    found.objectives.method, found.objectives.calibration = method, str(path)
    found.objectives.weighting = weighting
    return found


def test_apex_starts_from_the_base_level_and_aims_at_the_target(path: Path) -> None:
    _, apex = assembly.objectives(settings(path, "apex", targets={"ocr": 0.9}))
    assert apex.given_base.tolist() == [0.5, 2000, 84]
    assert apex.given_target[:2].tolist() == [0.9, 2300]  # the configuration's goes before
    assert apex.given_target[2].isnan()  # without a spread there is nothing to aim at


def test_mopo_is_bounded_by_the_base_level(path: Path) -> None:
    _, mopo = assembly.objectives(
        settings(path, "mopo", units="reward", bounds={"sharpness": 2100.0})
    )
    assert mopo.bounds[1:].tolist() == [2100, 84]
    assert mopo.bounds[0].isnan()  # the primary
    _, mopo = assembly.objectives(settings(path, "mopo", primary="sharpness"))
    assert [mopo.bounds[0], mopo.bounds[2]] == [0.5, 0.5]
    _, mopo = assembly.objectives(settings(path, "mopo", bounds=0.4))
    assert mopo.bounds[1:].tolist() == [0.4, 0.4]


def test_a_file_without_an_objective_is_refused(path: Path) -> None:
    changed = settings(path, "apex")
    changed.rewards["jpeg_compressibility"] = {}
    with pytest.raises(ConfigError, match=r"objectives.calibration: .*'jpeg_compressibility'"):
        assembly.objectives(changed)
