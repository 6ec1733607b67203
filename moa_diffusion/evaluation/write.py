"""Writes an evaluation's files, first ``scores.parquet``: a row per model, prompt, seed, reward."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from moa_diffusion.evaluation.records import ScoredSamples
from moa_diffusion.files.writing import replaced, write_text
from moa_diffusion.report.csv_table import csv_text
from moa_diffusion.report.page.page import NAME as REPORT
from moa_diffusion.report.page.page import write_report
from moa_diffusion.report.pareto_plot import write_pareto
from moa_diffusion.report.shown import write_shown
from moa_diffusion.report.summary import text, write_summary
from moa_diffusion.report.table import NAME, read_table


def write_results(
    scored: ScoredSamples, output: Path, *, shown: int, runs: Mapping[str, Path]
) -> str:
    """Write the table, the summary, all models side by side, the front and the page.

    All but the table is made from the table that was written, not from what was in memory.

    Args:
        scored: The samples and their scores.
        output: The folder, made if need be.
        shown: The number of prompts beside each other at most.
        runs: Folders of runs by series, whose training the page shows.

    Returns:
        What to print.

    Raises:
        ConfigError: If a file that a run left is damaged.
    """
    output.mkdir(parents=True, exist_ok=True)
    write_table(scored, output)
    table = read_table(output)
    summary = write_summary(table, output)
    write_text(output / "summary.csv", csv_text(table, summary))
    shown_in = write_shown(table, output, shown=shown)
    write_pareto(table, summary, output / "pareto.png")
    write_report(table, summary, runs, output / REPORT)
    files = (NAME, "summary.md", "summary.json", "summary.csv", shown_in, "pareto.png", REPORT)
    return (
        f"{text(table, summary)}\n"
        f"Drawn: {scored.drawn} of {len(scored.samples)} {scored.noun}; "
        f"scored: {scored.scored} of {table.values.size} scores; the others were there.\n"
        f"Written: {', '.join(str(output / name) for name in files)}"
    )


def write_table(scored: ScoredSamples, folder: Path) -> Path:
    """Write ``scores.parquet`` into a folder; paths of images in it are relative to that.

    A text stands in the table itself.
    """
    import pyarrow
    from pyarrow import parquet

    rows = []
    for i, sample in enumerate(scored.samples):
        candidate = scored.candidates[sample.candidate]
        output = scored.outputs.columns(sample.key, folder)
        for name, scores in scored.scores.items():
            version, score = scored.versions[name], scores[i]
            rows.append(
                {
                    "checkpoint": candidate.label,
                    "series": candidate.series,
                    "step": candidate.step,
                    "ema": candidate.ema,
                    "weights": None
                    if candidate.weights is None
                    else json.dumps(dict(candidate.weights)),
                    "model_digest": scored.digests[sample.candidate],
                    "adapter_digest": candidate.digest,
                    "prompt_index": sample.prompt,
                    "prompt": scored.prompts[sample.prompt].text,
                    "metadata": json.dumps(dict(scored.prompts[sample.prompt].metadata)),
                    "seed": sample.seed,
                    "reward": name,
                    "unit": version.identity.unit,
                    "score": None if math.isnan(score.value) else score.value,
                    "extra": json.dumps(dict(score.extra), ensure_ascii=False),
                    **output,
                    "scorer_version": version.identity.version,
                    "scorer_digest": version.digest,
                    "scorer_provenance": json.dumps(dict(version.identity.provenance)),
                    **{f"sampler_{key}": value for key, value in asdict(scored.deployment).items()},
                }
            )
    kinds = {"step": pyarrow.int64(), "ema": pyarrow.bool_(), "weights": pyarrow.string()}
    kinds |= {"score": pyarrow.float64()}
    columns = {
        key: pyarrow.array([row[key] for row in rows], type=kinds.get(key)) for key in rows[0]
    }
    target = folder / NAME
    with replaced(target) as partial:
        parquet.write_table(pyarrow.table(columns), partial)
    return target
