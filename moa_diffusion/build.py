"""Configuration to objects: the only module that knows names and classes."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration

from moa_diffusion import alarm, checkpoint, config, tiny
from moa_diffusion.alarm import Watch
from moa_diffusion.config import Config
from moa_diffusion.config.schema import PromptFileConfig, WeightedPromptFileConfig
from moa_diffusion.data import (
    Geometry,
    GroupSampler,
    Mixture,
    Prompt,
    PromptSet,
    derive_seed,
    in_turn,
    read_prompts,
)
from moa_diffusion.distributed import AccelerateComm, Comm
from moa_diffusion.ema import EMA
from moa_diffusion.heldout import HeldOut
from moa_diffusion.metrics import RunLog
from moa_diffusion.objectives import calibration
from moa_diffusion.objectives.apex import Apex
from moa_diffusion.objectives.base import Normalizer, Weighting
from moa_diffusion.objectives.chebyshev import Chebyshev
from moa_diffusion.objectives.gradient import Gradient
from moa_diffusion.objectives.mopo import Mopo
from moa_diffusion.objectives.noon import Noon
from moa_diffusion.objectives.normalize import GDPO, DualStage, PromptHistory, Raw
from moa_diffusion.objectives.pama import Pama, PamaVector
from moa_diffusion.objectives.static import Static
from moa_diffusion.objectives.win_rate import WinRate
from moa_diffusion.policies.base import Policy
from moa_diffusion.policies.sd3 import SD3Policy, check_fit, load_pipeline
from moa_diffusion.policies.toy import ToyPolicy
from moa_diffusion.scoring import RewardHead, Scorer, create_head
from moa_diffusion.trainer import Gradients, Schedule, Trainer
from moa_diffusion.types import ConfigError, Request
from moa_diffusion.update import Surrogate, Updater

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A name's normalizer and weighting; ``options`` are the weighting's, fixed by the name."""

    normalizer: type[Normalizer]
    weighting: type[Weighting]
    options: Mapping[str, Any] = field(default_factory=dict)


def _torchjd(name: str, **options: Any) -> Method:
    fixed = {"aggregator": name} | ({"options": options} if options else {})
    return Method(normalizer=DualStage, weighting=Gradient, options=fixed)


METHODS = {
    "static": Method(normalizer=Raw, weighting=Static),
    "gdpo": Method(normalizer=GDPO, weighting=Static),
    "dual_stage": Method(normalizer=DualStage, weighting=Static),
    "ddpo": Method(normalizer=PromptHistory, weighting=Static),
    "apex": Method(normalizer=DualStage, weighting=Apex),
    "pama": Method(normalizer=Noon, weighting=Pama),
    "pama_vector": Method(normalizer=Noon, weighting=PamaVector),
    "mopo": Method(normalizer=WinRate, weighting=Mopo),
    "chebyshev": Method(normalizer=DualStage, weighting=Chebyshev),
    "upgrad": _torchjd("upgrad"),
    "mgda": _torchjd("mgda"),
    "pcgrad": _torchjd("pcgrad"),
    "cagrad": _torchjd("cagrad", c=0.5),  # TorchJD has no default; any value in [0, 1) converges
    "gradient": Method(normalizer=DualStage, weighting=Gradient),
}


def trainer(settings: Config, pipeline: Any = None) -> Trainer:
    """Everything a run needs, checked in the order of what checking costs.

    Files and names come first, models last. With ``settings.resume`` the state is loaded.

    Args:
        settings: the configuration.
        pipeline: a ``StableDiffusion3Pipeline`` to train instead of ``policy.path``; taken over.

    Raises:
        ConfigError: for anything in the configuration that cannot be run.
        ImportError: if a chosen reward head or tracker needs a package that is not installed.
    """
    folder = Path(settings.output_dir)
    resumed = run_folder(settings)
    prompts = train_prompts(settings)
    asked = heldout_requests(settings)
    normalizer, weighting = objectives(settings)
    check_trackers(settings.log.trackers)
    accelerator = make_accelerator(settings)
    comm = AccelerateComm(accelerator)
    geometry = solve_geometry(settings, comm.world_size)
    if comm.rank == 0:
        print(f"Processes: {comm.world_size} ({accelerator.device.type}). {geometry.describe()}")
        if len(prompts.sets) > 1:
            print(prompts.describe())
    watch = watcher(settings, asked)
    training = heads(settings)
    overlap, offload = settings.scoring.overlap, settings.scoring.offload
    scorer = Scorer(training, comm, overlap=overlap, offload=offload)
    everyone = Scorer(
        training | heads(settings, "evaluation.rewards"), comm, overlap=overlap, offload=offload
    )

    model = policy(settings, accelerator.device, pipeline)
    progress = accelerator.is_main_process
    log = RunLog(
        folder,
        accelerator=accelerator if settings.log.trackers else None,
        main=accelerator.is_main_process,
        scores=settings.log.scores,
    )
    heldout = HeldOut(
        asked,
        policy=model,
        scorer=everyone,
        training=scorer,
        comm=comm,
        batch=geometry.sample_batch,
        log=log,
        folder=folder,
        shown=settings.evaluation.pictures,
        as_rollouts=settings.evaluation.rollout_images,
        progress=progress,
    )
    built = Trainer(
        policy=model,
        scorer=scorer,
        normalizer=normalizer,
        weighting=weighting,
        sampler=GroupSampler(
            prompts,
            groups=geometry.groups,
            group_size=geometry.group_size,
            seed=settings.seed,
            shared_start=settings.sampling.shared_start,
        ),
        geometry=geometry,
        comm=comm,
        updater=updater(settings, model, geometry, comm, accelerator),
        gradients=gradients(settings, weighting),
        schedule=Schedule(
            steps=settings.trainer.steps,
            minutes=settings.trainer.minutes,
            checkpoint_every=settings.checkpoint.every,
            checkpoint_keep=settings.checkpoint.keep,
            checkpoint_front=settings.checkpoint.front,
            evaluate_every=settings.evaluation.every,
        ),
        heldout=heldout if asked else None,
        watch=watch,
        log=log,
        folder=folder,
        seed=settings.seed,
        progress=progress,
    )
    if resumed is not None:
        built.load_state_dict(checkpoint.load_state(resumed))
        logger.info("Resumed from %s after %d rollouts.", resumed, built.completed)
    comm.barrier()  # every process has looked for another run in the folder
    if progress:
        write_config(settings)
    if settings.log.trackers:
        accelerator.init_trackers("moa_diffusion", config=flat(settings))
    return built


def gradients(settings: Config, weighting: Weighting) -> Gradients:
    """When the objectives' gradients are measured.

    Raises:
        ConfigError: if they cannot be measured in the way that the configuration asks for.
    """
    options = settings.gradients
    if options.mode == "fused" and not weighting.from_gramian_alone:
        raise ConfigError(
            f"gradients.mode: should be probe or auto for the method {settings.objectives.method}, "
            "whose weights depend on more than the gradients. Found 'fused'."
        )
    fused = options.mode != "probe" and weighting.from_gramian_alone
    return Gradients(fused=fused, every=options.every, share=options.share)


def updater(
    settings: Config, model: Policy, geometry: Geometry, comm: Comm, accelerator: Accelerator
) -> Updater:
    """AdamW, EMA and the loss over the policy's adapter."""
    options, warmup = settings.optimizer, settings.optimizer.warmup
    tolerance = settings.loss.ratio_tolerance
    return Updater(
        policy=model,
        geometry=geometry,
        comm=comm,
        optimizer=torch.optim.AdamW(
            list(model.trainable().values()),
            lr=options.lr,
            betas=(options.betas[0], options.betas[1]),
            weight_decay=options.weight_decay,
        ),
        lr=lambda count: options.lr * min(1.0, (count + 1) / (warmup + 1)),
        scaler=torch.amp.GradScaler(
            accelerator.device.type, enabled=settings.policy.dtype == "float16"
        ),
        ema=EMA(model.trainable(), decay=settings.ema.decay, every=settings.ema.every),
        surrogate=Surrogate(
            clip_range=settings.loss.clip_range,
            advantage_clip=settings.loss.advantage_clip,
            kl_weight=settings.loss.kl_weight,
            max_grad_norm=options.max_grad_norm,
            ratio_tolerance=0.5 * settings.loss.clip_range if tolerance is None else tolerance,
            max_skipped=settings.loss.max_skipped,
        ),
        seed=settings.seed,
        progress=accelerator.is_main_process,
    )


def write_config(settings: Config) -> None:
    """Write ``config.yaml`` with all defaults; without ``resume``, so that it starts a run."""
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "config.yaml.tmp"
    partial.write_text(config.to_yaml(dataclasses.replace(settings, resume=None)), encoding="utf-8")
    partial.replace(folder / "config.yaml")


def run_folder(settings: Config) -> Path | None:
    """The checkpoint to resume from, or None for a new run in a folder without another run.

    Raises:
        ConfigError: if the folder holds another run, or there is no such checkpoint.
    """
    folder = Path(settings.output_dir)
    _check_folder("output_dir", folder)
    found = None if settings.resume is None else checkpoint.find(settings.resume, folder)
    if found is not None and found.resolve().parent.parent == folder.resolve():
        _report_changes(folder / "config.yaml", settings)
        return found
    # A config.yaml alone is what a run leaves that ended before its first result.
    traces = [name for name in ("metrics.jsonl", "checkpoints") if (folder / name).exists()]
    if traces:
        raise ConfigError(
            f"output_dir: should be a new folder. Found another run in `{folder}` "
            f"({', '.join(traces)}). Use another --output_dir, or continue with --resume latest."
        )
    return found


def _check_folder(key: str, folder: Path) -> None:
    """It need not exist, but has to be possible."""
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise ConfigError(f"{key}: should be a folder. Found the file `{part}`.")
    nearest = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: should be writable. Found `{nearest}`, which is not.")


def objectives(settings: Config) -> tuple[Normalizer, Weighting]:
    """The method's two parts.

    Raises:
        ConfigError: for an unknown method or option, or an option's bad value.
    """
    method = settings.objectives.method
    if method not in METHODS:
        raise ConfigError(
            f"objectives.method: unknown method {method!r}.{_nearest(method, METHODS)} "
            f"Known: {', '.join(METHODS)}."
        )
    chosen, names = METHODS[method], tuple(settings.rewards)
    normalizer = _construct(
        chosen.normalizer, "objectives.normalizer", settings.objectives.normalizer, names, {}
    )
    weights = [float(options.get("weight", 1.0)) for options in settings.rewards.values()]
    fixed = dict(chosen.options)
    accepted = inspect.signature(chosen.weighting).parameters
    if "weights" in accepted:
        fixed["weights"] = weights
    else:
        for name, weight in zip(names, weights, strict=True):
            if weight != 1:
                logger.warning(
                    "objectives.method %s finds its own weights: rewards.%s.weight = %g is not "
                    "used.",
                    *(method, name, weight),
                )
    options: dict[str, Any] = settings.objectives.weighting
    if settings.objectives.calibration is not None:
        levels = _calibrated(Path(settings.objectives.calibration), names, accepted, options)
        for key, values in levels.items():
            given = options.get(key, {})
            if isinstance(given, Mapping):  # not one number for all
                options = {**options, key: {**values, **given}}
    if len(names) == 1 and not issubclass(chosen.weighting, Static):
        logger.warning("objectives.method %s has a single reward to weigh.", method)
    weighting = _construct(chosen.weighting, "objectives.weighting", options, names, fixed)
    return normalizer, weighting


def _calibrated(
    path: Path, names: Sequence[str], accepted: Container[str], options: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Options that a calibration file supplies: base levels, levels to reach, bounds.

    Raises:
        ConfigError: if the file cannot be used, or lacks an objective.
    """
    measured = calibration.load(path).objectives
    for name in names:
        if name not in measured:
            raise ConfigError(
                f"objectives.calibration: `{path}` should have the objective {name!r}. "
                f"Found {', '.join(measured)}."
            )
    base = {n: measured[n].base for n in names if math.isfinite(measured[n].base)}
    # A reward without any spread has nothing to aim at.
    target = {n: measured[n].target for n in base if measured[n].target > measured[n].base}
    secondary = [name for name in base if name != options.get("primary", names[0])]
    in_units = options.get("units") == "reward"
    bounds = {n: measured[n].base if in_units else measured[n].bound for n in secondary}
    levels = {"base": base, "targets": target, "ideal": target, "bounds": bounds}
    used = {option: values for option, values in levels.items() if option in accepted}
    if not used:
        logger.warning("objectives.calibration: this method does not use it.")
    return used


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
            prompts=len({request.group for request in asked}),
        )
    except ValueError as error:
        raise ConfigError(f"alarm: {error}") from error
    return Watch(tuple(settings.rewards), heldout, rules)


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
        rest = {k: v for k, v in options.items() if k not in ("weight", "head", "path")}
        try:
            head = create_head(options.get("head", name), options.get("path"), **rest)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{section}.{name}: {error}") from error
        head.name = name
        built[name] = head
    return built


def policy(settings: Config, device: torch.device, pipeline: Any = None) -> Policy:
    """The model, on its device; the pipeline is loaded from ``policy.path`` if None.

    Raises:
        ConfigError: if the path holds no model of the kind, or a setting does not fit it.
    """
    if settings.policy.name == "toy":
        return ToyPolicy(steps=settings.sampling.steps, kl=settings.loss.kl)
    model, sampling = settings.policy, settings.sampling
    path = model_path(settings)
    if model.embeds_dir is not None:
        _check_folder("policy.embeds_dir", Path(model.embeds_dir))
    try:
        if pipeline is None:
            check_fit(
                path,
                revision=model.revision,
                resolution=sampling.resolution,
                target_modules=model.lora.target_modules,
            )
            pipeline = load_pipeline(
                path, revision=model.revision, dtype=model.dtype, vae_dtype=model.vae_dtype
            )
        return _sd3(settings, device, pipeline, source=_fingerprint(path, model.revision))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"policy: {error}") from error


def _sd3(settings: Config, device: torch.device, pipeline: Any, *, source: str) -> SD3Policy:
    model, sampling = settings.policy, settings.sampling
    return SD3Policy(
        pipeline,
        device=device,
        seed=settings.seed,
        source=source,
        lora_rank=model.lora.rank,
        lora_alpha=model.lora.alpha,
        target_modules=model.lora.target_modules,
        gradient_checkpointing=model.gradient_checkpointing,
        resolution=sampling.resolution,
        steps=sampling.steps,
        guidance=sampling.guidance,
        sampler=sampling.sampler,
        noise_level=sampling.noise_level,
        window=sampling.window,
        window_mode=sampling.window_mode,
        window_stay=sampling.window_stay,
        kl=settings.loss.kl,
        eval_steps=settings.evaluation.steps,
        eval_guidance=settings.evaluation.guidance,
        max_sequence_length=model.max_sequence_length,
        step_batch=model.step_batch,
        vae_batch=model.vae_batch,
        embeds_dir=None if model.embeds_dir is None else Path(model.embeds_dir),
        embeds_memory_gb=model.embeds_memory_gb,
    )


def model_path(settings: Config) -> str:
    """Folder or hub id of the pipeline; "tiny" is the one shipped with the package."""
    path = settings.policy.path
    return str(tiny.PIPELINE_PATH) if path == "tiny" else path


def train_prompts(settings: Config) -> Mixture:
    """What training draws from: the prompt sets of ``prompts.train`` and their weights.

    Raises:
        ConfigError: for a file that cannot be read.
    """
    return Mixture(
        [
            PromptSet(
                prompts=_read(file, "train", settings),
                weight=file.weight if isinstance(file, WeightedPromptFileConfig) else 1.0,
            )
            for file in _files(settings.prompts.train)
        ]
    )


def heldout_requests(settings: Config) -> tuple[Request, ...]:
    """What the evaluation draws: the same for every run with the same evaluation seed."""
    if not settings.evaluation.every or settings.prompts.heldout is None:
        return ()
    files = _files(settings.prompts.heldout)
    prompts = in_turn([_read(file, "heldout", settings) for file in files])
    prompts = prompts[: settings.evaluation.prompts or None]
    return tuple(
        Request(
            prompt=prompt.text,
            metadata=prompt.metadata,
            group=group,
            sibling=sibling,
            seed=derive_seed(settings.evaluation.seed, "heldout", group, sibling),
        )
        for sibling in range(settings.evaluation.images_per_prompt)
        for group, prompt in enumerate(prompts)
    )


def solve_geometry(settings: Config, world_size: int) -> Geometry:
    """How a rollout is cut over this many processes."""
    return Geometry.solve(
        groups=settings.trainer.groups,
        group_size=settings.trainer.group_size,
        updates=settings.trainer.updates,
        world_size=world_size,
        max_sample_batch=settings.trainer.sample_batch,
        max_micro_batch=settings.trainer.micro_batch,
    )


def make_accelerator(settings: Config) -> Accelerator:
    """Process group, device and trackers; mixed precision is the policy's own business."""
    folders = ProjectConfiguration(
        project_dir=settings.output_dir, logging_dir=f"{settings.output_dir}/trackers"
    )
    return Accelerator(
        log_with=list(settings.log.trackers) or None,
        project_config=folders,
        mixed_precision="no",
    )


def flat(settings: Config) -> dict[str, str | int | float | bool]:
    """Dotted keys to plain values, for trackers."""
    rows: dict[str, str | int | float | bool] = {}

    def walk(values: Mapping[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            else:
                plain = isinstance(value, (str, int, float, bool))
                rows[f"{prefix}{name}"] = value if plain else str(value)

    walk(dataclasses.asdict(settings), "")
    return rows


def _construct(
    kind: Any,
    key: str,
    options: Mapping[str, Any],
    names: tuple[str, ...],
    fixed: Mapping[str, Any],
) -> Any:
    valid = [name for name in inspect.signature(kind).parameters if name != "objectives"]
    valid = [name for name in valid if name not in fixed]
    for option in options:
        if option not in valid:
            raise ConfigError(
                f"{key}.{option}: unknown option of {kind.__name__}.{_nearest(option, valid)} "
                f"Valid: {', '.join(valid) or 'none'}."
            )
    try:
        return kind(names, **options, **fixed)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}: {error}") from error


def _nearest(name: str, known: Any) -> str:
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _fingerprint(path: str, revision: str | None) -> str:
    """Names a pipeline's text encoders; another one after files of a local folder changed."""
    files = sorted(Path(path).glob("text_encoder*/*")) if Path(path).is_dir() else []
    stamps = [f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files]
    return f"{path}@{revision}:{','.join(stamps)}"


def check_trackers(names: Sequence[str]) -> None:
    """Find out before the models load whether every tracker is known and installed.

    Raises:
        ConfigError: naming the nearest known tracker, or the package to install.
    """
    known = [str(kind) for kind in LoggerType if str(kind) != "all"]
    installed = [str(kind) for kind in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"log.trackers: unknown tracker {name!r}.{_nearest(name, known)} "
                f"Known: {', '.join(sorted(known))}."
            )
        if name not in installed:
            raise ConfigError(
                f"log.trackers: {name!r} needs a package that is not installed: pip install {name}"
            )


def _files(value: str | Sequence[str | PromptFileConfig]) -> Sequence[str | PromptFileConfig]:
    return [value] if isinstance(value, str) else value


def _read(file: str | PromptFileConfig, kind: str, settings: Config) -> tuple[Prompt, ...]:
    if isinstance(file, str):
        file = PromptFileConfig(path=file)
    path = tiny.PROMPTS_PATH / f"{kind}.txt" if file.path == "tiny" else Path(file.path)
    return read_prompts(path, column=file.column or settings.prompts.column)


def _report_changes(saved: Path, settings: Config) -> None:
    """Say which settings differ from those that the run began with."""
    if not saved.is_file():
        return
    before = flat(config.from_dict(yaml.safe_load(saved.read_text(encoding="utf-8"))))
    now = flat(settings)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key not in ("resume", "output_dir"):
            logger.warning(
                "Resuming with another %s: %s, was %s.", key, now.get(key), before.get(key)
            )
