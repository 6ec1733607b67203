"""Causal language models of transformers: reads them, and says early what does not fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moa_diffusion.policies import lora
from moa_diffusion.policies.chat import Dialogue
from moa_diffusion.policies.hub import check_reachable
from moa_diffusion.policies.sd3 import DTYPES
from moa_diffusion.types import ConfigError

# What a forward pass must accept: padding on the left, and logits of some positions alone.
ARGUMENTS = {"attention_mask", "position_ids", "logits_to_keep"}


def read_config(path: str, *, revision: str | None = None) -> Any:
    """Return the model's configuration, of a kind that can be trained here.

    Raises:
        ConfigError: If there is none, or it is not that of a causal language model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    check_reachable(path, "config.json", revision=revision)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "policy.path: should be a folder with a causal language model, or a hub id that can "
            f"be reached. Found {path!r}: {error}"
        ) from error
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    name = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__ if known else None
    written = config.architectures or [name]  # old folders do not say
    if name not in written or config.is_encoder_decoder or name is None:
        raise ConfigError(
            f"policy.path: should be a causal language model{f' ({name})' if name else ''}. "
            f"Found {', '.join(config.architectures or [config.model_type])} in {path!r}."
        )
    check_forward(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    return config


def check_forward(kind: type[Any]) -> None:
    """Check that a class of models takes what a policy passes.

    Raises:
        ConfigError: Naming the arguments that its forward pass lacks.
    """
    lacking = ARGUMENTS - inspect.signature(kind.forward).parameters.keys()
    if lacking:
        raise ConfigError(
            "policy.path: the model's forward pass should accept "
            f"{', '.join(sorted(ARGUMENTS))}. {kind.__name__} lacks {', '.join(sorted(lacking))}: "
            "choose a model of another family."
        )


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Check that every token has an embedding.

    Raises:
        ConfigError: If not.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ConfigError(
            "policy.path: the model should have an embedding for each of the tokenizer's "
            f"{len(tokenizer)} tokens. Found {rows}: they do not belong together."
        )


def stop_tokens(generation_config: Any) -> list[int]:
    """Return the ids with which the model's own settings end a text, beside its tokenizer's one."""
    ids: int | list[int] | None = generation_config.eos_token_id
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else ids


def read_tokenizer(path: str, *, revision: str | None = None) -> Any:
    """Return the tokenizer beside a model.

    Raises:
        ConfigError: If there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError, KeyError, TypeError) as error:  # by what is missing or damaged
        raise ConfigError(
            f"policy.path: the tokenizer in {path!r} is missing or damaged "
            f"({type(error).__name__}: {error}). Save it into the model's folder."
        ) from error


def load_model(
    path: str, *, revision: str | None = None, dtype: str = "float32"
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from a folder or a hub id, cast once.

    Args:
        path: Folder or hub id.
        revision: The revision of a hub id.
        dtype: The precision of the frozen weights: 'float32', 'bfloat16' or 'float16'.

    Raises:
        ConfigError: If there is no causal language model with a tokenizer, or its weights are
            incomplete.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    config = read_config(path, revision=revision)
    tokenizer = read_tokenizer(path, revision=revision)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            config=config,
            dtype=DTYPES[dtype],
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"policy.path: the weights in {path!r} are missing or damaged: {error}"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(
            f"policy.path: the weights in {path!r} lack {len(missing)} tensors, first "
            f"{missing[0]}: they are not those of a whole causal language model."
        )
    return model, tokenizer


def prompt_limit(config: Any, *, max_new_tokens: int, max_prompt_tokens: int | None) -> int:
    """Return how many tokens a prompt may have, so that it and a response fit into the context.

    Args:
        config: The configuration of the model.
        max_new_tokens: The largest number of tokens in a response.
        max_prompt_tokens: A smaller limit; by default all that is left.

    Raises:
        ConfigError: If the context is too short.
    """
    context: int = config.get_text_config().max_position_embeddings
    if context <= max_new_tokens:
        raise ConfigError(
            f"generation.max_new_tokens: should be less than the model's context of {context} "
            f"tokens. Found {max_new_tokens}."
        )
    left = context - max_new_tokens
    if max_prompt_tokens is None:
        return left
    if not 0 < max_prompt_tokens <= left:
        raise ConfigError(
            f"generation.max_prompt_tokens: should be from 1 to {left}: the model's context of "
            f"{context} tokens less generation.max_new_tokens = {max_new_tokens}. "
            f"Found {max_prompt_tokens}."
        )
    return max_prompt_tokens


def check_fit(
    path: str,
    *,
    revision: str | None = None,
    max_new_tokens: int,
    max_prompt_tokens: int | None = None,
    target_modules: Sequence[str] | None = None,
    chat: bool | None = None,
    prompts: Sequence[str] = (),
) -> None:
    """Check settings against a model's configuration and tokenizer, before its weights are read.

    Args:
        path: Folder or hub id.
        revision: The revision of a hub id.
        max_new_tokens: As for ``CausalLMPolicy``.
        max_prompt_tokens: As for ``CausalLMPolicy``.
        target_modules: As for ``CausalLMPolicy``.
        chat: As for ``CausalLMPolicy``.
        prompts: The prompts that must not be too long.

    Raises:
        ConfigError: If there is no causal language model with a tokenizer, or a setting or a
            prompt does not fit it.
        ValueError: If ``target_modules`` name no layer.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(path, revision=revision)
    limit = prompt_limit(config, max_new_tokens=max_new_tokens, max_prompt_tokens=max_prompt_tokens)
    dialogue = Dialogue(
        read_tokenizer(path, revision=revision),
        chat=chat,
        max_prompt_tokens=limit,
        max_new_tokens=max_new_tokens,
    )
    for prompt in prompts:
        dialogue.prompt(prompt)
    if target_modules is not None:
        with torch.device("meta"):
            lora.check_targets(AutoModelForCausalLM.from_config(config), target_modules)


def checkpoint_layers(model: nn.Module) -> None:
    """Have every decoder layer keep its inputs alone, and compute the rest once more.

    transformers does so in training mode only, in which dropout acts.

    Raises:
        ValueError: If the model is not made of such layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **options)
            return checkpoint(forward, *args, use_reentrant=False, **options)

        return call

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            "Parameter `gradient_checkpointing` should be false, as "
            f"{type(model).__name__} has no layers made for it. Found true."
        )
    for layer in layers:
        layer.forward = wrapped(layer.forward)
