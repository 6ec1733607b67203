"""Score what is not in the cache, as it was stored: what one sees is what was scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moa_diffusion.config import Config
from moa_diffusion.data.sampling import Prompt
from moa_diffusion.distributed import Comm
from moa_diffusion.evaluation.errors import working
from moa_diffusion.evaluation.records import Sample
from moa_diffusion.evaluation.sample_cache import OutputCache
from moa_diffusion.evaluation.score_cache import Judge, Score, ScoreCache
from moa_diffusion.scoring import RewardHead, Scorer
from moa_diffusion.types import Request

SCORED_AT_A_TIME = 16  # batches between two writes to the cache of scores


def _score(
    settings: Config,
    heads: Mapping[str, RewardHead],
    prompts: Sequence[Prompt],
    samples: Sequence[Sample],
    outputs: OutputCache[Any],
    cache: Path,
    comm: Comm,
) -> tuple[dict[str, tuple[Score, ...]], dict[str, Judge], int]:
    """Scores by objective, of every sample; what is not in the cache is computed."""

    def options(name: str) -> dict[str, Any]:
        given = settings.rewards[name].items()
        return {key: value for key, value in given if key not in ("weight", "head")}

    everyone = Scorer(heads, comm, overlap=settings.scoring.overlap)
    scorers = {tuple(heads): everyone}
    try:
        everyone.load([prompt.text for prompt in prompts])
        with working(comm):  # nobody writes before all have read
            judges = {name: Judge.of(name, head, options(name)) for name, head in heads.items()}
            caches = {name: ScoreCache(cache / "scores", judge) for name, judge in judges.items()}
            keys = [ScoreCache.key(sample.key, prompts[sample.prompt]) for sample in samples]
            known = {name: one.read() for name, one in caches.items()}
        waiting: dict[tuple[str, ...], dict[str, int]] = {}  # heads -> key -> index of a sample
        for i, key in enumerate(keys):
            if lacking := tuple(name for name in heads if key not in known[name]):
                waiting.setdefault(lacking, {}).setdefault(key, i)
        for names, todo in waiting.items():
            if names not in scorers:
                chosen = {name: heads[name] for name in names}
                scorers[names] = Scorer(chosen, comm, overlap=settings.scoring.overlap)
            _score_missing(
                settings, scorers[names], prompts, samples, todo, outputs, caches, known, comm
            )
    finally:
        for scorer in scorers.values():
            scorer.close()
    scores = {name: tuple(known[name][key] for key in keys) for name in heads}
    return scores, judges, sum(len(names) * len(todo) for names, todo in waiting.items())


def _score_missing(
    settings: Config,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    samples: Sequence[Sample],
    todo: Mapping[str, int],
    outputs: OutputCache[Any],
    caches: Mapping[str, ScoreCache],
    known: Mapping[str, dict[str, Score]],
    comm: Comm,
) -> None:
    """Score these samples with all heads of the scorer, and write them down part by part."""
    items, size = list(todo.items()), settings.trainer.sample_batch
    part_size = size * SCORED_AT_A_TIME
    for start in range(0, len(items), part_size):
        part = items[start : start + part_size]
        requests = [  # `group` says which sample it is
            Request(
                prompt=prompts[samples[i].prompt].text,
                metadata=prompts[samples[i].prompt].metadata,
                group=i,
            )
            for _, i in part
        ]
        found = scorer.survey(
            requests,
            lambda asked: outputs.read([samples[request.group].key for request in asked]),
            batch=size,
            title="score",
            before_batch=lambda: None,
            progress=comm.rank == 0,
        )
        for name, column in zip(scorer.names, found.values.T.tolist(), strict=True):
            prefix = f"{name}/"
            new = {
                key: Score(
                    value=value,
                    extra={
                        k.removeprefix(prefix): v for k, v in extra.items() if k.startswith(prefix)
                    },
                )
                for (key, _), value, extra in zip(part, column, found.extra, strict=True)
            }
            known[name].update(new)
            with working(comm):
                if comm.rank == 0:
                    caches[name].add(new)
