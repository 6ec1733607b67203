"""Draw and score models on the same prompts and seeds, each output and each score once.

All is drawn before any is scored, so that the model and the reward heads need not share the
accelerator's memory. Scores are of what was stored: what one sees is what was judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from moa_diffusion import assembly
from moa_diffusion.config import Config
from moa_diffusion.data.sampling import Prompt
from moa_diffusion.distributed import AccelerateComm, agreed
from moa_diffusion.evaluation.candidates import Candidate, model_digest
from moa_diffusion.evaluation.draw import _draw
from moa_diffusion.evaluation.errors import working
from moa_diffusion.evaluation.medium import medium_of
from moa_diffusion.evaluation.records import Evaluation, Sample
from moa_diffusion.evaluation.score import _score
from moa_diffusion.processes.launcher import check_launcher, make_accelerator
from moa_diffusion.types import ConfigError


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


# ---------------------------------------------------------------------- drawing


# ---------------------------------------------------------------------- scoring
