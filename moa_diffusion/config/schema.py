"""The dataclasses that mirror the YAML, with every default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


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
class PromptFileConfig:
    """One of several prompt files.

    Args:
        path: The file, as where it stands alone.
        column: As prompts.column, which it is if null.
    """

    path: str
    column: str | None = None


@dataclass
class WeightedPromptFileConfig(PromptFileConfig):
    """One of several prompt files to train on.

    Args:
        path: The file, as where it stands alone.
        column: As prompts.column, which it is if null.
        weight: Draws from this file, relative to those from the others, whatever their sizes.
    """

    weight: float = 1.0


@dataclass
class PromptsConfig:
    """What to draw.

    Args:
        train: Prompt file (.txt, .jsonl, .csv, .tsv); "tiny" is the set shipped with the package.
            Or a list of files and of {path, weight, column}: a weight of 2 draws from a file twice
            as often as one of 1, the default, does.
        heldout: Prompt file of the evaluation; "tiny" likewise. Or a list of files and of {path,
            column}: all are drawn, the first prompts of each first.
        column: Key or column of the prompt in .jsonl, .csv and .tsv.
    """

    train: str | list[str | WeightedPromptFileConfig] = "tiny"
    heldout: str | list[str | PromptFileConfig] | None = None
    column: str = "prompt"


@dataclass
class ObjectivesConfig:
    """From K rewards to one advantage.

    Args:
        method: A name of the README's table "Which weighting when".
        calibration: A calibration.json, whose levels become the base and the targets of methods
            that have such options.
        normalizer: Options of the method's normalizer.
        weighting: Options of the method's weighting.
    """

    method: str = "dual_stage"
    calibration: str | None = None
    normalizer: dict[str, Any] = field(default_factory=dict)
    weighting: dict[str, Any] = field(default_factory=dict)


@dataclass
class GradientsConfig:
    """When the objectives' own gradients are measured, for weightings that need their Gramian.

    Args:
        mode: fused (inside every optimizer step's backward pass, weights solved at each), probe
            (one more pass over a part of the rollout), or auto: fused where the weighting depends
            on the gradients alone.
        every: Rollouts between two probes.
        share: Of the rollout's samples in a probe.
    """

    mode: Literal["auto", "fused", "probe"] = "auto"
    every: int = 1
    share: float = 0.25


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
        minutes: The run ends earlier once its rollouts, without evaluations, have taken this long;
            0 for no limit.
        groups: Prompts per rollout, over all processes.
        group_size: Samples per prompt.
        updates: Optimizer steps per rollout.
        sample_batch: At most this many samples per forward pass while sampling.
        micro_batch: At most this many samples per forward pass while training.
    """

    steps: int = 100
    minutes: float = 0.0
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
        front: At most this many kept besides for being on the front of the held-out rewards, of
            those that were evaluated.
    """

    every: int = 20
    keep: int = 5
    front: int = 10


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
        rollout_images: Images that are also drawn as rollouts draw them, for `alarm.gap`.
        rewards: Held-out reward heads, as in rewards: they are asked here alone and never trained
            on, so that `alarm` can tell when the rewards that are get gamed.
    """

    every: int = 20
    images_per_prompt: int = 1
    prompts: int = 0
    steps: int = 40
    guidance: float = 4.5
    seed: int = 0
    pictures: int = 16
    rollout_images: int = 8
    rewards: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class AlarmConfig:
    """What evaluations set off: training rewards up, a held-out reward down, drifting outputs.

    Args:
        action: What the first does: warn, stop the run, raise_kl (its weight times kl_factor), or
            rollback to the held-out reward's best evaluation (with raise_kl, where there is KL).
        patience: Evaluations in a row.
        z: Standard errors, over prompts, by which a held-out reward is below its best.
        kl_factor: Of the KL's weight, each time.
        limit: Alarms acted upon, before the next ends the run.
        drift: Standard deviations of the base model's outputs by which the mean of an output
            statistic moves before a warning; 0 for none.
        gap: The same by which deployed outputs score above rollouts; 0 for none.
    """

    action: Literal["warn", "stop", "raise_kl", "rollback"] = "warn"
    patience: int = 2
    z: float = 2.0
    kl_factor: float = 3.0
    limit: int = 3
    drift: float = 3.0
    gap: float = 1.0


@dataclass
class ScoringConfig:
    """How reward heads run.

    Args:
        overlap: Heads score a batch while the next one is drawn, each in a thread of its own.
        offload: Heads leave the accelerator while the policy is improved.
    """

    overlap: bool = True
    offload: bool = False


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
        scoring: How reward heads run.
        objectives: From K rewards to one advantage.
        gradients: When the objectives' own gradients are measured.
        loss: The policy-gradient surrogate.
        optimizer: AdamW and its schedule.
        ema: Average of the adapter.
        trainer: Length and geometry.
        checkpoint: Checkpoints.
        evaluation: Held-out rewards and pictures.
        alarm: What evaluations set off.
        log: Where numbers go.
    """

    output_dir: str = "runs/run"
    resume: str | None = None
    seed: int = 0
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rewards: dict[str, dict[str, Any]] = field(default_factory=dict)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    gradients: GradientsConfig = field(default_factory=GradientsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    log: LogConfig = field(default_factory=LogConfig)
