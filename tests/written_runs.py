"""Folders of finished runs whose gains are known, as a training would leave them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from moa_diffusion.comparison.read import read_run
from moa_diffusion.comparison.results import Comparison, compare

NAMES = ("ocr", "colour")
UNITS = {"ocr": 0.1, "colour": 20.0}  # the base model's spread within a prompt, by construction


def write_run(
    folder: Path,
    gains: Sequence[Mapping[str, float]],
    *,
    prompts: int = 10,
    images: int = 4,
    noise: float = 0.0,
    seed: int = 0,
    missing: Sequence[int] = (),
    spread: float = 1.0,
) -> None:
    """A finished run whose gains are known.

    Args:
        folder: of the run.
        gains: by objective, at evaluations after 15, 30, ... rollouts.
        prompts: held out.
        images: per prompt.
        noise: std of a sample's gain.
        seed: of the noise.
        missing: prompts to which the first objective does not apply.
        spread: of the base model's rewards.
    """
    random = numpy.random.default_rng(seed)
    (folder / "evaluation").mkdir(parents=True)
    names = list(gains[0])
    for step, now in [
        (0, dict.fromkeys(names, 0.0)),
        *((15 * i + 15, g) for i, g in enumerate(gains)),
    ]:
        lines = []
        for sibling in range(images):
            for prompt in range(prompts):
                row: dict[str, Any] = {"step": step, "group": prompt, "sibling": sibling}
                row |= {"prompt": f"prompt {prompt}", "seed": 100 * prompt + sibling}
                for k, name in enumerate(names):
                    unit = UNITS.get(name, 1.0)
                    # Of an even number of images, the spread within the prompt is the unit.
                    deviation = unit * math.sqrt((images - 1) / images)
                    base = prompt + spread * deviation * (-1) ** sibling
                    gain = now[name] + (noise * random.standard_normal() if step else 0.0)
                    absent = k == 0 and prompt in missing
                    row[f"reward/{name}"] = None if absent else base + unit * gain
                lines.append(json.dumps(row))
        (folder / "evaluation" / f"step-{step:06d}.jsonl").write_text("\n".join(lines) + "\n")
    rows: list[dict[str, Any]] = [{"step": 0, "seconds/total": 99.0, "seconds/evaluate": 99.0}]
    for step in range(1, 15 * len(gains) + 1):
        row = {"step": step, "seconds/sample": 2.0, "seconds/total": 3.0}
        if step % 15 == 0:
            row |= {"seconds/evaluate": 6.0, "seconds/total": 9.0}
        for k, name in enumerate(names):
            row[f"share/{name}"] = None if step == 1 else [0.8, 0.2, 0.0, 0.0][k]
            row[f"weight/{name}"] = [0.6, 0.4, 0.0, 0.0][k]
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def compared(
    tmp_path: Path,
    runs: Mapping[str, Sequence[Sequence[Mapping[str, float]]]],
    **options: Any,
) -> Comparison:
    """Write and compare runs: by method, for each seed the gains at its evaluations."""
    found = []
    for method, seeds in runs.items():
        for seed, gains in enumerate(seeds):
            folder = tmp_path / f"{method}-{seed}"
            write_run(folder, gains, **options)
            found.append(read_run(folder, method=method, seed=seed, names=list(gains[0])))
    return compare(found, resamples=500)


def gain(ocr: float, colour: float) -> dict[str, float]:
    return {"ocr": ocr, "colour": colour}
