"""The runs of a comparison: one configuration per method, a process per run, none done twice."""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moa_diffusion import assembly, config
from moa_diffusion.comparison.read import RunData, read_run, training_seconds
from moa_diffusion.config import Config
from moa_diffusion.data.seeds import read_seeds
from moa_diffusion.files.paths import expanded, split_list
from moa_diffusion.storage.log import read_metrics
from moa_diffusion.types import ConfigError
from rewards.suggestions import did_you_mean

SECTIONS = ("objectives", "gradients", "loss")  # what a method's YAML file decides


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """One training run."""

    method: str  # label
    seed: int
    folder: Path
    settings: Config

    @property
    def name(self) -> str:
        """The name of the run's folder, which tells it from all others."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """The file beside the folder that takes what the run's process prints."""
        return self.folder.with_name(f"{self.name}.log")

    def read(self) -> RunData:
        """Return what it left, once it has finished."""
        names = tuple(self.settings.rewards)
        return read_run(self.folder, method=self.method, seed=self.seed, names=names)

    def completed(self) -> int:
        """Return the number of finished rollouts."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().count(b"\n") if path.is_file() else 0
        return max(lines - 1, 0)  # the first is the evaluation of the start

    def evaluated(self) -> bool:
        """Return whether the evaluation of the start is written."""
        path = self.folder / "metrics.jsonl"
        return path.is_file() and path.stat().st_size > 0

    def finished(self) -> bool:
        """Return whether the last rollout is done and evaluated."""
        path, options = self.folder / "metrics.jsonl", self.settings.trainer
        rows = read_metrics(path) if path.is_file() else []
        if not rows or rows[-1]["step"] == 0:
            return False
        step = rows[-1]["step"]
        over = 0 < 60 * options.minutes <= training_seconds(rows)
        evaluated = (self.folder / "evaluation" / f"step-{step:06d}.jsonl").is_file()
        return evaluated and (over or step >= options.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonPlan:
    """All runs, and what a reader should know before they start."""

    runs: tuple[PlannedRun, ...]
    notes: tuple[str, ...]
    names: tuple[str, ...]  # the objectives' names


# ---------------------------------------------------------------------- planning


def plan_comparison(
    base: str,
    overrides: Sequence[str],
    *,
    methods: str | Sequence[str],
    seeds: str,
    output: Path,
    minutes: float | None = None,
    parallel: int = 1,
) -> ComparisonPlan:
    """Return the runs of a comparison, checked as far as it costs nothing; nothing is written.

    Args:
        base: YAML file of a training run.
        overrides: Dotted options of all runs (``["--trainer.steps", "20"]``).
        methods: Names of ``assembly.METHODS`` or YAML files; or these in one text, with commas.
        seeds: Seeds of each method's runs, as ``read_seeds`` has them; a number of them begins with
            the configuration's own.
        output: Folder of all runs.
        minutes: The minutes of training after which a run ends; None takes the configuration's.
        parallel: Runs at a time.

    Raises:
        ConfigError: For anything that cannot be compared, or that differs from what an earlier
            call began in ``output``.
    """
    methods = _methods(methods)
    labels = [Path(method).stem if _is_file(method) else method for method in methods]
    _check_call(labels, methods, overrides, minutes=minutes)
    if parallel < 1:
        raise ConfigError(f"--parallel: should be at least 1. Found {parallel}.")
    runs, notes = [], []
    names: tuple[str, ...] = ()
    for label, method in zip(labels, methods, strict=True):
        settings, remarks = method_settings(base, overrides, method)
        notes += [f"{label}: {sentence}" for sentence in remarks]
        if minutes is not None:
            limited = dataclasses.replace(settings.trainer, minutes=minutes)
            settings = dataclasses.replace(settings, trainer=limited)
        _check_settings(settings)
        names = tuple(settings.rewards)
        for seed in read_seeds(seeds, first=settings.seed):
            folder = output / f"{label}-{seed}"
            run = PlannedRun(
                method=label,
                seed=seed,
                folder=folder,
                settings=dataclasses.replace(
                    settings, seed=seed, output_dir=str(folder), resume=None
                ),
            )
            check_unchanged(run)
            runs.append(run)
    return ComparisonPlan(runs=tuple(runs), notes=tuple(notes), names=names)


def _methods(given: str | Sequence[str]) -> list[str]:
    """Return the names as they stand, with files' home folder expanded.

    The name of a file may have commas.
    """
    try:
        if isinstance(given, str):
            given = split_list(given, lambda part: _is_file(part) and expanded(part).is_file())
        return [str(expanded(part)) if _is_file(part) else part for part in given if part]
    except ValueError as error:
        raise ConfigError(f"--methods: {error}") from None


def method_settings(base: str, overrides: Sequence[str], method: str) -> tuple[Config, list[str]]:
    """Return the configuration of a method, and sentences about what it leaves out.

    Options that the base configuration gives to other classes than the method's are left out.

    Args:
        base: YAML file of the configuration that all methods share.
        overrides: Options of the command line, which win over both files.
        method: A method's name, or a YAML file with a method and its options.

    Raises:
        ConfigError: For an unknown method, or anything else that cannot be run.
    """
    notes: list[str] = []
    own: Mapping[str, Any] = {}
    if _is_file(method):
        own, notes = _read_method(Path(method))
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / Path(method).name
            part.write_text(yaml.safe_dump(dict(own)), encoding="utf-8")
            settings = config.load(base, ["--config", str(part), *overrides])
    else:
        settings = config.load(base, overrides)
        named = dataclasses.replace(settings.objectives, method=method)
        settings = dataclasses.replace(settings, objectives=named)
    chosen = assembly.method_of(settings)
    meant_for = assembly.METHODS.get(config.load(base, overrides).objectives.method)
    kept: dict[str, Any] = {}
    for part_name, kind in (("normalizer", chosen.normalizer), ("weighting", chosen.weighting)):
        given = getattr(settings.objectives, part_name)
        mine = (own.get("objectives") or {}).get(part_name) or {}
        known = set(inspect.signature(kind).parameters) - {"objectives", "weights"}
        known -= set(chosen.options) if part_name == "weighting" else set()
        if meant_for is None or getattr(meant_for, part_name) is not kind:
            known = set()  # an option of the same name may mean something else
        kept[part_name] = {key: given[key] for key in given if key in known or key in mine}
        notes += [
            f"objectives.{part_name}.{key} is left out, it is not meant for {kind.__name__}."
            for key in given
            if key not in kept[part_name]
        ]
    objectives = dataclasses.replace(settings.objectives, **kept)
    return dataclasses.replace(settings, objectives=objectives), notes


def _read_method(path: Path) -> tuple[Mapping[str, Any], list[str]]:
    """Return the sections of a method's file that count."""
    if not path.is_file():
        raise ConfigError(f"--methods: should name YAML files. Found no file `{path}`.")
    try:  # every key and value; what such a file may leave to the base configuration is given
        config.load(path, ["--rewards.any.weight", "1", "--evaluation.every", "0"])
    except ConfigError as error:
        raise ConfigError(f"--methods: `{path}`: {error}") from error
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    own = {key: value for key, value in values.items() if key in SECTIONS}
    if not own:
        raise ConfigError(
            f"--methods: `{path}` should have at least one of the sections {', '.join(SECTIONS)}. "
            f"Found {', '.join(values) or 'nothing'}."
        )
    others = [key for key in values if key not in SECTIONS]
    ignored = f"of `{path}` only {', '.join(own)} count, not {', '.join(others)}."
    return own, [ignored] if others else []


def _check_call(
    labels: Sequence[str],
    methods: Sequence[str],
    overrides: Sequence[str],
    *,
    minutes: float | None,
) -> None:
    if not labels:
        raise ConfigError("--methods: should name at least one method. Found none.")
    for label, method in zip(labels, methods, strict=True):
        if label not in assembly.METHODS and not _is_file(method):
            hint = did_you_mean(label, assembly.METHODS)
            raise ConfigError(
                f"--methods: unknown method {label!r}.{hint} Known: {', '.join(assembly.METHODS)}; "
                "or a YAML file."
            )
        if labels.count(label) > 1:
            raise ConfigError(f"--methods: should name a method once. Found {label!r} twice.")
    if minutes is not None and not 0 < minutes < float("inf"):
        raise ConfigError(f"--minutes-per-run: should be positive. Found {minutes:g}.")
    instead = {"output_dir": "--output", "resume": "nothing", "objectives.method": "--methods"}
    if minutes is not None:
        instead["trainer.minutes"] = "--minutes-per-run"
    for option in overrides:
        key = option.removeprefix("--").split("=")[0]
        if option.startswith("--") and key in instead:
            raise ConfigError(f"{key}: is set for each run by the comparison: use {instead[key]}.")


def _check_settings(settings: Config) -> None:
    """Check what every run needs, before the first begins."""
    options = settings.evaluation
    if not options.every:
        raise ConfigError(
            "evaluation.every: should be at least 1, or there is nothing to compare. Found 0."
        )
    if options.images_per_prompt < 2:
        raise ConfigError(
            "evaluation.images_per_prompt: should be at least 2: gains are in units of the base "
            f"model's spread within a prompt. Found {options.images_per_prompt}."
        )
    if len(settings.rewards) < 2:
        raise ConfigError(
            "rewards: should name at least two objectives, or there is nothing to weigh. "
            f"Found {', '.join(settings.rewards)}."
        )
    assembly.heldout_requests(settings)
    _, weighting = assembly.objectives(settings)
    assembly.is_fused(settings, weighting)
    assembly.solve_geometry(settings, 1)
    assembly.check_trackers(settings.log.trackers)


def check_unchanged(run: PlannedRun) -> None:
    """Compare with what an earlier call began."""
    saved = run.folder / "config.yaml"
    if not saved.is_file():
        files = [path for path in run.folder.rglob("*") if path.is_file()]
        if files or run.folder.is_file():
            raise ConfigError(
                f"--output: `{run.folder}` should be a run of this comparison. Found no "
                "config.yaml in it."
            )
        return
    before = config.from_dict(yaml.safe_load(saved.read_text(encoding="utf-8")))
    for key, (was, now) in assembly.changes(before, run.settings).items():
        raise ConfigError(
            f"{key}: should be {was}, as `{run.folder}` began. Found {now}. Another --output "
            "starts anew."
        )


def _is_file(method: str) -> bool:
    return method.endswith((".yaml", ".yml"))


# ---------------------------------------------------------------------- running
