"""Places in a configuration: home folders, and a run that is no longer where it was written.

Where files are counts more than what stands in them: a run's folder may be moved or copied as a
whole, and its own ``config.yaml`` still names the place where it began.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moa_diffusion.config.schema import Config
from moa_diffusion.files.paths import expanded
from moa_diffusion.types import ConfigError

logger = logging.getLogger(__name__)

NAME = "config.yaml"  # the configuration's file in a run's folder
TRACES = ("metrics.jsonl", "checkpoints")  # what a run leaves beside it
# Keys of files and folders; the values of reward heads' options are looked at one by one.
_KEYS = (
    "output_dir",
    "resume",
    "policy.path",
    "policy.adapter",
    "policy.embeds_dir",
    "objectives.calibration",
    "preferences.data",
)


def traces(folder: Path) -> list[str]:
    """Return what a run left in a folder."""
    return [name for name in TRACES if (folder / name).exists()]


def expand_homes(config: Config) -> None:
    """Replace a leading ``~`` in every file and folder, in place.

    Raises:
        ConfigError: Naming the key, if there is no such user.
    """
    for key in _KEYS:
        *sections, name = key.split(".")
        record = vars(config)
        for section in sections:
            record = vars(record[section])
        record[name] = _expanded(key, record[name])
    prompts = vars(config.prompts)
    for name in ("train", "heldout"):
        key, files = f"prompts.{name}", prompts[name]
        if isinstance(files, str):
            prompts[name] = _expanded(key, files)
        for number, file in enumerate(files if isinstance(files, list) else ()):
            file.path = _expanded(f"{key}[{number}]", file.path)
    _expand_values("preferences.pairs", config.preferences.pairs)
    for section, rewards in (
        ("rewards", config.rewards),
        ("evaluation.rewards", config.evaluation.rewards),
    ):
        for name, options in rewards.items():
            _expand_values(f"{section}.{name}", options)


def _expand_values(key: str, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, str) and value.startswith("~/"):  # another ~ may be part of a text
            values[name] = _expanded(f"{key}.{name}", value)


def _expanded(key: str, value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    try:
        return str(expanded(value))
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def follow_run(config: Config, source: Path | None, *, explicit: bool) -> None:
    """Set ``output_dir`` to where a run's files are, if they were moved or copied.

    That is so if the ``config.yaml`` in a run's folder says where the run goes, and if the
    checkpoint to continue from lies in the folder of a run that began at ``output_dir``.

    Args:
        config: Changed in place.
        source: The file that ``output_dir`` stands in; None if it is the default.
        explicit: Whether an option of the command line says where the run goes; then that counts.
    """
    if explicit:
        return
    run = None
    if source is not None and source.name == NAME and traces(source.parent):
        run = source.parent
    elif config.resume not in (None, "latest"):
        run = _moved(Path(str(config.resume)).absolute().parent.parent, config.output_dir)
    if run is not None and run.resolve() != Path(config.output_dir).resolve():
        logger.info(
            "output_dir is `%s`, where the run's files are; it began in `%s`. --output_dir names "
            "another folder for a new run.",
            *(run, config.output_dir),
        )
        config.output_dir = str(run)


def _moved(run: Path, output_dir: str) -> Path | None:
    """Return the folder of a run, if it began at ``output_dir``."""
    written = run / NAME
    if not written.is_file() or not traces(run):
        return None
    try:
        values = yaml.safe_load(written.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"resume: `{written}` should be YAML: {error}") from error
    began = values.get("output_dir") if isinstance(values, Mapping) else None
    same = isinstance(began, str) and Path(began).resolve() == Path(output_dir).resolve()
    return run if same else None
