"""The model and its value heads."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moa_diffusion import tiny
from moa_diffusion.assembly.methods import sampler_of
from moa_diffusion.assembly.run_folder import check_folder
from moa_diffusion.config import Config
from moa_diffusion.distributed import Comm
from moa_diffusion.policies import language_model, lora
from moa_diffusion.policies.adapters import (
    Adapter,
    read_sd3_adapter,
    read_text_adapter,
    sd3_skeleton,
    text_skeleton,
)
from moa_diffusion.policies.base import Policy
from moa_diffusion.policies.causal_lm import CausalLMPolicy
from moa_diffusion.policies.hub import check_place, check_reachable
from moa_diffusion.policies.sd3 import SD3Policy, check_fit, check_pipeline, load_pipeline
from moa_diffusion.policies.toy import ToyPolicy
from moa_diffusion.training.critic import Critic
from moa_diffusion.types import ConfigError

logger = logging.getLogger(__name__)


def policy(settings: Config, device: torch.device, pipeline: Any = None) -> Policy:
    """Return the model, on its device; the pipeline is loaded from ``policy.path`` if None.

    Args:
        settings: The run's configuration: ``policy`` chooses the kind and the model, and
            ``sampling``, ``generation`` and ``loss.kl`` say how it draws and compares.
        device: Where the model runs.
        pipeline: A ``StableDiffusion3Pipeline`` to take instead of loading one.

    Raises:
        ConfigError: If the path holds no model of the kind, or a setting does not fit it.
    """
    kl = settings.loss.kl or "gaussian"
    if settings.policy.name == "toy":
        return ToyPolicy(steps=settings.sampling.steps, kl=kl)
    if settings.policy.name == "causal_lm":
        return causal_lm(settings, device)
    assert settings.policy.name == "sd3"  # a new kind gets a branch of its own
    model, sampling = settings.policy, settings.sampling
    if model.shard and not dist.is_initialized():
        logger.warning("policy.shard: there is one process, so the transformer stays whole.")
        model = dataclasses.replace(model, shard=False)
    path = model_path(settings)
    if model.embeds_dir is not None:
        check_folder("policy.embeds_dir", Path(model.embeds_dir))
    try:
        if pipeline is None:
            check_fit(
                path,
                revision=model.revision,
                resolutions={
                    "sampling.resolution": sampling.resolution,
                    "evaluation.resolution": settings.deployed_resolution,
                },
                target_modules=model.lora.target_modules,
                attention=model.attention,
            )
        start = starting_adapter(settings, pipeline)
        if pipeline is None:
            pipeline = load_pipeline(
                path, revision=model.revision, dtype=model.dtype, vae_dtype=model.vae_dtype
            )
        built = SD3Policy(
            pipeline,
            settings=model,
            sampling=sampling,
            evaluation=settings.evaluation,
            loss=settings.loss,
            device=device,
            seed=settings.seed,
            source=_fingerprint(path, model.revision),
            turn=(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1),
            sampler=sampler_of(settings),
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"policy: {error}") from error
    if start is not None:
        lora.start_from(built.transformer, start.layers)
    return built


def check_model(settings: Config, pipeline: Any = None) -> None:
    """Find out at once whether the model can be had, before anything that takes longer.

    Args:
        settings: The run's configuration.
        pipeline: In the place of ``policy.path``, as for ``policy``.

    Raises:
        ConfigError: If there is no such folder, no such model on the hub, or no way to the hub.
    """
    chosen = settings.policy
    if pipeline is None and chosen.name != "toy":
        file = "config.json" if chosen.name == "causal_lm" else "model_index.json"
        check_reachable(model_path(settings), file, revision=chosen.revision)


def starting_adapter(
    settings: Config, pipeline: Any = None, *, tell: bool = True
) -> Adapter | None:
    """Return the LoRA that training starts from; None if it starts from the base model.

    Args:
        settings: The run's configuration; ``policy`` and ``resume`` decide.
        pipeline: In the place of ``policy.path``, as for ``policy``.
        tell: Whether to warn of layers that it leaves out; not where it is only checked.

    Raises:
        ConfigError: If there is none at ``policy.adapter``, or it does not fit the base model or
            the LoRA that is trained.
    """
    model = settings.policy
    if model.adapter is None or settings.resume is not None:  # its state comes later
        return None
    path, targets = model_path(settings), model.lora.target_modules
    if model.name == "causal_lm":
        skeleton = text_skeleton(path, revision=model.revision)
        targets = targets or lora.projections(skeleton)
        read = partial(read_text_adapter, model=skeleton, base=path)
    else:
        if pipeline is None:
            check_pipeline(path, revision=model.revision)
        shape = None if pipeline is None else pipeline.transformer.config
        skeleton = sd3_skeleton(path, revision=model.revision, config=shape)
        targets = targets or list(lora.ATTENTION)
        read = partial(read_sd3_adapter, transformer=skeleton)
    try:
        adapter = read(Path(model.adapter), tell=tell)
    except ConfigError as error:
        raise ConfigError(f"policy.adapter: {error}") from error
    if adapter.rank > model.lora.rank:
        raise ConfigError(
            f"policy.lora.rank: should be at least {adapter.rank}, the rank of policy.adapter. "
            f"Found {model.lora.rank}."
        )
    if others := [name for name in adapter.layers if not lora.adapts(targets, name)]:
        raise ConfigError(
            "policy.lora.target_modules: should name all layers of policy.adapter. Found none for "
            f"{others[0]}{f' and {len(others) - 1} more' if others[1:] else ''} in {targets}."
        )
    return adapter


def check_prompts(settings: Config, prompts: Sequence[str]) -> None:
    """Check that the settings fit a language model and no prompt is too long; load no weights.

    Raises:
        ConfigError: If a setting does not fit the model, or a prompt takes more tokens than it may.
    """
    generation = settings.generation
    try:
        language_model.check_fit(
            model_path(settings),
            revision=settings.policy.revision,
            max_new_tokens=generation.max_new_tokens,
            max_prompt_tokens=generation.max_prompt_tokens,
            target_modules=settings.policy.lora.target_modules,
            chat=generation.chat,
            prompts=prompts,
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"policy: {error}") from error


def causal_lm(settings: Config, device: torch.device) -> CausalLMPolicy:
    """Return a language model on its device.

    Raises:
        ConfigError: If the path holds none, or a setting does not fit it.
    """
    model = settings.policy
    start = starting_adapter(settings)
    loaded, tokenizer = language_model.load_model(
        model_path(settings), revision=model.revision, dtype=model.dtype
    )
    try:
        built = CausalLMPolicy(
            loaded,
            tokenizer,
            settings=model,
            generation=settings.generation,
            device=device,
            seed=settings.seed,
            features=settings.loss.kind == "ppo",
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"policy: {error}") from error
    if start is not None:
        lora.start_from(built.model, start.layers)
    return built


def model_path(settings: Config) -> str:
    """Return the folder or hub id of the model; "tiny" is the one shipped with the package.

    Raises:
        ConfigError: If what can only be a folder does not exist.
    """
    path = settings.policy.path
    shipped = tiny.LM_PATH if settings.policy.name == "causal_lm" else tiny.PIPELINE_PATH
    if path != "tiny":
        check_place(path)
    return str(shipped) if path == "tiny" else path


def critic(
    settings: Config, model: Policy, comm: Comm, device: torch.device, batch: int
) -> Critic | None:
    """Build the value heads for ``loss.kind: ppo``, which read ``batch`` samples at a time.

    Args:
        settings: The run's configuration; ``loss.kind`` decides whether there are value heads.
        model: The language model whose hidden states the heads read.
        comm: The collectives over the processes.
        device: Where the heads run.
        batch: Samples per pass of the heads.
    """
    if settings.loss.kind != "ppo":
        return None
    assert isinstance(model, CausalLMPolicy)
    return Critic(
        tuple(settings.rewards),
        settings.critic,
        width=model.model.config.get_text_config().hidden_size,
        comm=comm,
        device=device,
        seed=settings.seed,
        batch=batch,
    )


def _fingerprint(path: str, revision: str | None) -> str:
    """Return a name of a pipeline's text encoders.

    It is another one after files of a local folder have changed.
    """
    files = sorted(Path(path).glob("text_encoder*/*")) if Path(path).is_dir() else []
    stamps = [f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files]
    return f"{path}@{revision}:{','.join(stamps)}"
