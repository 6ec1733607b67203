"""The dataclasses that mirror the YAML, with every default and every range.

A value is checked wherever a section is made: from YAML, on the command line and in Python. Types
are strict (``"3"`` and ``3.0`` are no whole numbers), since a converted value is often a typo.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Interval, Len, MinLen
from pydantic import BeforeValidator, ConfigDict, Discriminator, Strict, Tag
from pydantic.dataclasses import dataclass

SAMPLERS = ("flow_sde", "cps")  # names that `sampling.sampler` may have

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Switch = Annotated[bool, Strict()]
Whole = Annotated[int, Strict()]
Natural = Annotated[int, Strict(), Ge(0)]
Count = Annotated[int, Strict(), Ge(1)]
NotNegative = Annotated[float, Strict(), Ge(0)]
Positive = Annotated[float, Strict(), Gt(0)]
Decay = Annotated[float, Strict(), Interval(ge=0, lt=1)]


@dataclass(config=_STRICT)
class LoraConfig:
    """The trained adapter.

    Args:
        rank: Rank of the update.
        alpha: Numerator of the scale: the update is multiplied by alpha / rank. Null takes the
            rank, so that the scale is 1.
        target_modules: Suffixes of the names of the linear layers that get an adapter. Null takes
            the eight attention projections for sd3 and all projections for causal_lm.
    """

    rank: Count = 32
    alpha: Count | None = None
    target_modules: Annotated[list[str], MinLen(1)] | None = None

    @property
    def numerator(self) -> int:
        """The numerator of the scale: ``alpha``, or the rank where it is null."""
        return self.rank if self.alpha is None else self.alpha


@dataclass(config=_STRICT)
class PolicyConfig:
    """The model.

    Args:
        name: Kind of policy: sd3 (Stable Diffusion 3 and 3.5), causal_lm (a language model of
            transformers) or toy (a Gaussian, for tests).
        path: Folder or hub id of the model; "tiny" is the one shipped with the package.
        revision: Branch, tag or commit of a hub id; null takes its main branch.
        dtype: Precision of the frozen weights and of the forward pass; the adapter is always
            float32.
        vae_dtype: Precision of the image decoder.
        gradient_checkpointing: Whether the backward pass computes activations again instead of
            keeping them; saves memory and costs time.
        shard: Whether the frozen transformer is split over the processes of a node (FSDP2), which
            gather a block when they need it; saves memory and costs time. For a model that a card
            does not hold beside the rewards.
        attention: Attention backend of diffusers: native (torch's own choice), or a kernel that
            has to be installed, such as flash, _flash_3 or flash_hub. Those round otherwise, and
            most take half precision alone.
        compile: What torch.compile takes: off (nothing), or blocks, each block of an image model's
            transformer as a whole. The first passes take minutes more, the others less. Kernels of
            sampling and of training then round differently: policy/ratio_gap says by how much.
        max_sequence_length: Number of T5 tokens that are read of each prompt.
        step_batch: Number of trained steps of a sample in one forward pass; more is faster on
            small models.
        vae_batch: Number of images that are decoded at a time.
        embeds_dir: Folder of a disk cache for prompt embeddings; null keeps none.
        embeds_memory_gb: Limit of the memory cache of prompt embeddings, in GB.
        adapter: LoRA weights to start from (a checkpoint's folder, its ema, an export, a folder of
            peft, a .safetensors file), for a second stage with other rewards. They start in the
            LoRA below, whose rank and target_modules have to hold them; what it has beyond them
            starts as if new. The reference of the KL and of the method mopo's win rates stays the
            model in path, without an adapter; gains are over the start. Learning from preferences
            takes the start for the first reference and, without log_probs in the data, for what
            wrote the responses. A run that is resumed does not read it.
        lora: The trained adapter.
    """

    name: Literal["sd3", "causal_lm", "toy"] = "sd3"
    path: str = "tiny"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: Switch = False
    shard: Switch = False
    attention: str = "native"
    compile: Literal["off", "blocks"] = "off"
    max_sequence_length: Count = 128
    step_batch: Count = 1
    vae_batch: Count = 8
    embeds_dir: str | None = None
    embeds_memory_gb: Positive = 8.0
    adapter: str | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(config=_STRICT)
class SamplingConfig:
    """How rollouts are drawn.

    Args:
        resolution: Side of the square images, in pixels.
        steps: Number of denoising steps.
        guidance: Scale of classifier-free guidance; 1 switches it off and halves the cost.
        sampler: Kind of stochastic step: flow_sde, cps, or the import path of a function, such as
            "mine.py:my_step" (see docs/methods.md). The log-prob of cps is the published code's,
            not the density (samplers.py); loss.clip_range goes with it (Flow-CPS's recipes: 1e-5).
        solver: How the steps without noise are taken: euler, as deployment takes them, or
            multistep, of second order, which needs fewer of them.
        noise_level: Size of the noise that a stochastic step adds; at most 1 for cps.
        shared_start: Whether the samples of a group start from the same noise. Those that stand in
            one batch then share the steps before the window, too.
        window: Number of trained steps per rollout, less than steps; 0 trains all steps but the
            last.
        window_mode: Where the window of trained steps lies: drawn anew for each rollout (random),
            moving from the noise to the image (slide), or at the start (first).
        window_stay: Number of rollouts for which a sliding window stays at one place.
    """

    resolution: Count = 512
    steps: Annotated[int, Strict(), Ge(2)] = 10
    guidance: NotNegative = 4.5
    sampler: str = "flow_sde"
    solver: Literal["euler", "multistep"] = "euler"
    noise_level: Positive = 0.7
    shared_start: Switch = False
    window: Natural = 0
    window_mode: Literal["random", "slide", "first"] = "random"
    window_stay: Count = 25


@dataclass(config=_STRICT)
class GenerationConfig:
    """How a language model draws; in the place of ``sampling``.

    Args:
        max_new_tokens: Largest number of tokens of a completion, the token that ends it included.
        temperature: Temperature of rollouts.
        eval_temperature: Temperature of evaluations; 0 takes the likeliest token, so that all
            completions of a prompt are alike.
        max_prompt_tokens: Largest number of tokens of a prompt; a longer prompt is an error. Null
            allows what the model's context leaves.
        chat: Whether prompts go through the tokenizer's chat template. Null does so if
            the tokenizer has one.
    """

    max_new_tokens: Count = 64
    temperature: Positive = 1.0
    eval_temperature: NotNegative = 1.0
    max_prompt_tokens: Count | None = None
    chat: Switch | None = None


@dataclass(config=_STRICT)
class PromptFileConfig:
    """One of several prompt files.

    Args:
        path: The file, written as it would be if it were the only one.
        column: Name of the prompt's key or column in this file; null takes prompts.column.
    """

    path: str
    column: str | None = None


@dataclass(config=_STRICT)
class WeightedPromptFileConfig(PromptFileConfig):
    """One of several prompt files to train on.

    Args:
        path: The file, written as it would be if it were the only one.
        column: Name of the prompt's key or column in this file; null takes prompts.column.
        weight: How often a prompt is drawn from this file, relative to the others, whatever their
            sizes; positive.
    """

    weight: Positive = 1.0


def _entry(value: Any) -> Any:
    """Return an entry of a list of prompt files as a mapping; a text is the file's name."""
    return {"path": value} if isinstance(value, str) else value


_Record = TypeVar("_Record")
_Files = Annotated[list[Annotated[_Record, BeforeValidator(_entry)]], MinLen(1), Tag("files")]
# What stands there is one of these two; pydantic then explains that one alone.
_one_or_many = Discriminator(lambda value: "files" if isinstance(value, list) else "file")
_File = Annotated[str, Tag("file")]


@dataclass(config=_STRICT)
class PromptsConfig:
    """The prompts that are drawn, for training and for evaluations.

    Args:
        train: Prompt file (.txt, .jsonl, .csv, .tsv); "tiny" is the set shipped with the package.
            Or a list of files and of {path, weight, column}: a weight of 2 draws from a file twice
            as often as one of 1, the default, does.
        heldout: Prompt file of the evaluation; "tiny" is the set shipped with the package. Or a
            list of files and of {path, column}: all prompts are drawn, the first ones of each file
            first.
        column: Key or column of the prompt in .jsonl, .csv and .tsv.
    """

    train: Annotated[_File | _Files[WeightedPromptFileConfig], _one_or_many] = "tiny"
    heldout: Annotated[_File | _Files[PromptFileConfig], _one_or_many] | None = None
    column: str = "prompt"


@dataclass(config=_STRICT)
class ObjectivesConfig:
    """How K rewards become one advantage: the method and the options of its parts.

    Args:
        method: Name of the method: a pair of normalizer and weighting, see docs/methods.md. Or the
            import path of a weighting, such as "mine.py:MyWeighting", behind the normalizer
            DualStage.
        calibration: A calibration.json of scripts/calibrate.py, whose levels become the base and
            the targets of methods that have such options.
        normalizer: Options of the method's normalizer, see docs/configuration.md. With ``path``,
            the import path of another normalizer, these are that one's options.
        weighting: Options of the method's weighting, see docs/configuration.md.
    """

    method: str = "dual_stage"
    calibration: str | None = None
    normalizer: dict[str, Any] = field(default_factory=dict)
    weighting: dict[str, Any] = field(default_factory=dict)


@dataclass(config=_STRICT)
class PreferencesConfig:
    """Responses that are already there, to learn from instead of rollouts: offline MOPO.

    ``objectives.weighting`` holds MOPO's options, ``primary`` and ``bounds`` (one number, or one
    for each other objective; 0.5 is the level of the responses themselves) among them. ``rewards``
    are then asked in evaluations alone. A round is an optimizer step.

    Args:
        data: JSONL file of prompts and responses with pairs or scores by objective; "tiny" is the
            one shipped with the package.
        pairs: For each objective, a JSONL file of prompt, chosen and rejected (TRL's form); instead
            of data.
        objectives: Names of the objectives in data; left out with pairs, which names them.
        cycles: What is done with preferences that run in a circle: error or keep.
        smoothing: Weight of a Beta prior around 1/2 in the win rates that pairs give.
        batch: Number of responses per optimizer step, over all processes.
        level_prompts: Number of prompts over whose responses evaluations take the win rates; 0
            takes all.
    """

    data: str | None = None
    pairs: dict[str, str] = field(default_factory=dict)
    objectives: list[str] = field(default_factory=list)
    cycles: Literal["error", "keep"] = "error"
    smoothing: NotNegative = 0.0
    batch: Count = 32
    level_prompts: Natural = 512

    @property
    def given(self) -> bool:
        """Whether there are any: the run is then offline."""
        return self.data is not None or bool(self.pairs)


@dataclass(config=_STRICT)
class GradientsConfig:
    """When the objectives' own gradients are measured, for weightings that need their Gramian.

    Args:
        mode: ``fused`` (inside every optimizer step's backward pass, weights solved at each),
            ``probe`` (one more pass over a part of the rollout), or ``auto``: fused where the
            weighting depends on the gradients alone, else probe.
        every: Number of rollouts from one probe to the next.
        share: Share of the rollout's samples that a probe takes.
    """

    mode: Literal["auto", "fused", "probe"] = "auto"
    every: Count = 1
    share: Annotated[float, Strict(), Interval(gt=0, le=1)] = 0.25


@dataclass(config=_STRICT)
class CopyConfig:
    """A copy of the adapter that follows it, once per rollout; null is the preset's, or none.

    Of the copy a share stays: ``decay_rate`` times the optimizer steps since ``decay_after``, at
    most ``decay_limit``. Without a rate it is the adapter as it was when the rollout began.

    Args:
        weight: Weight of the pull of velocities towards the copy's; 0 is none.
        decay_rate: Growth of the share that stays, per optimizer step.
        decay_limit: Largest share that stays.
        decay_after: Number of optimizer steps after which the share begins to grow.
    """

    weight: NotNegative | None = None
    decay_rate: NotNegative | None = None
    decay_limit: Decay | None = None
    decay_after: Natural | None = None


@dataclass(config=_STRICT)
class ForwardConfig:
    """Losses along the forward process, for ``loss.kind: forward``.

    Images are drawn deterministically, noised again, and velocities move towards those that lead to
    images with positive advantages and away from those that lead to the others.

    Args:
        preset: Published settings of all that is null here: nft (DiffusionNFT), awm (Advantage
            Weighted Matching) or ram.
        match: What an advantage is multiplied with: mse, minus the squared distance of the velocity
            from the one that leads to the image; huber, its fourth root; or branches, the
            difference of both sides of the velocity of old (DiffusionNFT).
        times: How the noise levels of an image's draws lie: grid (those of sampling, each once at
            most), strata (one from each of as many parts of those of sampling), uniform or
            logit_normal (both stratified).
        draws: Number of noisy versions of each image.
        first: Smallest noise level, from 0 (the image) to 1 (noise).
        last: Largest noise level.
        scale: Factor of the advantage.
        by_time: Whether the match counts in proportion to the noise level.
        beta: Distance of the two sides from the velocity of old, for branches; a smaller one learns
            faster and less steadily.
        draws_with: Which adapter draws the images: the one that is trained (current), or old.
        old: The copy of the adapter that branches and draws_with look at.
        average: A second copy.
    """

    preset: Literal["nft", "awm", "ram"] | None = None
    match: Literal["mse", "huber", "branches"] | None = None
    times: Literal["grid", "strata", "uniform", "logit_normal"] | None = None
    draws: Count | None = None
    first: Annotated[float, Strict(), Interval(ge=0, lt=1)] | None = None
    last: Annotated[float, Strict(), Interval(gt=0, le=1)] | None = None
    scale: Positive | None = None
    by_time: Switch | None = None
    beta: Positive | None = None
    draws_with: Literal["current", "old"] | None = None
    old: CopyConfig = field(default_factory=CopyConfig)
    average: CopyConfig = field(default_factory=CopyConfig)


@dataclass(config=_STRICT)
class LossConfig:
    """The policy-gradient surrogate.

    Args:
        kind: ``grpo`` (one advantage per sample, from its siblings), ``ppo`` (one per decision,
            from value heads: see critic; language models only) or ``forward`` (of noisy versions of
            the images instead of the steps that drew them: see forward; images only).
        forward: Settings of ``forward``.
        clip: What the clip looks at: ratio (PPO's, of new and old probabilities), normalized (that
            ratio, brought to one size and centred for all denoising steps, as GRPO-Guard has it) or
            divergence (the KL to the policy that sampled: Flow-DPPO's mask). The last two are for
            images, where the ratio of early steps never reaches the clip.
        clip_range: Distance from 1 at which the probability ratio is clipped. Log-probs of images
            are means over latent dimensions, so useful values are about 1e-4. For divergence it is
            the KL from which a decision that moved as it should is left alone; 1e-5 is published.
            Log ratios that are normalized are another number: see policy/clip_fraction.
        advantage_clip: Largest absolute advantage; what is beyond is cut to it.
        steps: ``plain``; ``equal``: log ratios and losses of all denoising steps are brought to
            one size (as GRPO-Guard's ratio normalisation does), so that early steps train as late
            ones do and the clip acts on each; or ``noise``: they are weighed by a step's noise over
            the mean of all (as TempFlow-GRPO does), which moves weight from late steps to early
            ones. Useful clip ranges are then other ones. Images only.
        kl_weight: Weight of the KL to the base model; 0 leaves the base model out. With the method
            mopo it is in win rates per unit of KL: it is divided by what divides the win rates.
        kl_target: The KL per decision that the weight is adapted to, by at most a fifth of it per
            rollout; it begins with kl_weight, and stays within a hundred times and a hundredth of
            it. Null keeps the weight. policy/kl_weight shows it.
        norm_weight: Weight of the penalty on velocities that are longer than the base model's: the
            squared relative excess (NormGuard). Images only.
        kl: Kind of KL: gaussian, dt_free or velocity for images, k3 for text. Null takes gaussian
            for images and k3 for text.
        ratio_tolerance: Largest absolute log ratio of the on-policy check, which looks at each
            decision when it is first drawn. Null takes half the clip range, or 5e-5 where that is
            not one of log ratios as they are (clip divergence and normalized).
        max_skipped: Number of consecutive updates with non-finite gradients after which the run
            stops; those by which float16 finds its loss scale do not count.
    """

    kind: Literal["grpo", "ppo", "forward"] = "grpo"
    forward: ForwardConfig = field(default_factory=ForwardConfig)
    clip: Literal["ratio", "normalized", "divergence"] = "ratio"
    clip_range: Positive = 1e-4
    advantage_clip: Positive = 5.0
    steps: Literal["plain", "equal", "noise"] = "plain"
    kl_weight: NotNegative = 0.0
    kl_target: Positive | None = None
    norm_weight: NotNegative = 0.0
    kl: Literal["gaussian", "dt_free", "velocity", "k3"] | None = None
    ratio_tolerance: Positive | None = None
    max_skipped: Count = 5

    @property
    def tolerance(self) -> float:
        """The limit of the on-policy check: ``ratio_tolerance``, or half of a clip range if None.

        Before a rollout's first update, log-probabilities as trained may differ from those of
        sampling by as much.
        """
        if self.ratio_tolerance is not None:
            return self.ratio_tolerance
        return 0.5 * (self.clip_range if self.clip == "ratio" else LossConfig.clip_range)


@dataclass(config=_STRICT)
class CriticConfig:
    """Value heads, one per objective, for ``loss.kind: ppo``.

    Args:
        granularity: What is weighed: each decision, or each sample by the mean of its decisions.
        gamma: Discount factor per decision.
        lam: Lambda of the generalised advantage estimator; 1 is the return minus the value.
        hidden: Width of the layer between the model's last hidden state and the values.
        lr: Learning rate of the value heads' Adam.
        epochs: Number of gradient steps per rollout.
    """

    granularity: Literal["decision", "sample"] = "decision"
    gamma: Annotated[float, Strict(), Interval(gt=0, le=1)] = 1.0
    lam: Annotated[float, Strict(), Interval(ge=0, le=1)] = 0.95
    hidden: Count = 64
    lr: Positive = 1e-3
    epochs: Count = 8


@dataclass(config=_STRICT)
class OptimizerConfig:
    """AdamW and its schedule.

    Args:
        lr: Learning rate.
        betas: AdamW's two decay rates.
        eps: Number that is added to the root of AdamW's second moment. Gradients of image models
            are about as small as the default (see policy/grad_rms), which damps the smaller ones.
        weight_decay: AdamW's weight decay.
        max_grad_norm: Norm to which longer gradients are cut.
        warmup: Number of optimizer steps over which the learning rate rises from 0.
        schedule: What the learning rate does after that, until the run's last optimizer step:
            constant, or it falls to 0 (linear, cosine).
    """

    lr: Positive = 3e-4
    betas: Annotated[list[Decay], Len(2, 2)] = field(default_factory=lambda: [0.9, 0.999])
    eps: Positive = 1e-8
    weight_decay: NotNegative = 1e-4
    max_grad_norm: Positive = 1.0
    warmup: Natural = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"


@dataclass(config=_STRICT)
class EmaConfig:
    """Average of the adapter, which evaluation and deployment use.

    Args:
        decay: Share of the old average that stays at an update; 0 follows the adapter.
        every: Number of optimizer steps between two updates of the average.
    """

    decay: Decay = 0.9
    every: Count = 8


@dataclass(config=_STRICT)
class TrainerConfig:
    """Length and geometry; micro-batches are solved for the processes there are.

    Args:
        steps: Number of rollouts of the whole run.
        minutes: Limit of the time that rollouts take, without evaluations; the run ends earlier
            once it is reached. 0 sets none.
        groups: Number of prompts per rollout, over all processes.
        group_size: Number of samples per prompt.
        updates: Number of optimizer steps per rollout.
        sample_batch: Largest number of samples per forward pass while sampling.
        micro_batch: Largest number of samples per forward pass while training. In half precision
            passes of sampling and training get equally many rows, so that they round alike.
    """

    steps: Count = 100
    minutes: NotNegative = 0.0
    groups: Count = 48
    group_size: Annotated[int, Strict(), Ge(2)] = 24
    updates: Count = 2
    sample_batch: Count = 16
    micro_batch: Count = 16


@dataclass(config=_STRICT)
class CheckpointConfig:
    """Checkpoints; one is always written at the end.

    Args:
        every: Number of rollouts between two checkpoints; 0 writes none but at the end, on failure
            and on SIGTERM.
        keep: Number of the newest checkpoints that are kept; 0 keeps all.
        front: Largest number of further checkpoints that are kept because they are on the front of
            the held-out rewards, among those that were evaluated.
    """

    every: Natural = 20
    keep: Natural = 5
    front: Natural = 10


@dataclass(config=_STRICT)
class EvaluationConfig:
    """Held-out rewards and images during training: averaged weights, deterministic sampling.

    Args:
        every: Number of rollouts between two evaluations; 0 makes none.
        images_per_prompt: Number of images of each held-out prompt.
        prompts: Largest number of held-out prompts; 0 takes all.
        steps: Number of denoising steps.
        solver: How they are taken: euler, as diffusers takes them, or multistep, of second order.
        guidance: Scale of classifier-free guidance.
        resolution: Side of the square images, in pixels; null takes that of sampling. With another
            one, what training does to images of that size is seen, by rewards and alarm.drift;
            they are not compared with rollouts (alarm.gap).
        seed: Seed of the initial noise, any integer; equal for all runs, so that images can be
            compared.
        pictures: Number of images of the sheet in samples/; 0 draws none.
        rollout_images: Number of images that are also drawn as rollouts draw them, for alarm.gap;
            none with a resolution of its own.
        rewards: Held-out reward heads, written as in rewards: they are asked here alone and never
            trained on, so that alarm can tell when the trained rewards are being gamed.
    """

    every: Natural = 20
    images_per_prompt: Count = 1
    prompts: Natural = 0
    steps: Count = 40
    solver: Literal["euler", "multistep"] = "euler"
    guidance: NotNegative = 4.5
    resolution: Count | None = None
    seed: Whole = 0
    pictures: Natural = 16
    rollout_images: Natural = 8
    rewards: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(config=_STRICT)
class AlarmConfig:
    """What evaluations set off: a training reward up, a held-out one down, drifting outputs.

    Args:
        action: What the first alarm does: warn, stop the run, raise_kl (multiply its weight by
            kl_factor), or rollback to the held-out reward's best evaluation (and raise_kl, where
            there is a KL).
        patience: Number of evaluations in a row in which the held-out reward has to be down.
        z: Number of standard errors, over prompts, by which a held-out reward is below its best and
            a training reward above what it was then.
        kl_factor: Factor by which the KL's weight grows each time.
        limit: Number of alarms that are acted upon before the next ends the run.
        drift: Number of standard deviations of the outputs before training by which the mean of an
            output statistic moves before a warning; 0 gives none. Of the velocities' norm 5 % count
            as three.
        gap: Number of standard deviations, of the evaluation before training, by which deployed
            outputs score above rollouts before a warning; 0 gives none.
    """

    action: Literal["warn", "stop", "raise_kl", "rollback"] = "warn"
    patience: Count = 2
    z: NotNegative = 2.0
    kl_factor: Annotated[float, Strict(), Ge(1)] = 3.0
    limit: Natural = 3
    drift: NotNegative = 3.0
    gap: NotNegative = 1.0


@dataclass(config=_STRICT)
class ScoringConfig:
    """How reward heads run.

    Args:
        overlap: Whether heads score a batch while the next one is drawn, each in a thread of its
            own.
        offload: Whether heads leave the accelerator while the policy is improved.
    """

    overlap: Switch = True
    offload: Switch = False


@dataclass(config=_STRICT)
class LogConfig:
    """The trackers that get the numbers of metrics.jsonl, too.

    Args:
        trackers: Names of accelerate's trackers (tensorboard, wandb, ...); an empty list for none.
        scores: Whether every sample's rewards are written to scores/.
    """

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    scores: Switch = True


@dataclass(config=_STRICT)
class Config:
    """One training run.

    Args:
        output_dir: Folder of the run.
        resume: "latest", or a checkpoint's folder; null starts a new run.
        seed: Seed of everything random, any integer.
        policy: The model.
        sampling: How rollouts are drawn.
        generation: How a language model draws.
        prompts: The prompts to draw for.
        rewards: For each objective by name, its options: weight, head (a registered name, by
            default the objective's), path (an import path such as my_module:my_reward), and the
            head's own.
        scoring: How reward heads run.
        objectives: From K rewards to one advantage.
        preferences: Responses that are already there, to learn from instead of rollouts.
        gradients: When the objectives' own gradients are measured.
        loss: The policy-gradient surrogate.
        critic: Value heads.
        optimizer: AdamW and its schedule.
        ema: Average of the adapter.
        trainer: Length and geometry.
        checkpoint: Checkpoints.
        evaluation: Held-out rewards and images.
        alarm: What evaluations set off.
        log: Where numbers go.
    """

    output_dir: str = "runs/run"
    resume: str | None = None
    seed: Whole = 0
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rewards: dict[str, dict[str, Any]] = field(default_factory=dict)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    preferences: PreferencesConfig = field(default_factory=PreferencesConfig)
    gradients: GradientsConfig = field(default_factory=GradientsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def deployed_resolution(self) -> int:
        """The side of the images of evaluations, in pixels."""
        return self.evaluation.resolution or self.sampling.resolution
