"""What a run is, in a few lines, before it begins; and what may be done once it has ended."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import torch

from moa_diffusion.assembly.methods import method_of
from moa_diffusion.config import Config
from moa_diffusion.distributed import Comm
from moa_diffusion.files import program
from moa_diffusion.monitoring.console import Facts
from moa_diffusion.policies.base import Policy
from moa_diffusion.scoring import RewardHead


def outline(
    settings: Config,
    *,
    model: Policy,
    heads: Mapping[str, RewardHead],
    learned: Facts,
    heldout: int,
    placed: str,
    completed: int,
    title: str,
) -> Facts:
    """Return the facts about a run that its console begins with.

    Args:
        settings: The run's configuration.
        model: The policy that is trained.
        heads: All reward heads, those included that nobody trains on.
        learned: What it learns from: the geometry, and sets of prompts if there are several.
        heldout: The number of samples of an evaluation.
        placed: What the run is on.
        completed: The number of rounds that are done already.
        title: What a round is called, in the plural.
    """
    policy, counts = settings.policy, [p.numel() for p in model.trainable().values()]
    adapter = "" if policy.name == "toy" else f", LoRA of rank {policy.lora.rank}"
    if policy.adapter is not None:
        adapter += f" from {policy.adapter}"
    facts = [
        ("Run", f"{settings.output_dir}{f', after {completed} {title}' if completed else ''}"),
        (
            "Policy",
            f"{policy.name} {policy.path!r}, {policy.dtype}: {sum(counts):,} trainable parameters"
            f"{adapter}",
        ),
    ]
    watched = settings.evaluation.rewards
    for kind, chosen in (("Rewards", settings.rewards), ("Held out", watched)):
        shown = [_reward(name, heads[name], chosen[name]) for name in chosen]
        facts += [(kind, "; ".join(shown))] if shown else []
    facts += [("Method", _method(settings)), *learned, ("Processes", placed)]
    if heldout:
        every = settings.evaluation.every
        facts.append(
            ("Evaluation", f"every {every} {title}, {heldout} samples of held-out prompts")
        )
    return facts


def commands(settings: Config) -> list[str]:
    """Return the commands that usually follow a run, as this process was started."""
    folder = shlex.quote(settings.output_dir)
    exported = shlex.quote(f"{settings.output_dir.rstrip('/')}/exported")
    follow = [f"{program.words('export')} --run {folder} --output {exported}"]
    if settings.prompts.heldout is not None:
        follow.insert(0, f"{program.words('evaluate')} --run {folder} --checkpoints base,latest")
    return follow


def processes(comm: Comm, device: torch.device) -> str:
    """Return what a run is on; on CPUs also the number of threads, which changes rounding."""
    threads = torch.get_num_threads()
    each = f", {threads} thread{'s' if threads > 1 else ''} each" if device.type == "cpu" else ""
    return f"{comm.world_size} ({device.type}{each})"


def _reward(name: str, head: RewardHead, options: Mapping[str, Any]) -> str:
    unit, weight = head.unit or "no unit", float(options.get("weight", 1.0))
    return f"{name} ({unit}{'' if weight == 1 else f'; weight {weight:g}'})"


def _method(settings: Config) -> str:
    name = settings.objectives.method
    if settings.preferences.given:
        return f"{name}, from preferences"
    chosen = method_of(settings)
    return f"{name} ({chosen.normalizer.__name__}, {chosen.weighting.__name__})"
