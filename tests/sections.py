"""Policies from flat settings: each goes to the section of the configuration that has it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from moa_diffusion.config.schema import (
    EvaluationConfig,
    ForwardConfig,
    GenerationConfig,
    LoraConfig,
    LossConfig,
    PolicyConfig,
    SamplingConfig,
)
from moa_diffusion.policies.causal_lm import CausalLMPolicy
from moa_diffusion.policies.sd3 import SD3Policy

CPU = torch.device("cpu")


def sd3_policy(pipeline: Any, *, device: torch.device = CPU, seed: int = 0, **flat: Any) -> Any:
    """``lora_rank`` goes to ``policy.lora.rank``, ``eval_steps`` to ``evaluation.steps``.

    With settings of ``forward``, images are noised again as decisions.
    """
    return SD3Policy(
        pipeline,
        sampling=SamplingConfig(**_of(SamplingConfig, flat)),
        evaluation=EvaluationConfig(**_of(EvaluationConfig, flat, "eval_")),
        loss=LossConfig(
            kind="forward" if "forward" in flat else "grpo",
            forward=ForwardConfig(**flat.pop("forward", {})),
            kl=flat.pop("kl", None),
            steps=flat.pop("loss_steps", "plain"),
            clip=flat.pop("loss_clip", "ratio"),
        ),
        settings=_policy(flat),
        device=device,
        seed=seed,
        sampler=flat.pop("sampler_function", None),
        **flat,
    )


def lm_policy(model: Any, tokenizer: Any, *, seed: int = 0, **flat: Any) -> CausalLMPolicy:
    """The same for a language model; evaluations take the likeliest token."""
    generation = {"eval_temperature": 0.0} | _of(GenerationConfig, flat)
    return CausalLMPolicy(
        model,
        tokenizer,
        generation=GenerationConfig(**generation),
        settings=_policy(flat),
        device=CPU,
        seed=seed,
        **flat,
    )


def _policy(flat: dict[str, Any]) -> PolicyConfig:
    if "target_modules" in flat:
        flat["lora_target_modules"] = flat.pop("target_modules")
    lora = LoraConfig(**_of(LoraConfig, flat, "lora_"))
    return PolicyConfig(lora=lora, **_of(PolicyConfig, flat))


def _of(section: Any, flat: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Take out the settings that a section has, which begin with the prefix."""
    names = [field.name for field in fields(section) if f"{prefix}{field.name}" in flat]
    return {name: flat.pop(f"{prefix}{name}") for name in names}
