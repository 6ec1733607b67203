"""What training costs: against a plain pipeline call on the CPU, and phase by phase on a GPU.

Both measure the product's own `Trainer`, made by `build` from a configuration. Only the pipeline
is handed over in memory, so that random weights of any size will do.
"""

from __future__ import annotations

import io
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from moa_diffusion import build, tiny
from moa_diffusion.config import Config, LossConfig, SamplingConfig, TrainerConfig
from moa_diffusion.policies.sd3 import DTYPES, SD3Policy, load_pipeline
from moa_diffusion.tiny.tokenizers import MAX_LENGTH, clip_tokenizer, t5_tokenizer
from moa_diffusion.trainer import Trainer, TrainingError
from moa_diffusion.types import Request, Rollout

BATCH, STEPS, GUIDANCE = 4, 10, 4.5  # of the plain call that is the unit, and of the training
LENGTH_OF_PATH = 128  # T5 tokens where the pipeline is neither `tiny` nor `base`
CHEAP_HEAD = {"colourfulness": {"weight": 1.0}}  # scores, and costs next to nothing
REST = "rest"

# ---------------------------------------------------------------------- where the time goes


class Phases:
    """Accounts in which each second belongs to the innermost phase, so that they add up.

    Args:
        clock: seconds.
        peak: reads the peak memory since the last reading, in bytes, and starts anew.
    """

    def __init__(self, clock: Callable[[], float], peak: Callable[[], int] | None = None) -> None:
        self._clock, self._peak = clock, peak
        self._open = [REST]
        self._mark = clock()
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}  # bytes, over all of the phase's visits

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        self._account()
        seconds, self.seconds = self.seconds, {}
        return seconds

    def inside(self, label: str) -> bool:
        """Whether the phase is open, innermost or not."""
        return label in self._open

    @contextmanager
    def phase(self, label: str) -> Iterator[None]:
        """Within the block time belongs to ``label``, or to a phase inside it."""
        self._account()
        self._open.append(label)
        try:
            yield
        finally:
            self._account()
            self._open.pop()

    @contextmanager
    def watching(self, *targets: tuple[object, str, str | Callable[[], str]]) -> Iterator[None]:
        """Within the block every call of ``owner.name`` is the phase ``label``.

        Args:
            targets: (owner, name, label); a label may be a function, asked at each call.
        """
        with ExitStack() as stack:
            for owner, name, label in targets:
                timed = self._timed(getattr(owner, name), label)
                stack.enter_context(patch.object(owner, name, timed))
            yield

    def _timed(
        self, function: Callable[..., Any], label: str | Callable[[], str]
    ) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(label if isinstance(label, str) else label()):
                return function(*args, **kwargs)

        return timed

    def _account(self) -> None:
        now, label = self._clock(), self._open[-1]
        self.seconds[label] = self.seconds.get(label, 0.0) + now - self._mark
        self._mark = now
        if self._peak is not None:
            self.peaks[label] = max(self.peaks.get(label, 0), self._peak())


# ---------------------------------------------------------------------- random weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Arguments of a pipeline's parts, where they differ from the library's defaults."""

    transformer: Mapping[str, Any]
    clip: Mapping[str, Any]  # CLIP-L
    clip_2: Mapping[str, Any]  # OpenCLIP bigG
    t5: Mapping[str, Any]
    vae: Mapping[str, Any]
    vocabularies: tuple[int, int] | None = None  # of CLIP and T5; None fits the tokenizers
    clip_tokens: int = MAX_LENGTH


# Published configuration of stable-diffusion-3.5-medium: 2.24 B parameters (and a position table of
# 0.23 B numbers), encoders of 0.12, 0.69 and 4.76 B, VAE of 0.08 B.
MEDIUM = Sizes(
    transformer={
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
    },
    clip={"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768}
    | {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"},
    clip_2={"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280}
    | {"num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu"},
    t5={"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    vocabularies=(49408, 32128),
    clip_tokens=77,
)


def _small(*, layers: int, heads: int, side: int, channels: tuple[int, ...]) -> Sizes:
    """The same architecture with ``heads`` heads of 64 over latents of ``side`` x ``side``."""
    width = 64 * heads
    clip = {"hidden_size": width // 2, "intermediate_size": 2 * width, "projection_dim": width // 2}
    clip |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    return Sizes(
        transformer={
            "sample_size": side,
            "num_layers": layers,
            "num_attention_heads": heads,
            "joint_attention_dim": width,
            "caption_projection_dim": width,
            "pooled_projection_dim": width,
            "pos_embed_max_size": side // 2,
            "dual_attention_layers": tuple(range(layers // 2)),
        },
        clip=clip,
        clip_2=clip,
        t5={"d_model": width, "d_kv": 64, "d_ff": 2 * width, "num_layers": 2, "num_heads": heads},
        vae={"block_out_channels": channels, "layers_per_block": 1, "norm_num_groups": 8},
    )


BASE = _small(layers=5, heads=3, side=16, channels=(16, 32, 32, 32))
SMALLEST = _small(layers=2, heads=1, side=4, channels=(8, 8))
SIZES = {"medium": MEDIUM, "base": BASE, "tiny": SMALLEST}


def random_pipeline(
    sizes: Sizes,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Any:
    """A ``StableDiffusion3Pipeline`` with untrained weights, made where and as it is used.

    The tokenizers are those of `moa_diffusion.tiny`: nothing is downloaded.

    Args:
        sizes: of its parts.
        device: of all parts.
        dtype: of the transformer and the text encoders.
        vae_dtype: of the VAE.
        seed: of the weights; the global generators are left alone.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
    )

    tokenizers = clip_tokenizer(), clip_tokenizer(pad_token="!")
    for tokenizer in tokenizers:
        tokenizer.model_max_length = sizes.clip_tokens
    t5_pieces = t5_tokenizer()
    clip_words, t5_words = sizes.vocabularies or (len(tokenizers[0]), len(t5_pieces))
    marks = {
        "vocab_size": clip_words,
        "max_position_embeddings": sizes.clip_tokens,
        "bos_token_id": tokenizers[0].bos_token_id,
        "eos_token_id": tokenizers[0].eos_token_id,
        "pad_token_id": tokenizers[0].pad_token_id,
    }
    blocks = len(sizes.vae["block_out_channels"])
    with _made(device, dtype, seed):
        transformer = SD3Transformer2DModel(qk_norm="rms_norm", **sizes.transformer)
        clip = CLIPTextModelWithProjection(CLIPTextConfig(**marks, **sizes.clip))
        clip_2 = CLIPTextModelWithProjection(CLIPTextConfig(**marks, **sizes.clip_2))
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=t5_words,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
                **sizes.t5,
            )
        )
    with _made(device, vae_dtype, seed):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **sizes.vae,
        )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip.eval(),
        tokenizer=tokenizers[0],
        text_encoder_2=clip_2.eval(),
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5.eval(),
        tokenizer_3=t5_pieces,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def _made(device: str, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Parameters made in the block have this device and dtype: no copy in main memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(before)


def trainer_with(pipeline: Any, settings: Config, folder: str) -> Trainer:
    """The trainer that ``build`` makes of the settings, but on this pipeline.

    Args:
        pipeline: taken over.
        settings: its prompts, rewards and log are replaced: a benchmark needs no files.
        folder: of the run.
    """
    quiet = replace(
        settings,
        output_dir=folder,
        resume=None,
        rewards=CHEAP_HEAD,
        policy=replace(settings.policy, name="sd3", embeds_dir=None),
        prompts=replace(settings.prompts, train="tiny", heldout=None),
        evaluation=replace(settings.evaluation, every=0),
        log=replace(settings.log, trackers=[], scores=False),
    )
    with patch.object(build, "load_pipeline", lambda *_, **__: pipeline):
        trainer = build.trainer(quiet)
    trainer.progress = False
    return trainer


# ---------------------------------------------------------------------- on the CPU: the ratio

ENCODE, SAMPLING, DECODE = "encode", "sampling", "decode"
FORWARD, BACKWARD, REFERENCE = "forward", "backward", "reference"  # of training
OPTIMIZER, IMPROVE = "optimizer", "improve"
COLUMNS = (ENCODE, SAMPLING, DECODE, FORWARD, BACKWARD, REFERENCE, OPTIMIZER, REST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to train; costs are in units of one plain pipeline call."""

    name: str
    target: float | None = None  # at most this
    window: int = 0  # trained steps; 0 for all but the last
    guidance: float = GUIDANCE
    kl_weight: float = 0.0
    step_batch: int = 1  # trained steps per forward
    trained: bool = True  # False: only sampled


def cases() -> list[Case]:
    """What ``train`` measures, each trained way with one step and with all steps per forward."""
    ways = [
        Case(name="9 trained steps", target=2.8),
        Case(name="9 trained steps, KL", target=3.5, kl_weight=0.04),
        Case(name="window of 2", target=1.35, window=2),
        Case(name="window of 2, no CFG", target=0.75, window=2, guidance=1.0),
    ]
    both = [
        replace(way, step_batch=steps) for way in ways for steps in (1, way.window or STEPS - 1)
    ]
    return [Case(name="sampling alone", trained=False), *both]


def case_settings(case: Case, *, resolution: int, length: int) -> Config:
    """The configuration of a case: four samples, one optimizer step."""
    settings = Config(
        sampling=SamplingConfig(
            resolution=resolution, steps=STEPS, guidance=case.guidance, window=case.window
        ),
        loss=LossConfig(kl_weight=case.kl_weight),
        trainer=TrainerConfig(
            groups=BATCH // 2, group_size=2, updates=1, sample_batch=BATCH, micro_batch=BATCH
        ),
    )
    settings.policy.step_batch = case.step_batch
    settings.policy.max_sequence_length = length
    return settings


def measure_training(name: str, *, rounds: int) -> dict[str, Any]:
    """CPU seconds of a plain pipeline call and of every case, interleaved.

    The text encoders run once per distinct prompt of a whole run, so a case pays for looking the
    embeddings up, and the plain call for computing them.

    Args:
        name: 'tiny', 'base', or the folder of a pipeline.
        rounds: measured rounds, after one that warms up.

    Returns:
        ``plain`` and a list ``cases``, each with medians over the rounds: ``seconds`` per batch
        and ``phases`` (seconds by name).
    """
    torch.set_num_threads(1)
    length = MAX_LENGTH if name in ("tiny", "base") else LENGTH_OF_PATH
    path = str(tiny.PIPELINE_PATH) if name == "tiny" else name
    load = partial(random_pipeline, BASE) if name == "base" else partial(load_pipeline, path)
    plain, phases = load(), Phases(time.process_time)
    resolution = plain.transformer.config.sample_size * plain.vae_scale_factor
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        runs: list[Callable[[], object]] = []
        for number, case in enumerate(cases()):
            settings = case_settings(case, resolution=resolution, length=length)
            with redirect_stdout(io.StringIO()):  # build reports the geometry
                trainer = trainer_with(load(), settings, f"{folder}/{number}")
            stack.callback(trainer.close)
            requests = trainer.sampler.requests(0)
            trainer.policy.prepare([request.prompt for request in requests])
            runs.append(partial(_trained_batch, trainer, requests, case, phases))
        call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
        call |= {"height": resolution, "width": resolution, "max_sequence_length": length}
        prompts = [request.prompt for request in requests]
        measured: list[list[dict[str, float]]] = [[] for _ in range(1 + len(runs))]
        for turn in range(rounds + 1):
            with phases.watching(
                (plain, "encode_prompt", ENCODE),
                (plain.transformer, "forward", SAMPLING),
                (plain.vae, "decode", DECODE),
            ):
                phases.take()
                plain(prompts, **call)
                taken = [phases.take()]
            for run in runs:
                run()
                taken.append(phases.take())
            if turn:
                for rows, seconds in zip(measured, taken, strict=True):
                    rows.append(seconds)
    medians = [_medians(rows) for rows in measured]
    return {
        "pipeline": name,
        "parameters": _parameters(plain),
        "batch": BATCH,
        "resolution": resolution,
        "tokens": length,
        "rounds": rounds,
        "machine": _machine(),
        "plain": medians[0],
        "cases": [
            asdict(case) | row | {"ratio": row["seconds"] / medians[0]["seconds"]}
            for case, row in zip(cases(), medians[1:], strict=True)
        ],
    }


def _trained_batch(
    trainer: Trainer, requests: Sequence[Request], case: Case, phases: Phases
) -> None:
    policy = trainer.policy
    assert isinstance(policy, SD3Policy)

    def forward() -> str:
        if torch.is_grad_enabled():
            return FORWARD
        return REFERENCE if phases.inside(IMPROVE) else SAMPLING

    with phases.watching(
        (policy, "encode", ENCODE),
        (policy.transformer, "forward", forward),
        (policy.vae, "decode", DECODE),
        (torch.autograd, "backward", BACKWARD),
        (trainer, "_optimizer_step", OPTIMIZER),
    ):
        phases.take()
        rollout = trainer.sample(requests)
        if case.trained:
            with phases.phase(IMPROVE):
                trainer.improve(rollout, torch.tensor([1.0, -1.0] * (BATCH // 2)))


def _medians(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Of the sums, and of every phase."""
    merged = [
        {column: row.get(column, 0.0) for column in COLUMNS}
        | {REST: row.get(REST, 0.0) + row.get(IMPROVE, 0.0)}
        for row in rows
    ]
    return {
        "seconds": median(sum(row.values()) for row in merged),
        "phases": {column: median(row[column] for row in merged) for column in COLUMNS},
    }


def print_training(report: Mapping[str, Any]) -> None:
    """Two tables: the ratios, and where the time goes."""
    unit = report["plain"]["seconds"]
    ratios, parts = _table("CPU seconds per image"), _table("Where it goes, in plain calls")
    for column in ("", "steps/forward", "s/image", "x plain call", "target", ""):
        ratios.add_column(column, justify="left" if not column else "right")
    for column in ("", "steps", *COLUMNS):
        parts.add_column(column, justify="right" if column else "left", no_wrap=True)
    best = {
        name: min(case["ratio"] for case in report["cases"] if case["name"] == name)
        for name in (case["name"] for case in report["cases"])
    }
    plain = {"name": "plain call", "ratio": 1.0, "target": None, "trained": False}
    for row in (plain | report["plain"], *report["cases"]):
        chosen = row["trained"] and row["ratio"] == best[row["name"]]
        verdict = "met" if row["target"] and row["ratio"] <= row["target"] else "missed"
        batch = str(row["step_batch"]) if row["trained"] else ""
        ratios.add_row(
            row["name"],
            batch,
            f"{row['seconds'] / report['batch']:.4f}",
            f"{row['ratio']:.2f}",
            f"<= {row['target']}" if row["target"] else "",
            f"best: {verdict}" if chosen else "",
        )
        shares = [row["phases"][column] / unit for column in COLUMNS]
        parts.add_row(row["name"], batch, *(f"{s:.3f}" if s else "" for s in shares))
    machine = report["machine"]
    _print(
        f"Pipeline {report['pipeline']}: {report['parameters'] / 1e6:.1f} M parameters in "
        f"transformer and encoders, {report['resolution']} px, {report['tokens']} T5 tokens. "
        f"{STEPS} steps, CFG {GUIDANCE}, batch {report['batch']}, one thread; medians of "
        f"{report['rounds']} interleaved rounds; load {machine['load']:.1f} on "
        f"{machine['cores']} cores.",
        ratios,
        parts,
    )


# ---------------------------------------------------------------------- on a GPU: the phases

PREPARE, SAMPLE, SCORE, UPDATE = "encode prompts", "sample", "score", "update"


def measure_gpu(
    settings: Config, *, size: str = "medium", device: str = "cuda", groups: int, rollouts: int
) -> dict[str, Any]:
    """Rollouts and updates with the settings' batches, on random weights.

    Args:
        settings: their batches are kept; the number of groups is reduced to ``groups``.
        size: of the pipeline, a key of ``SIZES``.
        device: 'cuda', or 'cpu' to try the code.
        groups: prompts per rollout.
        rollouts: measured, after one that warms up.

    Returns:
        seconds and peak bytes by phase, images per second, and shares of the device's measured
        bf16 matrix rate.

    Raises:
        ConfigError: if ``groups`` do not divide over the settings' updates.
    """
    sizes, dtype = SIZES[size], DTYPES[settings.policy.dtype]
    peak, cuda = _matrix_rate(device), device == "cuda"
    phases = Phases(_synchronised if cuda else time.perf_counter, _peak_bytes if cuda else None)
    with phases.phase("build"):
        pipeline = random_pipeline(
            sizes, device=device, dtype=dtype, vae_dtype=DTYPES[settings.policy.vae_dtype]
        )
    parameters = _parameters(pipeline)
    largest = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    scaled = replace(
        settings,
        sampling=replace(settings.sampling, resolution=min(settings.sampling.resolution, largest)),
        trainer=replace(settings.trainer, groups=groups),
    )
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        trainer = trainer_with(pipeline, scaled, folder)
        stack.callback(trainer.close)
        policy, geometry = trainer.policy, trainer.geometry
        assert isinstance(policy, SD3Policy)
        plan = [trainer.sampler.requests(step) for step in range(rollouts + 1)]
        prompts = sorted({request.prompt for requests in plan for request in requests})
        stack.enter_context(
            phases.watching(
                (policy, "prepare", PREPARE),
                (policy.vae, "decode", DECODE),
                (trainer, "sample", SAMPLE),
                (trainer, "score", SCORE),
                (trainer, "improve", UPDATE),
            )
        )
        policy.prepare(prompts)
        built = phases.take()
        for step, requests in enumerate(plan):
            phases.take()
            rollout = trainer.sample(requests)
            trainer.score(rollout, requests)
            trainer.improve(rollout, torch.randn(len(requests)))
            if step:
                rows.append(phases.take())
        peaks = dict(phases.peaks)
        warning = _on_policy(trainer, rollout)
        forward, trained = count_flops(trainer, rollout)
    seconds = {name: median(row.get(name, 0.0) for row in rows) for name in rows[0]}
    images, decisions = geometry.samples, rollout.log_probs.shape[1]
    work = {
        SAMPLE: images * settings.sampling.steps * forward,
        UPDATE: images * decisions * trained,
    }
    return {
        "machine": _machine() | {"device": torch.cuda.get_device_name() if cuda else "cpu"},
        "size": size,
        "parameters": parameters,
        "dtype": settings.policy.dtype,
        "geometry": geometry.describe(),
        "configured": {
            name: getattr(settings.trainer, name)
            for name in ("groups", "group_size", "sample_batch", "micro_batch")
        },
        "rollouts": rollouts,
        "resolution": scaled.sampling.resolution,
        "trained_steps": decisions,
        "images": images,
        "images_per_second": images / median(sum(row.values()) for row in rows),
        "prompts_encoded": len(prompts) + 1,
        "seconds": {name: built[name] for name in ("build", PREPARE)}
        | {name: seconds[name] for name in (SAMPLE, DECODE, SCORE, UPDATE, REST)},
        "peak_bytes": peaks,
        "matrix_rate": peak,
        "flops": {"forward": forward, "trained_decision": trained},
        "share": {name: flops / seconds[name] / peak for name, flops in work.items()},
        "on_policy": warning,
    }


def count_flops(trainer: Trainer, rollout: Rollout) -> tuple[int, int]:
    """Floating-point operations for one sample: a denoising step, and a trained decision.

    With guidance a step is two forwards. A trained decision is forward and backward, what
    checkpointing recomputes, and the reference if there is a KL.
    """
    from torch.utils.flop_counter import FlopCounterMode

    part, first = rollout.select(torch.tensor([0])), slice(0, 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        trainer.policy.log_probs(part, first)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        terms = trainer.policy.log_probs(part, first, with_kl=trainer.surrogate.kl_weight > 0)
        torch.autograd.backward([term.sum() for term in terms if term is not None])
    trainer.optimizer.zero_grad(set_to_none=True)
    return forward, counter.get_total_flops()


def print_gpu(report: Mapping[str, Any]) -> None:
    """Seconds, peak memory and share of the matrix rate by phase."""
    table = _table("Per rollout (medians)")
    for column in ("phase", "seconds", "s/image", "peak GB", "share of bf16 rate"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name, seconds in report["seconds"].items():
        once = name in ("build", PREPARE)
        peak, share = report["peak_bytes"].get(name), report["share"].get(name)
        table.add_row(
            f"{name} (once)" if once else name,
            f"{seconds:.3f}",
            "" if once else f"{seconds / report['images']:.4f}",
            "" if peak is None else f"{peak / 1e9:.1f}",
            "" if share is None else f"{share:.1%}",
        )
    machine, flops = report["machine"], report["flops"]
    limits = ", ".join(f"{name} {value}" for name, value in report["configured"].items())
    _print(
        f"{machine['device']}, torch {machine['torch']}: {report['matrix_rate'] / 1e12:.4g} "
        f"TFLOP/s in a large bf16 product. {report['size']} pipeline with random weights, "
        f"{report['parameters'] / 1e9:.4g} B parameters in transformer and encoders, "
        f"{report['dtype']}.",
        f"{report['geometry']}. The configuration has {limits}. "
        f"{report['resolution']} px, {report['trained_steps']} trained steps; "
        f"{report['rollouts']} rollouts after a warm-up.",
        table,
        f"{report['images_per_second']:.3g} images/s sampled, scored and trained. One denoising "
        f"step takes {flops['forward'] / 1e12:.4g} TFLOP per image, one trained decision "
        f"{flops['trained_decision'] / 1e12:.4g}. {report['prompts_encoded']} prompts encoded. "
        f"On-policy check: {report['on_policy'] or 'passed'}.",
    )


def _on_policy(trainer: Trainer, stale: Rollout) -> str:
    """What the trainer's check says of a fresh rollout; empty if it passes."""
    geometry = trainer.geometry
    batch = max(geometry.sample_batch, geometry.micro_batch)
    fresh = trainer.sample(stale.requests[:batch])
    try:
        trainer.check_ratio(fresh)
    except TrainingError as error:
        return str(error)
    return ""


def _matrix_rate(device: str) -> float:
    """FLOP/s of a large bf16 matrix product: the best of several."""
    side, times = (8192, 20) if device == "cuda" else (256, 2)
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    clock = _synchronised if device == "cuda" else time.perf_counter
    seconds = []
    for _ in range(5):  # the first warms up
        start = clock()
        for _ in range(times):
            a @ b
        seconds.append(clock() - start)
    return 2 * side**3 * times / min(seconds)


def _synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _peak_bytes() -> int:
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


# ---------------------------------------------------------------------- small parts


def _parameters(pipeline: Any) -> int:
    """Of the transformer and the text encoders."""
    parts = (
        pipeline.transformer,
        pipeline.text_encoder,
        pipeline.text_encoder_2,
        pipeline.text_encoder_3,
    )
    return sum(p.numel() for part in parts if part is not None for p in part.parameters())


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def _table(title: str) -> Any:
    try:
        from rich.table import Table
    except ImportError as error:
        raise ImportError("The tables need rich. Run: pip install rich") from error
    return Table(title=title)


def _print(*parts: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(console.width, 120)  # less would cut the breakdown's numbers
    for part in parts:
        console.print(part)
