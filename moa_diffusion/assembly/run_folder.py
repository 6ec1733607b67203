"""The folder of a run: what may be in it, and what is written there first."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

import yaml
from accelerate import Accelerator

from moa_diffusion import config
from moa_diffusion.assembly.defaults import changes
from moa_diffusion.config import Config
from moa_diffusion.files import writing as storage
from moa_diffusion.files.writing import write_text
from moa_diffusion.storage import checkpoint
from moa_diffusion.storage.front import NAME as FRONT
from moa_diffusion.storage.log import ALARMS, METRICS, REWARDS, RunLog, read_metrics
from moa_diffusion.storage.trackers import Trackers
from moa_diffusion.types import ConfigError

logger = logging.getLogger(__name__)


def write_config(settings: Config) -> None:
    """Write ``config.yaml`` with all defaults; without ``resume``, so that it starts a run."""
    text = config.to_yaml(dataclasses.replace(settings, resume=None))
    write_text(Path(settings.output_dir) / "config.yaml", text)


def run_folder(settings: Config) -> Path | None:
    """Return the checkpoint to resume from, or None for a new run in a folder without another run.

    A run that ended before it had learned something is no run: the same command begins anew. So
    does ``--resume latest`` with one that has lost what it learned, for want of a checkpoint.

    Raises:
        ConfigError: If the folder holds another run, or there is no such checkpoint.
    """
    folder = Path(settings.output_dir)
    check_folder("output_dir", folder)
    saved = checkpoint.list_checkpoints(folder)
    lost = _rounds(folder)
    if settings.resume == "latest" and not saved and (folder / "config.yaml").is_file():
        logger.warning(
            "resume: `%s` has no checkpoint%s: the run begins anew.",
            folder,
            f" of the {lost} rounds it went" if lost else "",
        )
        return None
    resumed = None if settings.resume is None else checkpoint.find(settings.resume, folder)
    if resumed is not None and resumed.resolve().parent.parent == folder.resolve():
        _report_changes(folder / "config.yaml", settings)
        return resumed
    if lost or any(checkpoint.step_of(path) for path in saved):
        way = "continue with --resume latest"
        if not saved:
            way = "begin anew with --resume latest: it has no checkpoint"
        raise ConfigError(
            f"output_dir: should be a new folder. Found another run in `{folder}` ({lost} rounds). "
            f"Use another --output_dir, or {way}."
        )
    if resumed is not None:
        logger.warning("A new run in `%s` goes on from `%s`.", folder, resumed)
    return resumed


def start_over(folder: Path) -> None:
    """Take away what a run that has learned nothing left in its folder, and nothing else."""
    if not (folder / "config.yaml").is_file():
        return
    numbered = [f"{kind}/step-*" for kind in ("checkpoints", "scores", "evaluation", "samples")]
    for pattern in (*numbered, METRICS, ALARMS, REWARDS, FRONT):
        for path in folder.glob(pattern):
            storage.remove(path)


def _rounds(folder: Path) -> int:
    """Return the rounds of the run in a folder; 0 for none."""
    return max((row["step"] for row in read_metrics(folder / METRICS)), default=0)


def check_folder(key: str, folder: Path) -> None:
    """Check that a folder can be written: it need not exist, but has to be possible."""
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise ConfigError(f"{key}: should be a folder. Found the file `{part}`.")
    nearest = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: should be writable. Found `{nearest}`, which is not.")


def _report_changes(saved: Path, settings: Config) -> None:
    """Say which settings differ from those that the run began with."""
    if saved.is_file():
        before = config.from_dict(yaml.safe_load(saved.read_text(encoding="utf-8")))
        for key, (was, now) in changes(before, settings).items():
            logger.warning("Resuming with another %s: %s, was %s.", key, now, was)


def run_log(settings: Config, accelerator: Accelerator) -> RunLog:
    """Return where metrics and scores go."""
    folder = Path(settings.output_dir)
    tracked = accelerator.is_main_process and settings.log.trackers
    return RunLog(
        folder,
        trackers=Trackers(settings.log.trackers, folder / "trackers") if tracked else None,
        main=accelerator.is_main_process,
        scores=settings.log.scores,
    )
