"""Score the samples that have no score in the cache, as they were stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moa_diffusion.distributed import Comm
from moa_diffusion.evaluation.errors import working
from moa_diffusion.evaluation.plan import EvaluationPlan
from moa_diffusion.evaluation.records import Sample
from moa_diffusion.evaluation.sample_cache import OutputCache
from moa_diffusion.evaluation.score_cache import HeadVersion, Score, ScoreCache
from moa_diffusion.scoring import RewardHead, Scorer
from moa_diffusion.types import Request

BATCHES_PER_WRITE = 16  # to the caches of scores


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSample(Request):
    """A sample to score, which was drawn before."""

    output: str  # key in the cache of outputs
    score: str  # key in the caches of scores


def score_stored(
    plan: EvaluationPlan,
    heads: Mapping[str, RewardHead],
    samples: Sequence[Sample],
    outputs: OutputCache[Any],
    comm: Comm,
) -> tuple[dict[str, tuple[Score, ...]], dict[str, HeadVersion], int]:
    """Score all samples; what the cache has is not computed again.

    Args:
        plan: The evaluation; the options of its heads and the folder of the cache are used.
        heads: The reward heads by objective.
        samples: M samples, whose outputs are in the cache.
        outputs: The cache that holds each sample's output.
        comm: Collectives over the processes.

    Returns:
        M scores by objective, the heads' versions by objective, and how many scores were computed.

    Raises:
        RewardError: If a head failed.
        ConfigError: If what the cache holds is damaged.
        EvaluationError: If nothing can be written.
        ProcessError: If one of these was raised on another process.
    """

    def options(name: str) -> dict[str, Any]:
        given = plan.settings.rewards[name].items()
        return {key: value for key, value in given if key not in ("weight", "head")}

    overlap, folder = plan.settings.scoring.overlap, plan.cache / "scores"
    everyone = Scorer(heads, comm, overlap=overlap)
    scorers = {tuple(heads): everyone}
    try:
        everyone.load([prompt.text for prompt in plan.prompts])
        with working(comm):  # nobody writes before all have read
            versions = {
                name: HeadVersion.of(name, head, options(name)) for name, head in heads.items()
            }
            caches = {name: ScoreCache(folder, version) for name, version in versions.items()}
            known = {name: cache.read() for name, cache in caches.items()}
            stored = [_stored(plan, sample) for sample in samples]
        # Samples by the heads that have not scored them; equal samples have one key.
        missing: dict[tuple[str, ...], dict[str, StoredSample]] = {}
        for one in stored:
            if lacking := tuple(name for name in heads if one.score not in known[name]):
                missing.setdefault(lacking, {}).setdefault(one.score, one)
        for names, todo in missing.items():
            if names not in scorers:
                chosen = {name: heads[name] for name in names}
                scorers[names] = Scorer(chosen, comm, overlap=overlap)
            _score_missing(plan, scorers[names], list(todo.values()), outputs, caches, known, comm)
    finally:
        for scorer in scorers.values():
            scorer.close()
    scores = {name: tuple(known[name][one.score] for one in stored) for name in heads}
    return scores, versions, sum(len(names) * len(todo) for names, todo in missing.items())


def _stored(plan: EvaluationPlan, sample: Sample) -> StoredSample:
    prompt = plan.prompts[sample.prompt]
    return StoredSample(
        prompt=prompt.text,
        metadata=prompt.metadata,
        output=sample.key,
        score=ScoreCache.key(sample.key, prompt),
    )


def _score_missing(
    plan: EvaluationPlan,
    scorer: Scorer,
    stored: Sequence[StoredSample],
    outputs: OutputCache[Any],
    caches: Mapping[str, ScoreCache],
    known: Mapping[str, dict[str, Score]],
    comm: Comm,
) -> None:
    """Score these samples with all heads of the scorer, and write them down part by part."""
    size = plan.settings.trainer.sample_batch
    part_size = size * BATCHES_PER_WRITE
    for start in range(0, len(stored), part_size):
        part = stored[start : start + part_size]
        scored = scorer.draw_and_score(
            part,
            lambda batch: outputs.read([one.output for one in batch]),
            batch=size,
            title="score",
            before_batch=lambda: None,
            bars=comm.rank == 0,
        )
        for name, column in zip(scorer.names, scored.values.tolist(), strict=True):
            prefix = f"{name}/"
            new = {
                one.score: Score(
                    value=value,
                    extra={
                        key.removeprefix(prefix): cell
                        for key, cell in extra.items()
                        if key.startswith(prefix)
                    },
                )
                for one, value, extra in zip(part, column, scored.extra, strict=True)
            }
            known[name].update(new)
            with working(comm):
                if comm.rank == 0:
                    caches[name].add(new)
