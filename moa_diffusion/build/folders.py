"""The folder of a run: what may be in it, and what is written there first."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from moa_diffusion import checkpoint, config
from moa_diffusion.config import Config
from moa_diffusion.metrics import RunLog
from moa_diffusion.types import ConfigError

logger = logging.getLogger(__name__)


def write_config(settings: Config) -> None:
    """Write ``config.yaml`` with all defaults; without ``resume``, so that it starts a run."""
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "config.yaml.tmp"
    partial.write_text(config.to_yaml(dataclasses.replace(settings, resume=None)), encoding="utf-8")
    partial.replace(folder / "config.yaml")


def run_folder(settings: Config) -> Path | None:
    """The checkpoint to resume from, or None for a new run in a folder without another run.

    Raises:
        ConfigError: if the folder holds another run, or there is no such checkpoint.
    """
    folder = Path(settings.output_dir)
    check_folder("output_dir", folder)
    found = None if settings.resume is None else checkpoint.find(settings.resume, folder)
    if found is not None and found.resolve().parent.parent == folder.resolve():
        _report_changes(folder / "config.yaml", settings)
        return found
    # A config.yaml alone is what a run leaves that ended before its first result.
    traces = [name for name in ("metrics.jsonl", "checkpoints") if (folder / name).exists()]
    if traces:
        raise ConfigError(
            f"output_dir: should be a new folder. Found another run in `{folder}` "
            f"({', '.join(traces)}). Use another --output_dir, or continue with --resume latest."
        )
    return found


def check_folder(key: str, folder: Path) -> None:
    """It need not exist, but has to be possible."""
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise ConfigError(f"{key}: should be a folder. Found the file `{part}`.")
    nearest = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: should be writable. Found `{nearest}`, which is not.")


def _report_changes(saved: Path, settings: Config) -> None:
    """Say which settings differ from those that the run began with."""
    if not saved.is_file():
        return
    before = flat(config.from_dict(yaml.safe_load(saved.read_text(encoding="utf-8"))))
    now = flat(settings)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key not in ("resume", "output_dir"):
            logger.warning(
                "Resuming with another %s: %s, was %s.", key, now.get(key), before.get(key)
            )


def flat(settings: Config) -> dict[str, str | int | float | bool]:
    """Dotted keys to plain values, for trackers."""
    rows: dict[str, str | int | float | bool] = {}

    def walk(values: Mapping[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            else:
                plain = isinstance(value, (str, int, float, bool))
                rows[f"{prefix}{name}"] = value if plain else str(value)

    walk(dataclasses.asdict(settings), "")
    return rows


def run_log(settings: Config, accelerator: Accelerator) -> RunLog:
    """Where metrics and scores go."""
    return RunLog(
        Path(settings.output_dir),
        accelerator=accelerator if settings.log.trackers else None,
        main=accelerator.is_main_process,
        scores=settings.log.scores,
    )
