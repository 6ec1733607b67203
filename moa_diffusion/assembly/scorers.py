"""Reward heads, and what watches them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moa_diffusion.config import Config
from moa_diffusion.data.prompt_files import Prompt
from moa_diffusion.distributed import Comm
from moa_diffusion.monitoring import alarm
from moa_diffusion.monitoring.alarm import Watch
from moa_diffusion.monitoring.heldout import HeldOut
from moa_diffusion.monitoring.progress import Progress
from moa_diffusion.policies.base import Policy
from moa_diffusion.scoring import (
    RewardError,
    RewardHead,
    Scorer,
    UnknownOption,
    cause_of,
    create_head,
    defaults_of_head,
)
from moa_diffusion.storage.log import RunLog
from moa_diffusion.types import ConfigError, Request
from rewards.suggestions import did_you_mean

_COMMON = ("weight", "head", "path")  # what every reward may say beside its head's options


def heads(settings: Config, section: str = "rewards") -> dict[str, RewardHead]:
    """Return one reward head per objective, or per held-out reward.

    Args:
        settings: The configuration.
        section: ``rewards`` or ``evaluation.rewards``.

    Raises:
        ConfigError: Naming the objective, for an unknown head, import path or option.
    """
    built = {}
    chosen = settings.rewards if section == "rewards" else settings.evaluation.rewards
    for name, options in chosen.items():
        rest = {key: value for key, value in options.items() if key not in _COMMON}
        with _errors_of(f"{section}.{name}"):
            head = create_head(*_place(name, options), **rest)
        wanted = "texts" if settings.policy.name == "causal_lm" else "images"
        if head.scores not in (wanted, "both"):
            raise ConfigError(
                f"{section}.{name}: should score {wanted}, which is what policy.name "
                f"{settings.policy.name} makes. Found a head for {head.scores}."
            )
        head.name = name
        built[name] = head
    return built


def all_options(key: str, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a reward's options with the defaults of its head; those of a function as they are.

    Args:
        key: Dotted key of the reward, for errors.
        name: Name of the reward.
        options: The options that are given.

    Raises:
        ConfigError: Naming the key, for an unknown head or import path.
    """
    with _errors_of(key):
        return {**defaults_of_head(*_place(name, options)), **options}


def _place(name: str, options: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return name and import path of a reward's head."""
    if "head" in options and "path" in options:
        raise ValueError("should have `head` or `path`. Found both.")
    return options.get("head", name), options.get("path")


@contextmanager
def _errors_of(key: str) -> Iterator[None]:
    """Report what is wrong with a reward under its key."""
    try:
        yield
    except UnknownOption as error:
        valid = (*error.valid, *_COMMON)
        raise ConfigError(
            f"{key}: unknown option {error.option!r}.{did_you_mean(error.option, valid)} "
            f"Valid: {', '.join(valid)}."
        ) from error
    except ImportError:  # it names the package, and is no fault of the configuration
        raise
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error
    except Exception as error:  # the code of a user may raise anything
        raise ConfigError(f"{key}: {cause_of(error)}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class RunScorers:
    """What scores in a run, and what evaluations have scored."""

    heldout: tuple[Request, ...]  # what evaluations draw; empty for none
    everyone: Scorer  # all heads, those included that nobody trains on
    training: Scorer  # the heads of the objectives


def scorers(
    settings: Config, comm: Comm, *, trained: Sequence[Prompt], heldout: Sequence[Request]
) -> RunScorers:
    """Make the reward heads, and what runs them.

    Args:
        settings: The configuration.
        comm: The collectives over the processes.
        trained: The prompts that the objectives are scored on.
        heldout: The requests that evaluations draw; empty for none.

    Raises:
        ConfigError: As ``heads``, or if a head cannot use the prompts.
    """
    options = {"overlap": settings.scoring.overlap, "offload": settings.scoring.offload}
    training = heads(settings)
    watched = heads(settings, "evaluation.rewards")
    prompts = [Prompt(text=request.prompt, metadata=request.metadata) for request in heldout]
    check_requirements("rewards", training, [*trained, *prompts])
    check_requirements("evaluation.rewards", watched, prompts)
    return RunScorers(
        heldout=tuple(heldout),
        everyone=Scorer(training | watched, comm, **options),
        training=Scorer(training, comm, **options),
    )


def check_requirements(
    section: str, chosen: Mapping[str, RewardHead], prompts: Sequence[Prompt]
) -> None:
    """Find out before anything is drawn whether prompts have what heads need of them.

    Args:
        section: Section of the configuration that the heads are from.
        chosen: Heads by the reward's name.
        prompts: The prompts whose samples they will judge.

    Raises:
        ConfigError: Naming the reward and what is missing, such as a key of the metadata.
    """
    for name, head in chosen.items():
        try:
            head.check_prompts([p.text for p in prompts], [p.metadata for p in prompts])
        except RewardError as error:
            raise ConfigError(f"{section}.{name}: {error.cause}") from error


def watcher(settings: Config, heldout: Sequence[Request]) -> Watch:
    """Return what looks at the evaluations for rewards that are being gamed.

    Args:
        settings: The configuration.
        heldout: The requests that evaluations draw; empty for none.

    Raises:
        ConfigError: If the rules cannot be kept.
    """
    names = tuple(settings.evaluation.rewards)
    try:
        alarm.check(
            settings.alarm,
            names if heldout else (),
            kl_weight=settings.loss.kl_weight,
            prompts=len({request.prompt for request in heldout}),
        )
    except ValueError as error:
        raise ConfigError(f"alarm: {error}") from error
    return Watch(tuple(settings.rewards), names, settings.alarm)


def evaluation(
    settings: Config,
    scorers: RunScorers,
    *,
    policy: Policy,
    log: RunLog,
    batch: int,
    progress: Progress,
) -> HeldOut | None:
    """Return the evaluation during training; None if nothing is drawn, or no head scores it.

    Args:
        settings: The configuration.
        scorers: The scorer of all heads, and the held-out requests.
        policy: Draws the held-out requests, deterministically.
        log: Where every sample's rewards go.
        batch: Samples per forward pass.
        progress: How far the run is, its seconds and its progress bars.
    """
    if not scorers.heldout or not scorers.everyone.names:
        return None
    chosen = settings.evaluation
    if settings.preferences.given:  # nothing is drawn as rollouts are
        chosen = dataclasses.replace(chosen, rollout_images=0)
    if chosen.resolution == settings.sampling.resolution:
        chosen = dataclasses.replace(chosen, resolution=None)
    return HeldOut(
        scorers.heldout,
        settings=chosen,
        drawing=json.dumps(
            [
                chosen.steps,
                chosen.guidance,
                settings.deployed_resolution,
                vars(settings.generation),
                *([] if chosen.solver == "euler" else [chosen.solver]),
            ]
        ),
        policy=policy,
        scorer=scorers.everyone,
        training=scorers.training,
        batch=batch,
        log=log,
        progress=progress,
    )
