"""Writes ``scores.parquet``: one row per model, prompt, seed and reward."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from moa_diffusion.evaluation.evaluate import Evaluation
from moa_diffusion.files.writing import replaced
from moa_diffusion.report.table import NAME


def write_table(found: Evaluation, folder: Path) -> Path:
    """Write ``scores.parquet`` into a folder; paths of pictures in it are relative to that.

    A text stands in the table itself.
    """
    import pyarrow
    from pyarrow import parquet

    rows = []
    for i, sample in enumerate(found.samples):
        candidate = found.candidates[sample.candidate]
        drawn = found.outputs.columns(sample.key, folder)
        for name, scores in found.scores.items():
            judge, score = found.judges[name], scores[i]
            rows.append(
                {
                    "checkpoint": candidate.label,
                    "series": candidate.series,
                    "step": candidate.step,
                    "ema": candidate.ema,
                    "weights": None
                    if candidate.weights is None
                    else json.dumps(dict(candidate.weights)),
                    "model_digest": found.digests[sample.candidate],
                    "adapter_digest": candidate.digest,
                    "prompt_index": sample.prompt,
                    "prompt": found.prompts[sample.prompt].text,
                    "metadata": json.dumps(dict(found.prompts[sample.prompt].metadata)),
                    "seed": sample.seed,
                    "reward": name,
                    "unit": judge.identity.unit,
                    "score": None if math.isnan(score.value) else score.value,
                    "extra": json.dumps(dict(score.extra), ensure_ascii=False),
                    **drawn,
                    "scorer_version": judge.identity.version,
                    "scorer_digest": judge.digest,
                    "scorer_provenance": json.dumps(dict(judge.identity.provenance)),
                    **{f"sampler_{key}": value for key, value in asdict(found.sampler).items()},
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
