"""Calibration: draw samples as training will at first, score them twice, and say what follows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moa_diffusion import assembly
from moa_diffusion.calibration.describe import calibrate
from moa_diffusion.config import Config
from moa_diffusion.data.sampling import GroupSampler
from moa_diffusion.data.seeds import derive_seed
from moa_diffusion.distributed import LocalComm
from moa_diffusion.policies.base import Policy
from moa_diffusion.processes.launcher import make_accelerator
from moa_diffusion.processes.randomness import seed_globally
from moa_diffusion.scoring import Scorer
from moa_diffusion.storage.calibration_file import HIJACK, Calibration
from moa_diffusion.storage.log import REWARDS, RunLog
from moa_diffusion.types import ConfigError, Request, RewardMatrix, Rollout, concatenate
from rewards.progress_bar import progress_bar

NOISY = 0.5  # noise of a score, in spreads within prompts, that is worth a sentence
# The table's blocks of rows: a label, and the field.
_BLOCKS: tuple[dict[str, str], ...] = (
    {
        "mean": "mean",
        "std, total": "std_total",
        "std within prompts": "std_within",
        "std between prompts": "std_between",
        "minimum": "min",
        "maximum": "max",
        "noise of a score, std": "retest_std",
        "proposed target": "target",
    },
    {
        "prompts it applies to": "applies",
        "groups without spread": "zero_variance",
        "samples at the minimum": "at_min",
        "samples at the maximum": "at_max",
    },
    {
        "share, raw weighted sum": "share_static",
        "share, gdpo": "share_gdpo",
        "share, dual_stage": "share_dual_stage",
    },
    {"ms per image": "milliseconds"},
)
_PERCENT = (*_BLOCKS[1].values(), *_BLOCKS[2].values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The scores of N samples drawn before training, and what a reader needs to understand them."""

    rewards: RewardMatrix  # [K, N]
    retest: Tensor  # [K, N] float64, the same samples scored once more
    milliseconds: tuple[float, ...]  # K, to score one sample
    units: Mapping[str, str]  # by objective
    requires: Mapping[str, tuple[str, ...]]  # by objective: what a prompt must have

    def calibration(self, settings: Config) -> Calibration:
        """Return the statistics, with the weights of this configuration."""
        options, policy = settings.rewards.values(), settings.policy
        path = policy.path if policy.name == "sd3" else policy.name
        return calibrate(
            self.rewards,
            retest=self.retest,
            weights=[float(option.get("weight", 1.0)) for option in options],
            milliseconds=self.milliseconds,
            model=path if policy.adapter is None else f"{path} with {policy.adapter}",
            seed=settings.seed,
        )


def measure(settings: Config, *, prompts: int, images: int, folder: Path) -> Measurement:
    """Draw and score; each group's scores are in ``folder/scores.jsonl`` as soon as it is done.

    What training starts from draws, with the rollout's sampler, noise and shared starts. Each
    group is a rollout of its own: it gets its own window of trained steps.

    Args:
        settings: The configuration of a training run.
        prompts: Number P of its training prompts, in the order of its seed; all if there are fewer.
        images: Number G of samples per prompt.
        folder: The folder for the scores.

    Raises:
        ConfigError: Before any model is loaded, for what cannot be measured.
        RewardError: If a head fails; what was scored before is in the file.
    """
    requests = draws(settings, prompts=prompts, images=images)
    if len(requests) < prompts:
        print(f"There are {len(requests)} training prompts, fewer than {prompts}: all are used.")
    scorer = Scorer(
        assembly.heads(settings), LocalComm(), overlap=False
    )  # heads are timed one by one
    scores = folder / "scores.jsonl"
    try:
        model = assembly.policy(settings, make_accelerator().device)
        model.prepare([group[0].prompt for group in requests])
        # For heads that use the global generators; nothing here does.
        seed_globally(derive_seed(settings.seed, "calibration") % 2**32)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REWARDS).unlink(missing_ok=True)  # An earlier calibration may have left one.
        RunLog(folder).write_heads(0, scorer.load([r[0].prompt for r in requests]))
        first: list[Tensor] = []  # [K, G] each
        second: list[Tensor] = []
        seconds = torch.zeros(len(scorer.names), dtype=torch.float64)
        with scores.open("w", encoding="utf-8") as file:
            for group in progress_bar(requests, title="calibrate", unit="prompt"):
                rollout = _sample(model, group, settings.trainer.sample_batch)
                for values in (first, second):
                    values.append(scorer.score(group, images=rollout.images, texts=rollout.texts))
                # The last scoring counts, which is the second and has no start-up in it.
                seconds += seconds.new_tensor([scorer.seconds[name] for name in scorer.names])
                _write(file, group, scorer.names, first[-1], second[-1])
    finally:
        scorer.close()
    flat = [request for group in requests for request in group]
    return Measurement(
        rewards=RewardMatrix(
            names=scorer.names,
            values=torch.cat(first, dim=1),
            groups=torch.tensor([request.group for request in flat]),
            prompts=tuple(request.prompt for request in flat),
        ),
        retest=torch.cat(second, dim=1),
        milliseconds=tuple((1000 * seconds / len(flat)).tolist()),
        units={name: head.unit for name, head in scorer.heads.items()},
        requires={name: head.requires for name, head in scorer.heads.items()},
    )


def draws(settings: Config, *, prompts: int, images: int) -> list[tuple[Request, ...]]:
    """Draw P groups of G requests, each for another training prompt.

    Args:
        settings: The configuration, whose training prompts and seed are used.
        prompts: Number P of groups, at least 1.
        images: Number G of samples in a group, at least 2.

    Raises:
        ConfigError: For a bad number or prompt file.
    """
    if prompts < 1:
        raise ConfigError(f"--prompts: should be at least 1. Found {prompts}.")
    if images < 2:
        raise ConfigError(
            "--images: should be at least 2, or there is no spread within a prompt. "
            f"Found {images}."
        )
    known = assembly.train_prompts(settings)
    sampler = GroupSampler(
        known,
        groups=1,
        group_size=images,
        seed=settings.seed,
        shared_start=settings.sampling.shared_start,
    )
    return [sampler.requests(step) for step in range(min(prompts, len(known.prompts)))]


def _sample(model: Policy, group: Sequence[Request], batch: int) -> Rollout:
    step = group[0].group
    starts = range(0, len(group), batch)
    return concatenate([model.sample(group[i : i + batch], step=step) for i in starts])


def _write(
    file: Any, group: Sequence[Request], names: Sequence[str], first: Tensor, second: Tensor
) -> None:
    """Write one line per sample; ``first`` and ``second`` are ``[K, G]``."""
    for request, one, two in zip(group, first.T.tolist(), second.T.tolist(), strict=True):
        row: dict[str, Any] = {
            "group": request.group,
            "sibling": request.sibling,
            "prompt": request.prompt,
            "seed": request.seed,
        }
        for name, value, again in zip(names, one, two, strict=True):
            row[f"reward/{name}"] = None if math.isnan(value) else value
            row[f"retest/{name}"] = None if math.isnan(again) else again
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


def report(calibration: Calibration, measured: Measurement) -> None:
    """Print a table with one column per objective, their correlations, and what follows."""
    console = Console(highlight=False)
    widths = (max(len(name), 20) + 3 for name in calibration.objectives)
    console.width = max(console.width, 30 + sum(widths))  # less would cut names
    table = Table(
        title=f"{calibration.model}: {calibration.prompts} prompts x {calibration.images} images",
        caption="share: of the variance of the weighted sum, which decides the gradient; below 0 "
        "or above 100% where a reward opposes the sum",
    )
    between = Table(title="Correlation within prompts")
    for headed in (table, between):
        headed.add_column("", no_wrap=True)
    for name in calibration.objectives:
        unit = measured.units[name]
        table.add_column(f"{name}\n{unit}".rstrip(), justify="right", min_width=len(name))
        between.add_column(name, justify="right")
    for block in _BLOCKS:
        for label, field in block.items():
            cells = [getattr(objective, field) for objective in calibration.objectives.values()]
            table.add_row(label, *(_cell(value, percent=field in _PERCENT) for value in cells))
        table.add_section()
    for name, row in zip(calibration.objectives, calibration.correlations, strict=True):
        between.add_row(name, *("-" if math.isnan(value) else f"{value:+.2f}" for value in row))
    for part in (table, between):
        console.print(part)
    for sentence in findings(calibration, measured.requires):
        print(sentence)


def findings(calibration: Calibration, requires: Mapping[str, Sequence[str]]) -> list[str]:
    """Return what a reader should know first, in sentences.

    Args:
        calibration: What was measured of the K objectives.
        requires: What each objective needs of a prompt.
    """
    sentences = []
    for name, one in calibration.objectives.items():
        if not one.applies:
            needed = " and ".join(requires.get(name, ()))
            sentences.append(
                f"{name} applies to none of the {calibration.prompts} prompts"
                f"{f' (it needs: {needed})' if needed else ''}: nothing is known of it."
            )
        elif not one.std_within > 0:
            sentences.append(
                f"{name} does not vary within any prompt: training would get no signal from it."
            )
        elif one.target > one.max:
            sentences.append(
                f"{name} is near its top: the proposed target {one.target:.4g} lies above the "
                f"highest score seen, {one.max:.4g}."
            )
        if one.retest_std > NOISY * one.std_within:
            sentences.append(
                f"{name} is noisy: the noise of one score is {one.retest_std:.2g} (std), the "
                f"spread within prompts {one.std_within:.2g}."
            )
    objectives = calibration.objectives
    if len([one for one in objectives.values() if one.applies]) < 2:
        return [*sentences, "Fewer than two objectives apply: nobody can hijack the sum."]
    first = max(objectives, key=lambda name: objectives[name].share_static)
    share = f"{objectives[first].share_static:.0%} of the variance of"
    hijacker = calibration.hijacker()
    if hijacker is not None:
        return [*sentences, f"{hijacker} will hijack: it has {share} a plain weighted sum."]
    return [
        *sentences,
        f"Nobody will hijack a plain weighted sum: the largest share is {first}'s, {share} it "
        f"(more than {HIJACK:.0%} would be hijacking).",
    ]


def _cell(value: float, *, percent: bool) -> str:
    if math.isnan(value):
        return "-"
    return f"{round(100 * value, 1) + 0.0:.1f}%" if percent else f"{value:.4g}"  # + 0.0: no "-0.0"
