"""A configuration to a run that can begin."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from moa_diffusion import tiny
from moa_diffusion.assembly.agreement import check_same, facts
from moa_diffusion.assembly.batches import solve_geometry, unequal_batches
from moa_diffusion.assembly.construct import construct
from moa_diffusion.assembly.defaults import BOUNDS, flat, with_defaults
from moa_diffusion.assembly.learning_rate import learning_rate
from moa_diffusion.assembly.methods import check_ppo, is_fused, objectives, own_code
from moa_diffusion.assembly.models import (
    causal_lm,
    check_model,
    check_prompts,
    critic,
    policy,
    starting_adapter,
)
from moa_diffusion.assembly.outline import commands, outline, processes
from moa_diffusion.assembly.prompts import heldout_requests, train_prompts
from moa_diffusion.assembly.run_folder import run_folder, run_log, start_over, write_config
from moa_diffusion.assembly.scorers import RunScorers, evaluation, scorers, watcher
from moa_diffusion.config import Config
from moa_diffusion.data.preference_files import read_pairs, read_preferences
from moa_diffusion.data.preferences import Preferences
from moa_diffusion.data.sampling import GroupSampler
from moa_diffusion.distributed import AccelerateComm, Comm, agreed
from moa_diffusion.monitoring.alarm import Watch
from moa_diffusion.monitoring.console import Console, Facts
from moa_diffusion.monitoring.progress import Progress
from moa_diffusion.objectives.base import Weighting
from moa_diffusion.objectives.mopo_offline import OfflineSettings
from moa_diffusion.policies.base import Policy
from moa_diffusion.processes.launcher import check_launcher, make_accelerator, unused
from moa_diffusion.storage import checkpoint
from moa_diffusion.storage.log import RunLog
from moa_diffusion.storage.trackers import TrackerError
from moa_diffusion.training.ema import EMA
from moa_diffusion.training.fused import FusedUpdate
from moa_diffusion.training.geometry import Geometry
from moa_diffusion.training.loop import Learner, Run
from moa_diffusion.training.offline import Cloning, OfflineTrainer, constrained
from moa_diffusion.training.stepper import GROWTH_INTERVAL, Stepper, first_scale
from moa_diffusion.training.steps import RolloutSteps
from moa_diffusion.training.trainer import Trainer
from moa_diffusion.training.update import NoProbe, PlainUpdate, Probe, Update
from moa_diffusion.types import ConfigError, Request
from rewards.suggestions import did_you_mean

logger = logging.getLogger(__name__)


def trainer(settings: Config, pipeline: Any = None) -> Run:
    """Build everything a run needs, checked in the order of what checking costs.

    Files and names come first, models last. With ``settings.resume`` the state is loaded.

    Args:
        settings: The configuration of a run on images; every section of it is used.
        pipeline: A ``StableDiffusion3Pipeline`` to train instead of ``policy.path``; taken over.

    Raises:
        ConfigError: For anything in the configuration that cannot be run.
        ImportError: If a chosen reward head or tracker needs a package that is not installed.
        ProcessError: On this process, if another one raises one of these.
    """
    accelerator = make_accelerator()
    comm = AccelerateComm(accelerator)
    with agreed(comm) as agree:
        if settings.preferences.given:
            raise ConfigError(
                "preferences: should be left out here: images are learned from rollouts, and "
                "scripts/train_lm.py is what learns from preferences. Found "
                f"{settings.preferences.data or settings.preferences.pairs}."
            )
        return _trainer(_begin(settings, accelerator, comm, agree, pipeline))


def text_trainer(settings: Config) -> Run:
    """Return a run that trains a language model: online, or from preferences where there are some.

    Raises:
        ConfigError: As ``trainer``.
        ImportError: As ``trainer``.
        ProcessError: As ``trainer``.
    """
    accelerator = make_accelerator()
    comm = AccelerateComm(accelerator)
    with agreed(comm) as agree:
        if settings.policy.name != "causal_lm":
            raise ConfigError(
                "policy.name: should be causal_lm; scripts/train_sd.py trains the others. Found "
                f"{settings.policy.name!r}."
            )
        beginning = _begin(settings, accelerator, comm, agree)
        return _offline_trainer(beginning) if settings.preferences.given else _trainer(beginning)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Beginning:
    """What every run has before it is known what learns in it."""

    settings: Config  # without ``resume`` where there was nothing to resume
    pipeline: Any  # in memory, or None
    accelerator: Accelerator
    comm: Comm
    agree: Callable[[], None]  # where processes learn of each other's errors
    resumed: Path | None  # checkpoint to go on from
    heldout: tuple[Request, ...]  # what evaluations draw
    watch: Watch

    def check_same(self, contents: Mapping[str, Any]) -> None:
        """Check that all processes have read the same.

        Args:
            contents: What was read, by the name that errors give it.

        Raises:
            ConfigError: If the processes differ.
        """
        contents = {**contents, "prompts.heldout": self.heldout}
        shared = facts(self.settings, self.resumed, contents)
        self.agree()
        check_same(self.comm, shared)
        if self.comm.rank == 0 and (options := unused(self.settings.policy.dtype)):
            logger.warning("Of `accelerate launch` is not used: %s.", "; ".join(options))


def _begin(
    settings: Config,
    accelerator: Accelerator,
    comm: Comm,
    agree: Callable[[], None],
    pipeline: Any = None,
) -> _Beginning:
    """Check what all runs have: the launcher, folders, held-out prompts, trackers, the adapter."""
    check_launcher(accelerator)
    resumed = run_folder(settings)
    if resumed is None:  # there was nothing to resume: it begins anew, from its adapter if any
        settings = dataclasses.replace(settings, resume=None)
    heldout = heldout_requests(settings)
    check_trackers(settings.log.trackers)
    check_model(settings, pipeline)
    starting_adapter(settings, pipeline, tell=False)  # read once more where it is needed
    return _Beginning(
        settings=settings,
        pipeline=pipeline,
        accelerator=accelerator,
        comm=comm,
        agree=agree,
        resumed=resumed,
        heldout=heldout,
        watch=watcher(settings, heldout),
    )


def _trainer(begun: _Beginning) -> Run:
    """Return the run that learns from rollouts."""
    settings, accelerator, comm = begun.settings, begun.accelerator, begun.comm
    prompts = train_prompts(settings)
    normalizer, weighting = objectives(settings)
    check_ppo(settings)
    if settings.policy.name == "causal_lm":
        texts = [prompt.text for prompt in prompts.prompts]
        check_prompts(settings, [*texts, *(request.prompt for request in begun.heldout)])
    geometry = solve_geometry(settings, comm.world_size)
    begun.check_same({"prompts.train": prompts.sets, **own_code(settings)})
    if comm.rank == 0 and (problem := unequal_batches(settings, geometry)) is not None:
        logger.warning("%s `policy/ratio_gap` shows by how much.", problem)
    scoring = scorers(settings, comm, trained=prompts.prompts, heldout=begun.heldout)
    model = policy(settings, accelerator.device, begun.pipeline)
    log = run_log(settings, accelerator)
    progress = Progress(comm, bars=accelerator.is_main_process and sys.stderr.isatty())
    learner = Trainer(
        scorer=scoring.training,
        sampler=GroupSampler(
            prompts,
            groups=geometry.groups,
            group_size=geometry.group_size,
            seed=settings.seed,
            shared_start=settings.sampling.shared_start,
        ),
        normalizer=normalizer,
        weighting=weighting,
        update=update(settings, model, weighting, geometry, progress, accelerator),
        rollouts=settings.trainer.steps,
        log=log,
        critic=critic(settings, model, comm, accelerator.device, geometry.sample_batch),
    )
    learned = [("Rollout", geometry.describe())]
    if len(prompts.sets) > 1:
        learned.append(("Prompts", prompts.describe()))
    return _run(begun, learner, scoring, log, geometry.sample_batch, learned)


def _offline_trainer(begun: _Beginning) -> Run:
    """Return the run that learns from preferences."""
    settings, accelerator, comm = begun.settings, begun.accelerator, begun.comm
    data = preferences(settings)
    check_prompts(settings, [*data.prompts, *(request.prompt for request in begun.heldout)])
    options = dict(settings.objectives.weighting)
    primary, bounds = options.pop("primary", None), options.pop("bounds", BOUNDS)
    primary = data.objectives[0] if primary is None else primary
    chosen = construct(OfflineSettings, "objectives.weighting", options, {})
    try:
        mopo = constrained(data, primary, bounds, chosen)
    except ValueError as error:
        raise ConfigError(f"objectives.weighting: {error}") from error
    begun.check_same({"preferences": data.digest()})
    scoring = scorers(settings, comm, trained=(), heldout=begun.heldout)
    model = causal_lm(settings, accelerator.device)
    log = run_log(settings, accelerator)
    learner = OfflineTrainer(
        cloning=Cloning(
            policy=model,
            stepper=stepper(settings, model, accelerator),
            data=data,
            comm=comm,
            micro_batch=settings.trainer.micro_batch,
        ),
        mopo=mopo,
        progress=Progress(comm, bars=accelerator.is_main_process and sys.stderr.isatty()),
        seed=settings.seed,
        batch=settings.preferences.batch,
        level_prompts=settings.preferences.level_prompts,
        from_adapter=settings.policy.adapter is not None,
    )
    learned = [
        (
            "Preferences",
            f"{len(data.prompts)} prompts with {len(data.rows())} responses; "
            f"{settings.preferences.batch} per step",
        )
    ]
    return _run(begun, learner, scoring, log, settings.trainer.sample_batch, learned)


def _run(
    begun: _Beginning,
    learner: Learner,
    scoring: RunScorers,
    log: RunLog,
    batch: int,
    learned: Facts,
) -> Run:
    """Return the run around a learner, its state loaded and its folder written.

    Evaluations draw ``batch`` samples at a time; ``learned`` says what is learned from.
    """
    settings = begun.settings
    console = Console(
        shown=begun.accelerator.is_main_process,
        title=learner.title,
        total=settings.trainer.steps,
        commands=commands(settings),
    )
    run = Run(
        learner,
        length=settings.trainer,
        checkpoints=settings.checkpoint,
        evaluate_every=settings.evaluation.every,
        heldout=evaluation(
            settings,
            scoring,
            policy=learner.policy,
            log=log,
            batch=batch,
            progress=learner.progress,
        ),
        watch=begun.watch,
        log=log,
        console=console,
        folder=Path(settings.output_dir),
        seed=settings.seed,
    )
    if begun.resumed is not None:
        run.load_state_dict(checkpoint.load_state(begun.resumed))
        logger.info("Resumed from %s after %d %s.", begun.resumed, run.completed, learner.title)
    begun.agree()  # every process has its model and its state
    if not begun.accelerator.is_main_process:
        return run
    if begun.resumed is None:
        start_over(run.folder)
    used = with_defaults(settings)
    write_config(used)
    try:
        log.start_trackers(flat(used))
    except TrackerError as error:
        raise ConfigError(f"log.trackers: {error}") from error
    console.begin(
        outline(
            settings,
            model=learner.policy,
            heads=scoring.everyone.heads,
            learned=learned,
            heldout=len(begun.heldout),
            placed=processes(begun.comm, begun.accelerator.device),
            completed=run.completed,
            title=learner.title,
        )
    )
    return run


def preferences(settings: Config) -> Preferences:
    """Return the responses to learn from.

    Raises:
        ConfigError: For anything wrong in the files.
    """
    options = settings.preferences
    cycles, smoothing = options.cycles, options.smoothing
    try:
        if options.data is not None:
            shipped = tiny.PREFERENCES_PATH if options.data == "tiny" else options.data
            return read_preferences(shipped, options.objectives, cycles=cycles, smoothing=smoothing)
        return read_pairs(options.pairs, cycles=cycles, smoothing=smoothing)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"preferences: {error}") from error


def update(
    settings: Config,
    model: Policy,
    weighting: Weighting,
    geometry: Geometry,
    progress: Progress,
    accelerator: Accelerator,
) -> Update:
    """Make the update: AdamW, EMA and loss of the adapter, and when objectives are weighed.

    Args:
        settings: The run's configuration: ``optimizer``, ``ema``, ``loss`` and ``gradients``.
        model: The policy whose adapter is trained.
        weighting: Decides by what it looks at whether gradients are measured.
        geometry: How a rollout is cut into minibatches and micro-batches.
        progress: How far the run is.
        accelerator: Says on which device and in which precision gradients are scaled.

    Raises:
        ConfigError: If the weighting cannot be asked as often as the configuration wants.
    """
    fused = is_fused(settings, weighting)
    steps = RolloutSteps(
        policy=model,
        stepper=stepper(settings, model, accelerator),
        geometry=geometry,
        settings=settings.loss,
        progress=progress,
        seed=settings.seed,
    )
    if fused:
        return FusedUpdate(steps)
    needs = weighting.needs_gramian
    return PlainUpdate(steps, Probe(steps, settings.gradients) if needs else NoProbe())


def stepper(settings: Config, model: Policy, accelerator: Accelerator) -> Stepper:
    """Return what every optimizer step needs: AdamW, its rate, the loss scale and EMA.

    Args:
        settings: The run's configuration: ``optimizer``, ``ema``, ``policy.dtype``,
            ``loss.max_skipped``, and the number of optimizer steps.
        model: The policy whose trainable parameters are optimized.
        accelerator: Says on which device gradients are scaled.
    """
    options = settings.optimizer
    each = 1 if settings.preferences.given else settings.trainer.updates
    return Stepper(
        policy=model,
        optimizer=torch.optim.AdamW(
            list(model.trainable().values()),
            lr=options.lr,
            eps=options.eps,
            betas=(options.betas[0], options.betas[1]),
            weight_decay=options.weight_decay,
        ),
        lr=learning_rate(options, settings.trainer.steps * each),
        scaler=torch.amp.GradScaler(
            accelerator.device.type,
            init_scale=first_scale(model.dimensions),
            growth_interval=GROWTH_INTERVAL,
            enabled=settings.policy.dtype == "float16",
        ),
        ema=EMA(model.trainable(), decay=settings.ema.decay, every=settings.ema.every),
        max_grad_norm=options.max_grad_norm,
        max_skipped=settings.loss.max_skipped,
    )


def check_trackers(names: Sequence[str]) -> None:
    """Find out before the models load whether every tracker is known and installed.

    Raises:
        ConfigError: Naming the nearest known tracker, or the package to install.
    """
    known = [str(kind) for kind in LoggerType if str(kind) != "all"]
    installed = [str(kind) for kind in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"log.trackers: unknown tracker {name!r}.{did_you_mean(name, known)} "
                f"Known: {', '.join(sorted(known))}."
            )
        if name not in installed:
            raise ConfigError(
                f"log.trackers: {name!r} needs a package that is not installed: pip install {name}"
            )
