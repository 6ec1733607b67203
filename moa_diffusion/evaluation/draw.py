"""Draw the samples that are not in the cache, model by model; processes share the work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from moa_diffusion.adapters.diffusers import carrier, install
from moa_diffusion.config.schema import LoraConfig
from moa_diffusion.distributed import Comm, shard
from moa_diffusion.evaluation.candidates import Candidate
from moa_diffusion.evaluation.errors import working
from moa_diffusion.evaluation.plan import EvaluationPlan
from moa_diffusion.evaluation.records import Sample
from moa_diffusion.evaluation.sample_cache import OutputCache
from moa_diffusion.policies.base import Policy
from moa_diffusion.types import ConfigError, Outputs, Request
from rewards.progress_bar import progress_bar


def draw_missing(
    plan: EvaluationPlan,
    samples: Sequence[Sample],
    missing: set[str],
    outputs: OutputCache[Any],
    device: torch.device,
    comm: Comm,
) -> None:
    """Draw what is missing; a batch is on the disk as soon as it is drawn.

    Args:
        plan: The evaluation; its candidates, prompts and medium are used.
        samples: All samples of the evaluation, drawn before or not.
        missing: Keys of those that are not in the cache.
        outputs: The cache that takes each output by its sample's key.
        device: This process's device.
        comm: Collectives over the processes.

    Raises:
        ConfigError: If a process does not see what another has written.
        EvaluationError: If nothing can be written.
        ProcessError: If one of these was raised on another process.
    """
    size = plan.settings.trainer.sample_batch
    texts = [prompt.text for prompt in plan.prompts]
    with working(comm):
        policy = carrying_policy(plan, device)
        policy.prepare(texts)
        left = set(missing)
        for c, candidate in enumerate(plan.candidates):
            own = {sample.key: sample for sample in samples if sample.candidate == c}
            todo = [own[key] for key in own if key in left]
            left -= own.keys()  # two candidates may be the same model
            if not todo:
                continue
            if candidate.adapter is not None:
                install(policy.trainable(), candidate.adapter)
            local = shard(len(todo), size, comm)[comm.rank]
            policy.expect([texts[todo[i].prompt] for i in local])
            title = f"draw {candidate.label}"
            starts = range(0, len(local), size)
            for start in progress_bar(starts, title=title, shown=comm.rank == 0):
                batch = [todo[i] for i in local[start : start + size]]
                requests = [plan.medium.request(texts[one.prompt], one.seed) for one in batch]
                generated = generate(policy, candidate, requests)
                for sample, output in zip(batch, generated, strict=True):
                    outputs.write(sample.key, output)

    with working(comm):
        _check_shared(outputs.missing([sample.key for sample in samples]), outputs)


def _check_shared(lost: Sequence[str], outputs: OutputCache[Any]) -> None:
    if lost:
        raise ConfigError(
            f"--cache: should be on a disk that all processes see. Process "
            f"{os.environ.get('RANK', '0')} misses `{outputs.path(lost[0])}`."
        )


def carrying_policy(plan: EvaluationPlan, device: torch.device) -> Policy:
    """Return the base model with a LoRA that can carry each candidate's weights in turn."""
    adapters = [one.adapter for one in plan.candidates if one.adapter is not None]
    rank, names = carrier(adapters)
    lora = LoraConfig(rank=rank, alpha=rank, target_modules=names or None)
    return plan.medium.policy(lora, device)


def generate(policy: Policy, candidate: Candidate, requests: Sequence[Request]) -> Outputs:
    """Return the outputs of the candidate, whose weights the policy carries.

    Args:
        policy: Holds the candidate's weights; those of the base model if the candidate has none.
        candidate: The model that draws.
        requests: The n samples to draw, as deployment would.
    """
    if candidate.adapter is not None:
        return policy.generate(requests).outputs
    with policy.reference():
        return policy.generate(requests).outputs
