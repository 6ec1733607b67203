"""A checkpoint or a soup as a folder of diffusers LoRA weights, with a model card."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from moa_diffusion import build, checkpoint
from moa_diffusion.config import Config
from moa_diffusion.evaluation.adapters import WEIGHTS, Adapter, write_adapter
from moa_diffusion.evaluation.checkpoints import (
    Candidate,
    candidates,
    named_folders,
    run_settings,
    shared_settings,
)
from moa_diffusion.evaluation.command import check_libraries
from moa_diffusion.evaluation.grid import write_grid
from moa_diffusion.evaluation.intervals import LEVEL, markdown
from moa_diffusion.evaluation.soup import mix
from moa_diffusion.evaluation.summary import Summary, summarise
from moa_diffusion.evaluation.table import NAME, Table, read_table
from moa_diffusion.types import ConfigError

CARD = "README.md"
GRID = "grid.png"
SHOWN = 8  # prompts in the card's picture
LISTED = 20  # prompts in the card
STABILITY = (
    "Stable Diffusion 3 and 3.5 are under the Stability AI Community License, which holds for "
    "what is derived from them too."
)


def export(
    entries: Sequence[str],
    *,
    checkpoint: str = "latest",
    weights: str | None = None,
    ema: bool = True,
    output: Path,
    evaluation: Path | None = None,
) -> str:
    """Write ``pytorch_lora_weights.safetensors``, ``README.md`` and, if evaluated, ``grid.png``.

    Args:
        entries: run folders, ``[name=]folder``.
        checkpoint: of each run.
        weights: of a soup's members, comma-separated; None for a single run.
        ema: whether averaged weights are taken.
        output: a new folder; it appears when it is complete.
        evaluation: folder of ``scripts/evaluate.py`` with this model among others. By default that
            of the run, if it has the model; without one the card has no scores.

    Returns:
        what to print.

    Raises:
        ConfigError: for anything missing or damaged, or an output folder that is not new.
        ImportError: if scores are to be read and what reads them is not installed.
    """
    runs = named_folders("--run", entries)
    shares = _shares(weights, len(runs))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output: should be a new folder. Found files in `{output}`.")
    if "," in checkpoint or checkpoint == "base":
        raise ConfigError(f"--checkpoint: should be latest or step-N. Found {checkpoint!r}.")
    each = run_settings(runs, ())
    settings = shared_settings(each)
    _, *members = candidates(settings, runs, {}, chosen=checkpoint, ema=ema)
    adapters = [one.adapter for one in members if one.adapter is not None]
    adapter = mix(adapters, shares)
    table = _evaluated(adapter, evaluation, runs)
    _write(output, settings, each, members, shares, adapter, table, runs)
    scores = (
        ""
        if table is not None
        else (" The card has no scores: scripts/evaluate.py measures them, then export again.")
    )
    return f"Written: {output / WEIGHTS} (rank {adapter.rank}), {output / CARD}.{scores}"


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
    """The base model and this one in an evaluation; None if there is no evaluation of it."""
    usual = next(iter(runs.values())) / "evaluate"
    if folder is None and not (len(runs) == 1 and (usual / NAME).is_file()):
        return None
    check_libraries()
    table = read_table(folder or usual)
    found = [e for e, one in enumerate(table.models) if one.adapter_digest == adapter.digest]
    if not found:
        if folder is None:
            return None
        known = ", ".join(one.label for one in table.models)
        raise ConfigError(
            f"--evaluation: `{folder}` should have these weights among its models: {known}."
        )
    assert table.images is not None
    chosen = [0, found[0]]
    return dataclasses.replace(
        table,
        models=tuple(table.models[e] for e in chosen),
        images=tuple(table.images[e] for e in chosen),
        values=table.values[chosen],
    )


def _write(
    output: Path,
    settings: Config,
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
            shutil.copy(folder / ("ema" if single[0].ema else "") / WEIGHTS, partial / WEIGHTS)
        else:
            write_adapter(adapter, partial)
        if table is not None:
            write_grid(table, partial / GRID, shown=SHOWN)
        card = model_card(
            settings, each, members, shares, adapter, table, name=output.resolve().name
        )
        (partial / CARD).write_text(card, encoding="utf-8")


def model_card(
    settings: Config,
    each: Mapping[str, Config],
    members: Sequence[Candidate],
    shares: Sequence[float],
    adapter: Adapter,
    table: Table | None,
    *,
    name: str,
) -> str:
    """The card in Markdown, with the metadata that model hubs read in front.

    Args:
        settings: shared by all members.
        each: configuration of every run by name.
        members: the checkpoints, one per run.
        shares: weight of each.
        adapter: the LoRA.
        table: the base model and this one, if they were evaluated.
        name: of the model.
    """
    base = settings.policy.path
    head = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", "text-to-image", "stable-diffusion-3", "reinforcement-learning"],
    }
    if not Path(build.model_path(settings)).is_dir():
        head["base_model"] = base
    sampler, section = settings.sampling, settings.evaluation
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        f"LoRA weights (rank {adapter.rank}) for the base model `{Path(base).name}`, trained with "
        "moa-diffusion on several rewards at once.",
        "```python\nfrom diffusers import StableDiffusion3Pipeline\n\n"
        f'pipeline = StableDiffusion3Pipeline.from_pretrained("{_plain(base)}")\n'
        f'pipeline.load_lora_weights("{name}")\n'
        f"image = pipeline(\n    prompt, num_inference_steps={section.steps}, "
        f"guidance_scale={section.guidance:g},\n    height={sampler.resolution}, "
        f"width={sampler.resolution},\n    "
        f"max_sequence_length={settings.policy.max_sequence_length},\n).images[0]\n```",
        "## Training",
        _training(each, members, shares),
        "## Scores",
        *(_scores(table, summarise(table)) if table is not None else ["Not evaluated."]),
        "## Licence",
        "An adapter is made for one base model and is of use only with it: the licence of the base "
        "model holds for it, and for the pictures as far as it says so. The rewards above may be "
        "models with terms of their own on what is trained with them; look them up before you "
        "publish or sell." + (f" {STABILITY}" if "stable-diffusion-3" in base else ""),
    ]
    return "\n\n".join(parts) + "\n"


def _training(
    each: Mapping[str, Config], members: Sequence[Candidate], shares: Sequence[float]
) -> str:
    rows = [["run", "weight", "rollouts", "weights", "method", "rewards"]]
    for member, share in zip(members, shares, strict=True):
        settings = each[member.series]
        rewards = [
            f"{name} x {weight:g}" if (weight := float(options.get("weight", 1))) != 1 else name
            for name, options in settings.rewards.items()
        ]
        rows.append(
            [
                member.series,
                f"{share:g}",
                str(member.step),
                "averaged" if member.ema else "last",
                settings.objectives.method,
                ", ".join(rewards),
            ]
        )
    return markdown(rows)


def _scores(table: Table, found: Summary) -> list[str]:
    base, model = found.models
    rows = [["reward", "unit", "base model", "this model", "gain", "improved prompts"]]
    for name in table.rewards:
        one = model.rewards[name]
        rows.append(
            [
                name,
                table.units[name] or "-",
                base.rewards[name].mean.text(".4g"),
                one.mean.text(".4g"),
                one.gain.text("+.4g"),
                "-" if math.isnan(one.improved) else f"{one.improved:.0%}",
            ]
        )
    scorers = [["reward", "version", "scored by"]]
    for name, scorer in table.scorers.items():
        facts = ", ".join(f"{key} {value}" for key, value in scorer["provenance"].items())
        scorers.append([name, scorer["version"], facts or "no weights"])
    listed = [f"- {prompt}" for prompt in table.prompts[:LISTED]]
    if len(table.prompts) > LISTED:
        listed.append(f"- and {len(table.prompts) - LISTED} more")
    return [
        f"{len(table.prompts)} prompts x {len(table.seeds)} seeds, {table.sampler['steps']} "
        f"deterministic steps, guidance {table.sampler['guidance']:g}; in brackets {LEVEL:.0%} "
        "bootstrap intervals over prompts.",
        markdown(rows),
        f"![The same prompts and seed, base model and this one]({GRID})",
        markdown(scorers),
        "The prompts:",
        "\n".join(listed),
    ]


def _plain(base: str) -> str:
    """A base model as a reader can name it: not by a path on the machine it was trained on."""
    return "path/to/the/base/model" if base == "tiny" or Path(base).is_dir() else base
