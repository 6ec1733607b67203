"""What an evaluation has drawn and scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moa_diffusion.data.sampling import Prompt
from moa_diffusion.evaluation.candidates import Candidate
from moa_diffusion.evaluation.images import Sampler
from moa_diffusion.evaluation.sample_cache import OutputCache
from moa_diffusion.evaluation.score_cache import Judge, Score
from moa_diffusion.evaluation.texts import Generation


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
