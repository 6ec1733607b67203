"""A checkpoint or a soup as a folder of LoRA weights, with a model card."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moa_diffusion.adapters.soup import mix
from moa_diffusion.config import Config
from moa_diffusion.config.places import NAME as CONFIG
from moa_diffusion.evaluation.candidates import (
    Candidate,
    candidates,
    named_folders,
    run_settings,
    shared_settings,
)
from moa_diffusion.evaluation.medium import Medium, medium_of
from moa_diffusion.export.card import model_card
from moa_diffusion.policies.adapters import Adapter
from moa_diffusion.report.grid import shown_prompts
from moa_diffusion.report.libraries import TABLES_AND_PLOTS, check_libraries
from moa_diffusion.report.shown import write_shown
from moa_diffusion.report.table import NAME, Table, read_table
from moa_diffusion.storage import checkpoint
from moa_diffusion.types import ConfigError

CARD = "README.md"
GALLERY = "images"
SHOWN = 8  # prompts beside the card


def export(
    entries: Sequence[str],
    *,
    checkpoint: str = "latest",
    weights: str | None = None,
    ema: bool = True,
    output: Path,
    evaluation: Path | None = None,
) -> str:
    """Write the weights, ``README.md``, ``config.yaml`` and, if evaluated, samples.

    The samples are of the model and its base beside each other, and a gallery of the model's.

    The weights are what diffusers loads, or, of a language model, what peft does.

    Args:
        entries: Run folders, ``[name=]folder``.
        checkpoint: The checkpoint of each run.
        weights: The weights of a soup's members, comma-separated; None for a single run.
        ema: Whether averaged weights are taken.
        output: A new folder; it appears when it is complete.
        evaluation: Folder of ``scripts/evaluate.py`` with this model among others. By default that
            of the run, if it has the model; without one the card has no scores.

    Returns:
        What to print.

    Raises:
        ConfigError: For anything missing or damaged, or an output folder that is not new.
        ImportError: If scores are to be read and what reads them is not installed.
    """
    runs = named_folders("--run", entries)
    shares = _shares(weights, len(runs))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output: should be a new folder. Found files in `{output}`.")
    if "," in checkpoint or checkpoint == "base":
        raise ConfigError(f"--checkpoint: should be latest or step-N. Found {checkpoint!r}.")
    each = run_settings(runs, ())
    kind = medium_of(next(iter(each.values())))
    settings = shared_settings(each, kind)
    medium = kind(settings)
    medium.check(())
    _, *members = candidates(medium, runs, {}, chosen=checkpoint, ema=ema)
    adapters = [one.adapter for one in members if one.adapter is not None]
    adapter = mix(adapters, shares)
    table = _evaluated(adapter, evaluation, runs)
    _write(output, settings, medium, each, members, shares, adapter, table, runs)
    scores = (
        ""
        if table is not None
        else (" The card has no scores: the command evaluate measures them, then export again.")
    )
    return f"Written: {output / medium.weights} (rank {adapter.rank}), {output / CARD}.{scores}"


def _shares(weights: str | None, runs: int) -> tuple[float, ...]:
    if weights is None:
        if runs > 1:
            raise ConfigError(f"--weights: should be given for {runs} runs. Found none.")
        return (1.0,)
    try:
        shares = tuple(float(word) for word in weights.split(","))
    except ValueError:
        shares = ()
    if len(shares) != runs or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ConfigError(
            f"--weights: should be {runs} number{'s' if runs > 1 else ''} that sum to 1. "
            f"Found {weights!r}."
        )
    return shares


def _evaluated(adapter: Adapter, folder: Path | None, runs: Mapping[str, Path]) -> Table | None:
    """Return the base model and this one in an evaluation; None if there is no evaluation of it."""
    usual = next(iter(runs.values())) / "evaluate"
    if folder is None and not (len(runs) == 1 and (usual / NAME).is_file()):
        return None
    check_libraries(TABLES_AND_PLOTS)
    table = read_table(folder or usual)
    matching = [e for e, one in enumerate(table.models) if one.adapter_digest == adapter.digest]
    if not matching:
        if folder is None:
            return None
        known = ", ".join(one.label for one in table.models)
        raise ConfigError(
            f"--evaluation: `{folder}` should have these weights among its models: {known}."
        )
    chosen = [0, matching[0]]
    return dataclasses.replace(
        table,
        models=tuple(table.models[e] for e in chosen),
        images=None if table.images is None else tuple(table.images[e] for e in chosen),
        texts=None if table.texts is None else tuple(table.texts[e] for e in chosen),
        values=table.values[chosen],
    )


def _write(
    output: Path,
    settings: Config,
    medium: Medium,
    each: Mapping[str, Config],
    members: Sequence[Candidate],
    shares: Sequence[float],
    adapter: Adapter,
    table: Table | None,
    runs: Mapping[str, Path],
) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.atomic_folder(output) as partial:
        single = [one for one, share in zip(members, shares, strict=True) if share == 1]
        if single and single[0].step is not None:
            folder = checkpoint.step_folder(runs[single[0].series], single[0].step)
            medium.copy_adapter(folder / ("ema" if single[0].ema else ""), partial)
        else:
            medium.write_adapter(adapter, partial)
        for name, run in runs.items():
            public = _public(yaml.safe_load((run / CONFIG).read_text(encoding="utf-8")))
            file = CONFIG if len(runs) == 1 else f"config-{name}.yaml"
            (partial / file).write_text(yaml.safe_dump(public, sort_keys=False), encoding="utf-8")
        shown = None if table is None else write_shown(table, partial, shown=SHOWN)
        card = model_card(
            settings,
            each,
            members,
            shares,
            adapter,
            table,
            noun=medium.noun,
            name=output.resolve().name,
            shown=shown,
            gallery={} if table is None else _gallery(table, partial),
        )
        (partial / CARD).write_text(card, encoding="utf-8")


def _public(value: Any) -> Any:
    """Return options of which files and folders of this machine are named by their last part."""
    if isinstance(value, dict):
        return {name: _public(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return Path(value).name
    return value


def _gallery(table: Table, folder: Path) -> dict[str, str]:
    """Copy an image of the model for some prompts; return their files by prompt."""
    if table.images is None:
        return {}
    (folder / GALLERY).mkdir()
    files = {}
    for p in shown_prompts(len(table.prompts), SHOWN):
        files[table.prompts[p]] = f"{GALLERY}/{p}.png"
        shutil.copyfile(table.images[1][p][0], folder / GALLERY / f"{p}.png")
    return files
