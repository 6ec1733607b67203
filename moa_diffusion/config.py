"""The configuration: dataclasses that mirror the YAML, strict about every key and value.

``parse`` reads ``--config FILE`` and dotted overrides (``--trainer.steps 5``) through
jsonargparse. Nothing here builds anything: classes take flat keyword arguments and work without
a configuration.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from moa_diffusion.types import ConfigError


@dataclass
class LoraConfig:
    """The trained adapter.

    Args:
        rank: Rank of the update.
        alpha: Scale numerator (the update is multiplied by alpha / rank); the rank if null.
        target_modules: Suffixes of the linear layers that get an adapter; the eight attention
            projections if null.
    """

    rank: int = 32
    alpha: int | None = None
    target_modules: list[str] | None = None


@dataclass
class PolicyConfig:
    """The model.

    Args:
        name: Kind of policy: sd3 (Stable Diffusion 3 and 3.5) or toy (a Gaussian, for tests).
        path: Folder or hub id of the pipeline; "tiny" is the one shipped with the package.
        revision: Revision of a hub id.
        dtype: Of the frozen weights and the forward pass; the adapter is always float32.
        vae_dtype: Of the image decoder.
        gradient_checkpointing: Recompute activations in the backward pass.
        max_sequence_length: T5 tokens per prompt.
        step_batch: Trained steps of a sample per forward pass; more is faster on small models.
        vae_batch: Images decoded at a time.
        embeds_dir: Folder of a disk cache for prompt embeddings.
        embeds_memory_gb: Limit of their memory cache, in GB.
        lora: The trained adapter.
    """

    name: Literal["sd3", "toy"] = "sd3"
    path: str = "tiny"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    max_sequence_length: int = 128
    step_batch: int = 1
    vae_batch: int = 8
    embeds_dir: str | None = None
    embeds_memory_gb: float = 8.0
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class SamplingConfig:
    """How rollouts are drawn.

    Args:
        resolution: Side of the square images, in pixels.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale; 1 switches it off and halves the cost.
        sampler: Stochastic step.
        noise_level: Of the stochastic step.
        shared_start: Whether the samples of a group start from the same noise.
        window: Trained steps per rollout; 0 trains all but the last.
        window_mode: Where the window lies: drawn per rollout, sliding to clean, or at the start.
        window_stay: Rollouts at each place of a sliding window.
    """

    resolution: int = 512
    steps: int = 10
    guidance: float = 4.5
    sampler: Literal["flow_sde", "cps"] = "flow_sde"
    noise_level: float = 0.7
    shared_start: bool = False
    window: int = 0
    window_mode: Literal["random", "slide", "first"] = "random"
    window_stay: int = 25


@dataclass
class PromptsConfig:
    """What to draw.

    Args:
        train: Prompt file (.txt, .jsonl, .csv, .tsv); "tiny" is the set shipped with the package.
        heldout: Prompt file of the evaluation; "tiny" likewise.
        column: Key or column of the prompt in .jsonl, .csv and .tsv.
    """

    train: str = "tiny"
    heldout: str | None = None
    column: str = "prompt"


@dataclass
class ObjectivesConfig:
    """From K rewards to one advantage.

    Args:
        method: static (weighted sum of raw rewards, normalised once), gdpo, dual_stage, or ddpo
            (per-prompt history).
        normalizer: Options of the method's normalizer.
        weighting: Options of the method's weighting.
    """

    method: str = "dual_stage"
    normalizer: dict[str, Any] = field(default_factory=dict)
    weighting: dict[str, Any] = field(default_factory=dict)


@dataclass
class LossConfig:
    """The policy-gradient surrogate.

    Args:
        clip_range: Of the probability ratio. Log-probs are means over latent dimensions, so
            useful values are about 1e-4.
        advantage_clip: Advantages are cut at plus and minus this.
        kl_weight: Weight of the KL to the base model; 0 leaves the base model out.
        kl: Kind of KL.
        ratio_tolerance: Largest absolute log ratio of the on-policy check at the start; half
            the clip range if null.
        max_skipped: Consecutive updates with non-finite gradients before the run stops.
    """

    clip_range: float = 1e-4
    advantage_clip: float = 5.0
    kl_weight: float = 0.0
    kl: Literal["gaussian", "dt_free", "velocity"] = "gaussian"
    ratio_tolerance: float | None = None
    max_skipped: int = 5


@dataclass
class OptimizerConfig:
    """AdamW and its schedule.

    Args:
        lr: Learning rate.
        betas: AdamW's two decay rates.
        weight_decay: AdamW's weight decay.
        max_grad_norm: Gradients are clipped to this norm.
        warmup: Optimizer steps of linear warm-up.
    """

    lr: float = 3e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    warmup: int = 0


@dataclass
class EmaConfig:
    """Average of the adapter, which evaluation and deployment use.

    Args:
        decay: In [0, 1); 0 follows the adapter.
        every: Optimizer steps between two updates of the average.
    """

    decay: float = 0.9
    every: int = 8


@dataclass
class TrainerConfig:
    """Length and geometry; micro-batches are solved for the processes there are.

    Args:
        steps: Rollouts of the whole run.
        groups: Prompts per rollout, over all processes.
        group_size: Samples per prompt.
        updates: Optimizer steps per rollout.
        sample_batch: At most this many samples per forward pass while sampling.
        micro_batch: At most this many samples per forward pass while training.
    """

    steps: int = 100
    groups: int = 48
    group_size: int = 24
    updates: int = 2
    sample_batch: int = 16
    micro_batch: int = 16


@dataclass
class CheckpointConfig:
    """Checkpoints; one is always written at the end.

    Args:
        every: Rollouts between two checkpoints; 0 for none but on failure or SIGTERM.
        keep: Newest checkpoints kept; 0 keeps all.
    """

    every: int = 20
    keep: int = 5


@dataclass
class EvaluationConfig:
    """Held-out rewards and pictures during training: averaged weights, deterministic sampling.

    Args:
        every: Rollouts between two evaluations; 0 for none.
        images_per_prompt: Images of each held-out prompt.
        prompts: At most this many held-out prompts; 0 for all.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale.
        seed: Of the initial noise; equal for all runs, so that pictures can be compared.
        pictures: Images of the picture sheet in samples/; 0 for none.
    """

    every: int = 20
    images_per_prompt: int = 1
    prompts: int = 0
    steps: int = 40
    guidance: float = 4.5
    seed: int = 0
    pictures: int = 16


@dataclass
class LogConfig:
    """Where numbers go besides metrics.jsonl.

    Args:
        trackers: Names of accelerate's trackers (tensorboard, wandb, ...); empty for none.
        scores: Write every sample's rewards to scores/.
    """

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    scores: bool = True


@dataclass
class Config:
    """One training run.

    Args:
        output_dir: Folder of the run.
        resume: "latest", or a checkpoint folder; null starts a new run.
        seed: Of everything random.
        policy: The model.
        sampling: How rollouts are drawn.
        prompts: What to draw.
        rewards: By objective's name, its options: weight, head (a registered name, by default the
            objective's), path (an import path such as my_module:my_reward), and the head's own.
        objectives: From K rewards to one advantage.
        loss: The policy-gradient surrogate.
        optimizer: AdamW and its schedule.
        ema: Average of the adapter.
        trainer: Length and geometry.
        checkpoint: Checkpoints.
        evaluation: Held-out rewards and pictures.
        log: Where numbers go.
    """

    output_dir: str = "runs/run"
    resume: str | None = None
    seed: int = 0
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rewards: dict[str, dict[str, Any]] = field(default_factory=dict)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Read the command line (``sys.argv`` by default), check every key and value.

    Raises:
        ConfigError: naming the key, what was expected, and what was found.
        SystemExit: for ``--help`` and ``--print_config``.
    """
    from jsonargparse import ArgumentParser

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments = _merge_open_mappings(arguments)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; later options override it.")
    parser.add_class_arguments(Config, None)
    try:
        namespace = parser.parse_args(arguments)
    except Exception as error:  # argparse and jsonargparse raise several kinds
        raise ConfigError(" ".join(str(error).split())) from error
    config = from_dict(namespace.as_dict())
    _check_nulls(config)
    check(config)
    return config


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file with dotted overrides (``["--seed", "1"]``)."""
    return parse(["--config", str(path), *overrides])


def from_dict(values: dict[str, Any]) -> Config:
    """Nested dictionaries to dataclasses; keys without a value keep their default."""
    built: Config = _build(Config, values)
    return built


def to_yaml(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that ``parse`` reads back."""
    text: str = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    return text


def check(config: Config) -> None:
    """Check every value's range.

    Raises:
        ConfigError: for the first value out of range.
    """
    at_least: dict[str, float] = {
        "policy.max_sequence_length": 1,
        "policy.step_batch": 1,
        "policy.vae_batch": 1,
        "policy.lora.rank": 1,
        "sampling.resolution": 1,
        "sampling.steps": 2,
        "sampling.guidance": 0,
        "sampling.window": 0,
        "sampling.window_stay": 1,
        "loss.kl_weight": 0,
        "loss.max_skipped": 1,
        "optimizer.weight_decay": 0,
        "optimizer.warmup": 0,
        "ema.every": 1,
        "trainer.steps": 1,
        "trainer.groups": 1,
        "trainer.group_size": 2,
        "trainer.updates": 1,
        "trainer.sample_batch": 1,
        "trainer.micro_batch": 1,
        "checkpoint.every": 0,
        "checkpoint.keep": 0,
        "evaluation.every": 0,
        "evaluation.images_per_prompt": 1,
        "evaluation.prompts": 0,
        "evaluation.steps": 1,
        "evaluation.guidance": 0,
        "evaluation.pictures": 0,
    }
    for key, bound in at_least.items():
        _require(config, key, lambda value, bound=bound: value >= bound, f"at least {bound}")
    for key in (
        "policy.embeds_memory_gb",
        "sampling.noise_level",
        "loss.clip_range",
        "loss.advantage_clip",
        "optimizer.lr",
        "optimizer.max_grad_norm",
    ):
        _require(config, key, lambda value: value > 0, "positive")
    _require(
        config,
        "loss.ratio_tolerance",
        lambda value: value is None or value > 0,
        "positive or null",
    )
    _require(config, "ema.decay", lambda value: 0 <= value < 1, "in [0, 1)")
    _require(
        config,
        "optimizer.betas",
        lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
        "two numbers in [0, 1)",
    )
    _require(config, "policy.lora.target_modules", lambda value: value != [], "a non-empty list")
    _require(
        config, "policy.lora.alpha", lambda value: value is None or value > 0, "positive or null"
    )
    _require(
        config,
        "sampling.window",
        lambda value: value < config.sampling.steps,
        f"less than sampling.steps = {config.sampling.steps} (the last step is not trained)",
    )
    if config.sampling.sampler == "cps":
        _require(config, "sampling.noise_level", lambda value: value <= 1, "at most 1 for cps")
    if config.evaluation.every:
        _require(
            config,
            "prompts.heldout",
            lambda value: value is not None,
            "a prompt file while evaluation.every is not 0",
        )
    _check_rewards(config.rewards)


def _check_rewards(rewards: dict[str, dict[str, Any]]) -> None:
    if not rewards:
        raise ConfigError(
            "rewards: should name at least one objective, such as `rewards: {ocr: {weight: 1}}`. "
            "Found none."
        )
    for name, options in rewards.items():
        key = f"rewards.{name}"
        if not isinstance(options, dict):
            raise ConfigError(f"{key}: should be a mapping of options. Found {options!r}.")
        weight = options.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ConfigError(f"{key}.weight: should be a number. Found {weight!r}.")
        if not math.isfinite(weight):
            raise ConfigError(f"{key}.weight: should be finite. Found {weight}.")
        for text in ("head", "path"):
            if not isinstance(options.get(text, ""), str):
                raise ConfigError(f"{key}.{text}: should be text. Found {options[text]!r}.")


def _require(config: Config, key: str, holds: Any, expectation: str) -> None:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}: should be finite. Found {value}.")
    if not holds(value):
        raise ConfigError(f"{key}: should be {expectation}. Found {value!r}.")


def _build(kind: Any, values: dict[str, Any]) -> Any:
    hints = get_type_hints(kind)
    arguments = {
        name: _build(hints[name], value)
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict)
        else value
        for name, value in values.items()
        if name in hints
    }
    return kind(**arguments)


def _merge_open_mappings(arguments: Sequence[str]) -> list[str]:
    """Check every key, and gather what is set below open mappings (``rewards``) into one option.

    jsonargparse lets ``--rewards.ocr.weight 2`` replace all other options of ``ocr``; here it
    changes the one.
    """
    rest: list[str] = []
    open_mappings: dict[str, dict[str, Any]] = {}
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        name, separator, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name.split("=")[0] in ("help", "print_config"):
            rest.append(argument)
            continue
        if not separator and queue and not queue[0].startswith("--"):
            value, separator = queue.pop(0), " "
        rest += [argument] if separator != " " else [argument, value]
        if name == "config":
            _check_mapping(values := _read_yaml(value))
            for key, mapping in _open_values(values):
                open_mappings[key] = _merge(open_mappings.get(key, {}), mapping)
            continue
        _check_key(name)
        opened = next((key for key in _OPEN if f"{name}.".startswith(f"{key}.")), None)
        if opened is not None:
            del rest[-1 if separator != " " else -2 :]
            nested = yaml.safe_load(value) if separator else None
            for part in reversed(name.removeprefix(opened).split(".")[1:]):
                nested = {part: nested}
            if not isinstance(nested, dict):
                raise ConfigError(f"{name}: should be a mapping. Found {nested!r}.")
            open_mappings[opened] = _merge(open_mappings.get(opened, {}), nested)
    return rest + [f"--{key}={json.dumps(mapping)}" for key, mapping in open_mappings.items()]


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _open_values(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Open mappings that a YAML file sets, by dotted key."""
    found = []
    for key in _OPEN:
        value: Any = values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            if not isinstance(value, dict):
                raise ConfigError(f"{key}: should be a mapping. Found {value!r}.")
            found.append((key, value))
    return found


def _read_yaml(name: str) -> dict[str, Any]:
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"config: should be a YAML file. Found no file `{name}`.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: `{name}` should be YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config: `{name}` should hold a mapping. Found {values!r}.")
    return values


def _check_mapping(values: dict[str, Any], kind: Any = None, prefix: str = "") -> None:
    """Check the keys of a YAML file, and that sections are mappings."""
    hints = get_type_hints(Config if kind is None else kind)
    for name, value in values.items():
        key = f"{prefix}{name}"
        _check_key(key)
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise ConfigError(f"{key}: should be a mapping of keys. Found {value!r}.")
            _check_mapping(value, hints[name], f"{key}.")


def _check_nulls(config: Any, prefix: str = "") -> None:
    hints = get_type_hints(type(config))
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            _check_nulls(value, f"{prefix}{name}.")
        elif value is None and type(None) not in get_args(hints[name]):
            raise ConfigError(f"{prefix}{name}: should have a value. Found null.")


def _check_key(key: str) -> None:
    """Walk the dataclasses along a dotted key; open mappings accept anything below them."""
    kind: Any = Config
    seen = ""
    for part in key.split("."):
        if not dataclasses.is_dataclass(kind):
            if get_origin(kind) is dict:
                return
            raise ConfigError(f"{key}: `{seen.rstrip('.')}` holds a value, not a mapping.")
        hints = get_type_hints(kind)
        if part not in hints:
            last = key.rsplit(".", 1)[-1]
            same = [known for known in _all_keys() if known.split(".")[-1] == last]
            near = same or difflib.get_close_matches(
                seen + part, [*(seen + name for name in hints), *_all_keys()], n=1, cutoff=0.5
            )
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ConfigError(
                f"{key}: unknown key.{hint} Valid keys here: {', '.join(sorted(hints))}."
            )
        kind, seen = hints[part], f"{seen}{part}."


def _all_keys(kind: Any = None, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in get_type_hints(Config if kind is None else kind).items():
        keys.append(f"{prefix}{name}")
        if dataclasses.is_dataclass(hint):
            keys += _all_keys(hint, f"{prefix}{name}.")
    return keys


def _open_keys() -> list[str]:
    return [key for key in _all_keys() if get_origin(_hint(key)) is dict]


def _hint(key: str) -> Any:
    kind: Any = Config
    for part in key.split("."):
        kind = get_type_hints(kind)[part]
    return kind


_OPEN = _open_keys()  # mappings that take any key
