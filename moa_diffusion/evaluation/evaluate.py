"""Draw and score models on the same prompts and seeds, each output and each score once.

All is drawn before any is scored, so that the model and the reward heads need not share the
accelerator's memory. Scores are of what was stored: what one sees is what was judged.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from moa_diffusion import assembly
from moa_diffusion.adapters.diffusers import carrier, install
from moa_diffusion.config import Config
from moa_diffusion.config.schema import LoraConfig
from moa_diffusion.data.sampling import Prompt, read_prompts
from moa_diffusion.distributed import AccelerateComm, Comm, agreed, shard
from moa_diffusion.evaluation.candidates import Candidate
from moa_diffusion.evaluation.image_cache import Sampler
from moa_diffusion.evaluation.medium import medium_of
from moa_diffusion.evaluation.output_cache import OutputCache, model_digest
from moa_diffusion.evaluation.score_cache import Judge, Score, ScoreCache
from moa_diffusion.evaluation.text_cache import Generation
from moa_diffusion.policies.base import Policy
from moa_diffusion.processes.launcher import check_launcher, make_accelerator
from moa_diffusion.scoring import RewardHead, Scorer
from moa_diffusion.types import ConfigError, Outputs, Request

SCORED_AT_A_TIME = 16  # batches between two writes to the cache of scores


class EvaluationError(RuntimeError):
    """An evaluation that could not be finished; what it has drawn and scored is in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One picture or text of an evaluation."""

    candidate: int  # index of the model
    prompt: int  # index of the prompt
    seed: int
    key: str  # in the cache of outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What was found: everything that the table of scores has."""

    candidates: tuple[Candidate, ...]
    digests: tuple[str, ...]  # of each candidate with the base model
    prompts: tuple[Prompt, ...]
    sampler: Sampler | Generation
    samples: tuple[Sample, ...]  # M, by candidate, prompt and seed
    scores: Mapping[str, tuple[Score, ...]]  # by objective, M each
    judges: Mapping[str, Judge]
    outputs: OutputCache[Any]
    noun: str  # what the samples are
    drawn: int  # samples that were not in the cache
    scored: int  # scores likewise


def chosen_prompts(settings: Config, file: str | None) -> tuple[Prompt, ...]:
    """The prompts of a file, or the run's held-out ones.

    Raises:
        ConfigError: if there are none.
    """
    if file is not None:
        return read_prompts(file, column=settings.prompts.column)
    section = dataclasses.replace(settings.evaluation, every=1, images_per_prompt=1)
    asked = assembly.heldout_requests(dataclasses.replace(settings, evaluation=section))
    if not asked:
        raise ConfigError("--prompts: should name a file. The run has no held-out prompts.")
    return tuple(Prompt(text=request.prompt, metadata=request.metadata) for request in asked)


def evaluate(
    settings: Config,
    candidates: Sequence[Candidate],
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    *,
    cache: Path,
) -> Evaluation:
    """Draw every model's samples and score them; processes share the work.

    Args:
        settings: the base model, how it draws, and the rewards.
        candidates: what is evaluated.
        prompts: P.
        seeds: S, of the noise; equal for all models.
        cache: folder of samples and scores; of a disk that all processes see.

    Raises:
        ConfigError: for what cannot be run, before a model is loaded.
        RewardError: if a head failed.
        EvaluationError: if the cache cannot be read or written.
        ProcessError: if one of these was raised on another process.
    """
    accelerator = make_accelerator()
    comm = AccelerateComm(accelerator)
    with agreed(comm):
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ConfigError(f"--seeds: should be different whole numbers from 0. Found {seeds}.")
        check_launcher(accelerator)
        medium, heads = medium_of(settings), assembly.heads(settings)
        assembly.check_judged("rewards", heads, prompts)
        sampler, outputs = medium.sampler(settings, accelerator.device), medium.cache(cache)
    digest = partial(medium.base_digest, settings, cache / "digests.txt")
    with working(comm):
        if comm.rank == 0:
            digest()
    with working(comm):
        base = digest()  # the others read what the first has written down
    digests = [model_digest(base, candidate.digest) for candidate in candidates]
    samples = [
        Sample(
            candidate=c,
            prompt=p,
            seed=seed,
            key=outputs.key(model=model, prompt=prompt.text, seed=seed, sampler=sampler),
        )
        for c, model in enumerate(digests)
        for p, prompt in enumerate(prompts)
        for seed in seeds
    ]
    with working(comm):
        missing = set(outputs.missing([sample.key for sample in samples]))
    if comm.any(bool(missing)):  # nobody draws before all have looked
        _draw(settings, candidates, prompts, samples, missing, outputs, accelerator, comm)
    scores, judges, scored = _score(settings, heads, prompts, samples, outputs, cache, comm)
    comm.close()
    return Evaluation(
        candidates=tuple(candidates),
        digests=tuple(digests),
        prompts=tuple(prompts),
        sampler=sampler,
        samples=tuple(samples),
        scores=scores,
        judges=judges,
        outputs=outputs,
        noun=medium.noun,
        drawn=len(missing),
        scored=scored,
    )


@contextmanager
def working(comm: Comm) -> Iterator[None]:
    """As ``agreed``; of a disk's failure it says that what is done is kept."""
    with agreed(comm):
        try:
            yield
        except OSError as error:
            reason = str(error).rstrip(".")
            raise EvaluationError(
                f"{reason}. What is done is saved; the same command continues."
            ) from error


# ---------------------------------------------------------------------- drawing


def _draw(
    settings: Config,
    candidates: Sequence[Candidate],
    prompts: Sequence[Prompt],
    samples: Sequence[Sample],
    missing: set[str],
    outputs: OutputCache[Any],
    accelerator: Accelerator,
    comm: Comm,
) -> None:
    """Draw what is missing, model by model; a batch is on the disk as soon as it is drawn."""
    medium, size = medium_of(settings), settings.trainer.sample_batch
    with working(comm):
        policy = carrying_policy(settings, candidates, accelerator.device)
        policy.prepare([prompt.text for prompt in prompts])
        left = set(missing)
        for c, candidate in enumerate(candidates):
            wanted = {sample.key: sample for sample in samples if sample.candidate == c}
            todo = [wanted[key] for key in wanted if key in left]
            left -= wanted.keys()  # two candidates may be the same model
            if not todo:
                continue
            if candidate.adapter is not None:
                install(policy.trainable(), candidate.adapter)
            mine = shard(len(todo), size, comm)[comm.rank]
            policy.expect([prompts[todo[i].prompt].text for i in mine])
            title = f"draw {candidate.label}"
            for start in tqdm(range(0, len(mine), size), desc=title, disable=comm.rank > 0):
                batch = [todo[i] for i in mine[start : start + size]]
                requests = [
                    medium.request(prompts[sample.prompt].text, sample.seed) for sample in batch
                ]
                drawn = draw(policy, candidate, requests)
                for sample, output in zip(batch, drawn, strict=True):
                    outputs.write(sample.key, output)

    with working(comm):
        _check_seen(outputs.missing([sample.key for sample in samples]), outputs)


def _check_seen(lost: Sequence[str], outputs: OutputCache[Any]) -> None:
    if lost:
        raise ConfigError(
            f"--cache: should be on a disk that all processes see. Process "
            f"{os.environ.get('RANK', '0')} misses `{outputs.path(lost[0])}`."
        )


def carrying_policy(
    settings: Config, candidates: Sequence[Candidate], device: torch.device
) -> Policy:
    """The base model with a LoRA that can carry each candidate's weights in turn."""
    adapters = [one.adapter for one in candidates if one.adapter is not None]
    rank, names = carrier(adapters)
    lora = LoraConfig(rank=rank, alpha=rank, target_modules=names or None)
    return medium_of(settings).policy(settings, lora, device)


def draw(policy: Policy, candidate: Candidate, requests: Sequence[Request]) -> Outputs:
    """Outputs of the model whose weights the policy carries."""
    if candidate.adapter is not None:
        return policy.generate(requests)
    with policy.reference():
        return policy.generate(requests)


# ---------------------------------------------------------------------- scoring


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
        found = scorer.draw_and_score(
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
