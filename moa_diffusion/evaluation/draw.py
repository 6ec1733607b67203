"""Draw what is not in the cache, model by model; processes share the work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from moa_diffusion.adapters.diffusers import carrier, install
from moa_diffusion.config import Config
from moa_diffusion.config.schema import LoraConfig
from moa_diffusion.data.sampling import Prompt
from moa_diffusion.distributed import Comm, deal
from moa_diffusion.evaluation.candidates import Candidate
from moa_diffusion.evaluation.errors import working
from moa_diffusion.evaluation.medium import medium_of
from moa_diffusion.evaluation.records import Sample
from moa_diffusion.evaluation.sample_cache import OutputCache
from moa_diffusion.policies.base import Policy
from moa_diffusion.types import ConfigError, Outputs, Request


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
            mine = deal(len(todo), size, comm)[comm.rank]
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
