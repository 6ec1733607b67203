"""Pairwise preferences on letters of the embedded language model, by the exact rules."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from moa_diffusion.config.schema import GenerationConfig, LoraConfig, PolicyConfig
from moa_diffusion.data.seeds import derive_seed
from moa_diffusion.policies.causal_lm import CausalLMPolicy
from moa_diffusion.policies.language_model import load_model
from moa_diffusion.tiny import rules
from moa_diffusion.types import Request

MAX_NEW_TOKENS = 96
JUDGES: Mapping[str, Callable[[str], float]] = {
    "politeness": rules.politeness,
    "brevity": lambda text: -rules.words(text),
}


def write_preferences(
    target: Path, *, lm: Path, prompts: list[str], responses: int = 24, seed: int = 0
) -> None:
    """Write a JSONL of prompts, letters that the model wrote, and which is better at what.

    Of a prompt's letters, all pairs are compared; equal ones are left out.

    Args:
        target: The JSONL file that is written.
        lm: Folder of the language model.
        prompts: One line each.
        responses: Letters drawn per prompt; those that are equal or do not end are left out.
        seed: Seed of the letters.
    """
    model, tokenizer = load_model(str(lm))
    policy = CausalLMPolicy(
        model,
        tokenizer,
        settings=PolicyConfig(name="causal_lm", lora=LoraConfig(rank=1)),
        generation=GenerationConfig(max_new_tokens=MAX_NEW_TOKENS),
        device=torch.device("cpu"),
        seed=seed,
    )
    policy.prepare(prompts)
    lines = []
    for prompt in prompts:
        asked = [
            Request(prompt=prompt, seed=derive_seed(seed, "pairs", prompt, i))
            for i in range(responses)
        ]
        drawn = policy.sample(asked, step=0)
        assert drawn.texts is not None
        ended = (drawn.mask.sum(1) < MAX_NEW_TOKENS).tolist()
        letters = list(
            dict.fromkeys(t for t, whole in zip(drawn.texts, ended, strict=True) if whole)
        )
        lines.append(
            json.dumps(
                {"prompt": prompt, "responses": letters, "preferences": compare(letters)},
                separators=(",", ":"),
            )
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def compare(letters: list[str]) -> dict[str, list[list[int]]]:
    """Return pairs [better, worse] of positions, by trait."""
    pairs: dict[str, list[list[int]]] = {}
    for name, judge in JUDGES.items():
        scores = [judge(letter) for letter in letters]
        ordered = [
            sorted(pair, key=lambda i: -scores[i])
            for pair in itertools.combinations(range(len(letters)), 2)
        ]
        pairs[name] = [[i, j] for i, j in ordered if scores[i] > scores[j]]
    return pairs
