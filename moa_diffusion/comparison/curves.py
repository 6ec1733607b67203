"""One plot of several runs: reward curves above, the same prompts drawn before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from moa_diffusion import assembly, config
from moa_diffusion.config import Config
from moa_diffusion.distributed import LocalComm
from moa_diffusion.policies.samplers import generators
from moa_diffusion.policies.sd3 import load_pipeline
from moa_diffusion.report.grid import shown_prompts
from moa_diffusion.report.palette import marks
from moa_diffusion.scoring import Scorer
from moa_diffusion.statistics.groups import mean_and_error, same_prompt
from moa_diffusion.storage import checkpoint
from moa_diffusion.storage.log import read_metrics
from moa_diffusion.types import Request


def plot_curves(runs: Mapping[str, Path], target: Path, *, shown: int = 9) -> None:
    """Write a PNG that compares runs of one configuration family.

    The images are drawn by a plain diffusers pipeline that loads each run's last checkpoint, for
    held-out prompts at even distances and the evaluation's own seeds: nothing is picked by hand.

    Args:
        runs: Run folders by label; all must have the same rewards and held-out prompts.
        target: The PNG file that is written.
        shown: Held-out prompts shown.

    Raises:
        ConfigError: If a run has no checkpoint.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = {label: config.load(folder / "config.yaml") for label, folder in runs.items()}
    first = next(iter(settings.values()))
    names = list(first.rewards)
    requests = [one for one in assembly.heldout_requests(first) if one.sibling == 0]
    requests = [requests[i] for i in shown_prompts(len(requests), shown)]
    shown = len(requests)
    rows = draw_and_score(runs, first, requests)

    lower = (1.6 + 0.13 * len(names)) * len(rows)
    figure = pyplot.figure(figsize=(1.5 * shown, 3.6 + lower), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[3.6, lower])
    _curves(parts[0], runs, names)
    _images(parts[1], rows, requests, names)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def draw_and_score(
    runs: Mapping[str, Path], settings: Config, requests: Sequence[Request]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Draw images ``[m, 3, H, W]`` of the base model and each run, and score them: ``[K, m]``.

    Args:
        runs: The folders of runs by label; the averaged weights of the latest checkpoint draw.
        settings: The configuration that the base model, the heads and the deployment settings are
            of.
        requests: The m samples that each model draws.
    """
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns that the text encoders have no adapter
    logging.disable_progress_bar()
    scorer = Scorer(assembly.heads(settings), LocalComm())
    folders = {label: checkpoint.find("latest", folder) / "ema" for label, folder in runs.items()}
    rows = {}
    for label, folder in {"base model": None, **folders}.items():
        pipeline = load_pipeline(assembly.model_path(settings), dtype=settings.policy.dtype)
        if folder is not None:
            pipeline.load_lora_weights(folder)
        with torch.no_grad():
            images = pipeline(
                [request.prompt for request in requests],
                num_inference_steps=settings.evaluation.steps,
                guidance_scale=settings.evaluation.guidance,
                height=settings.deployed_resolution,
                width=settings.deployed_resolution,
                max_sequence_length=settings.policy.max_sequence_length,
                generator=generators([request.seed for request in requests]),
                output_type="pt",
            ).images.float()
        rows[label] = (images, scorer.score(requests, images=images))
    scorer.close()
    return rows


def _curves(figure: Any, runs: Mapping[str, Path], names: Sequence[str]) -> None:
    """Draw one panel per objective: its change over the base model on the same seeds."""
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    style = marks(runs)
    for name, panel in zip(names, panels, strict=True):
        for label, folder in runs.items():
            steps, mean, error = changes(folder, name)
            colour = style[label].colour
            panel.plot(steps, mean, color=colour, marker=style[label].marker, label=label)
            panel.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.2)
        panel.axhline(0, color="grey", linestyle=":", linewidth=1)
        panel.set_title(name)
        panel.set_xlabel("rollouts")
        panel.locator_params(axis="x", integer=True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("change over the base model")
    panels[0].legend(frameon=False)
    figure.suptitle("held-out prompts, deterministic, averaged weights; bands: standard error")


def changes(folder: Path, name: str) -> tuple[list[int], numpy.ndarray, numpy.ndarray]:
    """Return one reward's change at every evaluation of a run, paired with the base model's images.

    Args:
        folder: The folder of the run.
        name: The name of the objective.

    Returns:
        Rollouts; mean change, in the reward's unit; its standard error over prompts.
    """
    evaluations: dict[int, list[dict[str, Any]]] = {
        int(path.stem.removeprefix("step-")): read_metrics(path)
        for path in sorted(folder.glob("evaluation/step-*.jsonl"))
    }
    key, base = f"reward/{name}", evaluations[0]
    prompts = same_prompt([row["prompt"] for row in base])
    nan = float("nan")

    def column(rows: list[dict[str, Any]]) -> Tensor:
        values = [nan if row[key] is None else row[key] for row in rows]
        return torch.tensor(values, dtype=torch.float64)

    pairs = [mean_and_error(column(rows) - column(base), prompts) for rows in evaluations.values()]
    mean, error = numpy.array(pairs).T
    return list(evaluations), mean, error


def _images(
    figure: Any,
    rows: Mapping[str, tuple[Tensor, Tensor]],
    requests: Sequence[Request],
    names: Sequence[str],
) -> None:
    """Draw a row per model and a column per prompt, with the rewards under each image."""
    panels = figure.subplots(len(rows), len(requests), squeeze=False)
    for number, (row, (label, (images, scores))) in enumerate(
        zip(panels, rows.items(), strict=True)
    ):
        for i, panel in enumerate(row):
            panel.imshow(images[i].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="bicubic")
            panel.set_xticks([])
            panel.set_yticks([])
            lines = [
                f"{name} {_score_text(score)}"
                for name, score in zip(names, scores[:, i].tolist(), strict=True)
            ]
            panel.set_xlabel("\n".join(lines), fontsize=7)
            if number == 0:
                words = requests[i].prompt.split()
                half = (len(words) + 1) // 2
                panel.set_title(f"{' '.join(words[:half])}\n{' '.join(words[half:])}", fontsize=8)
        row[0].set_ylabel(label, fontsize=10)
    figure.supxlabel("under each image its rewards; - does not apply", fontsize=9)


def _score_text(score: float) -> str:
    if score != score:
        return "-"
    return f"{score:.2f}" if abs(score) < 10 else f"{score:.0f}"
