"""Draw and score models on the same prompts and seeds, each output and each score once.

All is drawn before any is scored, so that the model and the reward heads need not share the
accelerator's memory. Scores are of what was stored: what one sees is what was scored.
"""

from __future__ import annotations

from moa_diffusion import assembly
from moa_diffusion.distributed import AccelerateComm, agreed
from moa_diffusion.evaluation.candidates import model_digest
from moa_diffusion.evaluation.draw import draw_missing
from moa_diffusion.evaluation.errors import working
from moa_diffusion.evaluation.plan import EvaluationPlan
from moa_diffusion.evaluation.records import Sample, ScoredSamples
from moa_diffusion.evaluation.score import score_stored
from moa_diffusion.processes.launcher import check_launcher, make_accelerator


def evaluate(plan: EvaluationPlan) -> ScoredSamples:
    """Draw every model's samples and score them; processes share the work.

    Args:
        plan: What ``plan_evaluation`` has checked; every process sees the disk of its cache.

    Raises:
        ConfigError: For what cannot be run, before a model is loaded.
        RewardError: If a head failed.
        EvaluationError: If the cache cannot be read or written.
        ProcessError: If one of these was raised on another process.
    """
    settings, medium, seeds = plan.settings, plan.medium, plan.seeds
    accelerator = make_accelerator()
    comm = AccelerateComm(accelerator)
    with agreed(comm):
        check_launcher(accelerator)
        heads = assembly.heads(settings)
        assembly.check_requirements("rewards", heads, plan.prompts)
        deployment, outputs = medium.deployment(accelerator.device), medium.cache(plan.cache)
    memory = plan.cache / "digests.txt"
    with working(comm):
        if comm.rank == 0:
            medium.base_digest(memory)
    with working(comm):
        base = medium.base_digest(memory)  # the first process has written it down
    digests = tuple(model_digest(base, candidate.digest) for candidate in plan.candidates)
    samples = tuple(
        Sample(
            candidate=c,
            prompt=p,
            seed=seed,
            key=outputs.key(model=model, prompt=prompt.text, seed=seed, deployment=deployment),
        )
        for c, model in enumerate(digests)
        for p, prompt in enumerate(plan.prompts)
        for seed in seeds
    )
    with working(comm):
        missing = set(outputs.missing([sample.key for sample in samples]))
    if comm.any(bool(missing)):  # nobody draws before all have looked
        draw_missing(plan, samples, missing, outputs, accelerator.device, comm)
    scores, versions, scored = score_stored(plan, heads, samples, outputs, comm)
    comm.close()
    return ScoredSamples(
        candidates=plan.candidates,
        digests=digests,
        prompts=plan.prompts,
        deployment=deployment,
        samples=samples,
        scores=scores,
        versions=versions,
        outputs=outputs,
        noun=medium.noun,
        drawn=len(missing),
        scored=scored,
    )
