"""Reward heads, and what watches them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from moa_diffusion import alarm
from moa_diffusion.alarm import Watch
from moa_diffusion.build.parts import nearest
from moa_diffusion.config import Config
from moa_diffusion.distributed import Comm
from moa_diffusion.heldout import HeldOut
from moa_diffusion.metrics import RunLog
from moa_diffusion.policies.base import Policy
from moa_diffusion.scoring import RewardHead, Scorer, UnknownOption, create_head
from moa_diffusion.types import ConfigError, Request

_COMMON = ("weight", "head", "path")  # what every reward may say beside its head's options


def heads(settings: Config, section: str = "rewards") -> dict[str, RewardHead]:
    """One reward head per objective, or per held-out reward.

    Args:
        settings: the configuration.
        section: ``rewards`` or ``evaluation.rewards``.

    Raises:
        ConfigError: naming the objective, for an unknown head, import path or option.
    """
    built = {}
    chosen = settings.rewards if section == "rewards" else settings.evaluation.rewards
    for name, options in chosen.items():
        if "head" in options and "path" in options:
            raise ConfigError(f"{section}.{name}: should have `head` or `path`. Found both.")
        rest = {key: value for key, value in options.items() if key not in _COMMON}
        try:
            head = create_head(options.get("head", name), options.get("path"), **rest)
        except UnknownOption as error:
            valid = (*error.valid, *_COMMON)
            raise ConfigError(
                f"{section}.{name}.{error.option}: unknown option.{nearest(error.option, valid)} "
                f"Valid: {', '.join(valid)}."
            ) from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{section}.{name}: {error}") from error
        wanted = "texts" if settings.policy.name == "causal_lm" else "images"
        if head.scores not in (wanted, "both"):
            raise ConfigError(
                f"{section}.{name}: should score {wanted}, which is what policy.name "
                f"{settings.policy.name} makes. Found a head for {head.scores}."
            )
        head.name = name
        built[name] = head
    return built


def scorers(settings: Config, comm: Comm) -> tuple[Scorer, Scorer]:
    """What runs all heads, held-out ones included, and what runs those of the objectives.

    Raises:
        ConfigError: as ``heads``.
    """
    options = {"overlap": settings.scoring.overlap, "offload": settings.scoring.offload}
    training = heads(settings)
    everyone = training | heads(settings, "evaluation.rewards")
    return Scorer(everyone, comm, **options), Scorer(training, comm, **options)


def watcher(settings: Config, asked: Sequence[Request]) -> Watch:
    """What looks at the evaluations for rewards that are being gamed.

    Args:
        settings: the configuration.
        asked: what evaluations draw.

    Raises:
        ConfigError: if the rules cannot be kept.
    """
    rules, heldout = alarm.Rules(**vars(settings.alarm)), tuple(settings.evaluation.rewards)
    try:
        alarm.check(
            rules,
            heldout if asked else (),
            kl_weight=settings.loss.kl_weight,
            prompts=len({request.prompt for request in asked}),
        )
    except ValueError as error:
        raise ConfigError(f"alarm: {error}") from error
    return Watch(tuple(settings.rewards), heldout, rules)


def evaluation(
    settings: Config,
    asked: Sequence[Request],
    model: Policy,
    everyone: Scorer,
    training: Scorer,
    comm: Comm,
    log: RunLog,
    batch: int,
    progress: bool,
) -> HeldOut | None:
    """The evaluation during training; None if nothing is asked, or nobody answers."""
    if not asked or not everyone.names:
        return None
    return HeldOut(
        asked,
        policy=model,
        scorer=everyone,
        training=training,
        comm=comm,
        batch=batch,
        log=log,
        folder=Path(settings.output_dir),
        drawing=json.dumps(
            [
                settings.evaluation.steps,
                settings.evaluation.guidance,
                settings.sampling.resolution,
                vars(settings.generation),
            ]
        ),
        shown=settings.evaluation.pictures,
        # Offline nothing is drawn as rollouts are, so there is nothing to compare with.
        as_rollouts=0 if settings.preferences.given else settings.evaluation.rollout_images,
        progress=progress,
    )
