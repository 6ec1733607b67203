"""Trackers: every name and value is one that they take, and whichever fails is named."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from accelerate.tracking import WandBTracker, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from moa_diffusion.processes import launcher
from moa_diffusion.storage.trackers import MAX_NAME, MAX_TEXT, Names, TrackerError, Trackers

EVERY = sorted(str(kind) for kind in LoggerType if str(kind) != "all")
OWN = [  # names of metrics with what users call their rewards
    "policy/kl",
    "correlation/a~b",
    "reward_mean/my reward",
    "reward_mean/my_reward",
    "reward_mean/My reward",
    "reward_mean/50%",
    "reward_mean/50#",
    "reward_mean/schärfe",
    "reward_mean/scharfe",
    "reward_mean/质量",
    "reward_mean/美学",
    "reward_mean/a/b",
    "reward_mean/a",
    "reward_mean/../x",
    "reward_mean//",
    "reward_mean/.",
    "reward_mean/a:b|c?*<>\"'",
    "reward_mean/" + 300 * "long",
    "reward_mean/" + 300 * "long" + "er",
    "reward_mean/\u200b",
    "reward_mean/",
]


def test_names_are_safe_and_stay_different():
    names = Names()
    fitted = [names(name) for name in OWN]
    assert len({name.casefold() for name in fitted}) == len(OWN), fitted
    safe = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-/")
    for name in fitted:
        assert set(name) <= safe, name
        assert len(name) <= MAX_NAME
        assert name.count("/") == 1
        assert all(name.split("/")), name
    assert fitted[:3] == ["policy/kl", "correlation/a-b", "reward_mean/my_reward"]
    assert [names(name) for name in OWN] == fitted


def test_keys_of_settings_keep_their_dots():
    names = Names()
    assert names.key("trainer.steps") == "trainer.steps"
    assert names.key("rewards.my reward.weight") == "rewards.my_reward.weight"
    assert names.key("..") == "_"


class Recorder:
    """In the place of one of accelerate's trackers."""

    def __init__(self, failing: str = "") -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.failing, self.finished = failing, False

    def log(self, values, step):
        if self.failing == "log":
            raise ConnectionError("server gone")
        self.rows.append((step, values))

    def finish(self):
        self.finished = True
        if self.failing == "finish":
            raise ConnectionError("server gone")


def recording(tmp_path: Path, **recorders: Recorder) -> Trackers:
    found = Trackers(tuple(recorders), tmp_path)
    found._started = {name: [recorder] for name, recorder in recorders.items()}
    return found


def test_numbers_that_are_not_finite_stay_out(tmp_path):
    one = Recorder()
    found = recording(tmp_path, one=one)
    found.log(3, {"a/b": math.nan, "a/c": math.inf, "a/d": -math.inf, "a/e~f": 1})
    assert one.rows == [(3, {"a/e-f": 1.0})]


def test_tensorboard_takes_an_image(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = Trackers(["tensorboard"], tmp_path)
    found.start({})
    pixels = torch.zeros(3, 4, 5)
    pixels[0] = 1.0
    found.log_image(7, "samples/heldout", pixels)
    found.finish()
    (place,) = {
        path.parent for path in tmp_path.rglob("events*") if b"heldout" in path.read_bytes()
    }
    events = EventAccumulator(str(place)).Reload()
    (event,) = events.Images("samples/heldout")
    assert (event.step, event.height, event.width) == (7, 4, 5)
    shown = numpy.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert (shown[..., :3] == [255, 0, 0]).all()


def test_wandb_takes_an_image(tmp_path, monkeypatch):
    """Through accelerate's tracker, with a package of the same name in wandb's place."""
    logged: list[tuple[dict, int]] = []
    run = SimpleNamespace(log=lambda values, step, **_: logged.append((values, step)))
    fake = SimpleNamespace(init=lambda **_: run, Image=lambda pixels: ("image", pixels))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = WandBTracker("project")
    tracker.start()
    found = Trackers(["wandb", "other"], tmp_path)
    found._started = {"wandb": [tracker], "other": [Recorder("log")]}
    found.log_image(7, "samples/heldout", torch.ones(3, 4, 5))
    (values, step), *more = logged
    assert (step, list(values), more) == (7, ["samples/heldout"], [])
    ((kind, pixels),) = values["samples/heldout"]
    assert kind == "image"
    assert (pixels.shape, pixels.dtype, pixels.min()) == ((4, 5, 3), numpy.uint8, 255)


@pytest.mark.parametrize("moment", ["log", "finish"])
def test_the_tracker_that_fails_is_named(tmp_path, moment):
    good = Recorder()
    found = recording(tmp_path, first=Recorder(moment), second=good)
    with pytest.raises(TrackerError, match=r"Tracker first .*ConnectionError: server gone"):
        found.log(1, {"a/b": 1.0}) if moment == "log" else found.finish()
    if moment == "finish":
        assert good.finished


def test_a_tracker_that_cannot_start_is_named(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, **_: object) -> None:
            self.trackers: list[object] = []

        def init_trackers(self, *_: object, **__: object) -> None:
            raise SystemExit("no API key")

    monkeypatch.setattr(launcher, "Accelerator", Broken)
    with pytest.raises(TrackerError, match="wandb could not be started: SystemExit: no API key"):
        Trackers(["wandb"], tmp_path).start({})


SETTINGS = {
    **{f"section.key_{i}": i for i in range(250)},
    "rewards.50%.weight": 1.0,
    "rewards.质量.path": "mine.py:quality",
    "a.none": "None",
    "a.empty": "",
    "a.flag": True,
    "a.text": "x" * 10 * MAX_TEXT,
}
OFFLINE = {
    "WANDB_MODE": "offline",
    "COMET_MODE": "offline",
    "COMET_START_MODE": "create",
    "COMET_START_ONLINE": "0",
    "COMET_API_KEY": "unused",
    "CLEARML_OFFLINE_MODE": "1",
    "SWANLAB_MODE": "offline",
    "SWANLAB_API_KEY": "unused",
    "AIM_UI_TELEMETRY_ENABLED": "0",
    "DVC_NO_ANALYTICS": "1",
    "TRACKIO_DIR": "trackio",
    "HF_HUB_OFFLINE": "1",
}
ONE = """
import json, sys
from pathlib import Path
from moa_diffusion.storage.trackers import Trackers
name, names, settings = json.loads(sys.argv[1])
found = Trackers([name], Path("trackers"))
found.start(settings)
for step in range(3):
    found.log(step, {metric: 0.5 + step for metric in names} | {"a/nan": float("nan")})
found.finish()
print("done", name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_tracker_takes_any_name(tmp_path: Path, name: str) -> None:
    """For those that are installed, in a process of its own: most leave threads behind."""
    if name not in [str(kind) for kind in get_available_trackers()]:
        pytest.skip(f"the package of the tracker {name} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", ONE, json.dumps([name, OWN, SETTINGS])],
        cwd=tmp_path,
        env=os.environ
        | OFFLINE
        | {"PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"done {name}" in done.stdout
