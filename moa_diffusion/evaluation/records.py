"""What an evaluation has drawn and scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moa_diffusion.data.prompt_files import Prompt
from moa_diffusion.evaluation.candidates import Candidate
from moa_diffusion.evaluation.images import ImageSettings
from moa_diffusion.evaluation.sample_cache import OutputCache
from moa_diffusion.evaluation.score_cache import HeadVersion, Score
from moa_diffusion.evaluation.texts import TextSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image or text of an evaluation."""

    candidate: int  # index of the model
    prompt: int  # index of the prompt
    seed: int
    key: str  # in the cache of outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSamples:
    """All samples of an evaluation with their scores: everything that the table has."""

    candidates: tuple[Candidate, ...]
    digests: tuple[str, ...]  # one for each candidate, of the base model with its adapter
    prompts: tuple[Prompt, ...]
    deployment: ImageSettings | TextSettings
    samples: tuple[Sample, ...]  # M, by candidate, prompt and seed
    scores: Mapping[str, tuple[Score, ...]]  # by objective, M each
    versions: Mapping[str, HeadVersion]  # what scored, by objective
    outputs: OutputCache[Any]
    noun: str  # what the samples are
    drawn: int  # samples that were not in the cache
    scored: int  # scores likewise
