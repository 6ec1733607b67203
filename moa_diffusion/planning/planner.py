"""From a configuration to a forecast: what today's code does in each phase, added up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

from moa_diffusion.assembly import (
    heads,
    heldout_requests,
    is_fused,
    model_path,
    objectives,
    solve_geometry,
    train_prompts,
)
from moa_diffusion.config import Config
from moa_diffusion.config.presets import forward_rules
from moa_diffusion.planning.forecast import Forecast, Phase, Work
from moa_diffusion.planning.judges import Judge, judge
from moa_diffusion.planning.passes import (
    PROMPTS,
    PartCost,
    TransformerCost,
    decoder_cost,
    encoder_cost,
    transformer_cost,
)
from moa_diffusion.planning.shapes import read_shape
from moa_diffusion.policies.sd3 import DTYPES
from moa_diffusion.training.geometry import Geometry
from moa_diffusion.types import ConfigError

LOAD, ENCODE, SAMPLE, DECODE = "load", "encode", "sample", "decode"
SCORE, UPDATE, EVALUATE, REFERENCES = "score", "update", "evaluate", "references"
FLOAT, DOUBLE = 4, 8  # bytes
Sizes = dict[str, float]  # bytes by part


class Planner:
    """Forecasts a run and its variants; what was counted once is kept.

    Args:
        settings: The configuration.
        gpus: Number of cards of a node.
        nodes: Number of nodes.

    Raises:
        ConfigError: For anything in the configuration that cannot be run, or not be planned.
    """

    def __init__(self, settings: Config, gpus: int, nodes: int = 1) -> None:
        policy = settings.policy
        if policy.name != "sd3":
            raise ConfigError(
                f"policy.name: should be sd3: other models are not planned. Found {policy.name!r}."
            )
        self.settings, self.gpus = settings, gpus
        self.shape = read_shape(model_path(settings), policy.revision)
        texts = {prompt.text for prompt in train_prompts(settings).prompts}
        held = heldout_requests(settings)
        self.trained_on, self.evaluated = len(texts), len(held)
        self.prompts = len(texts | {request.prompt for request in held} | {""})
        normalizer, weighting = objectives(settings)
        self.references = normalizer.reference_samples * self.trained_on
        fused = is_fused(settings, weighting)
        self.tapped = fused or weighting.needs_gramian
        self.probed = self.tapped and not fused
        self.geometry = solve_geometry(settings, gpus * nodes)
        self.judges = _judges(settings, "rewards")
        self.watching = _judges(settings, "evaluation.rewards")
        self.encoders = encoder_cost(self.shape, policy.dtype, policy.max_sequence_length)
        self.decoder = cache(partial(decoder_cost, self.shape, policy.vae_dtype))
        self.transformer = cache(self._transformer)

    def _transformer(self, resolution: int, checkpointing: bool) -> TransformerCost:
        policy = replace(self.settings.policy, gradient_checkpointing=checkpointing)
        try:
            return transformer_cost(self.shape, policy, resolution=resolution, tapped=self.tapped)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"policy: {error}") from error

    def forecast(
        self,
        settings: Config | None = None,
        *,
        geometry: Geometry | None = None,
        judges: bool = True,
    ) -> Forecast:
        """Return what a run takes.

        Args:
            settings: A variant of the configuration; by default it is as it was given.
            geometry: How a rollout is cut; by default as the configuration says.
            judges: Whether the reward models stand on the card.
        """
        variant = _Variant(self, settings or self.settings, geometry or self.geometry, judges)
        return variant.forecast()


class _Variant:
    """Adds up one variant of a run."""

    def __init__(self, planner: Planner, settings: Config, cut: Geometry, judges: bool) -> None:
        self.planner, self.settings, self.cut = planner, settings, cut
        policy, sampling = settings.policy, settings.sampling
        self.model = planner.transformer(sampling.resolution, policy.gradient_checkpointing)
        self.vae = planner.decoder(sampling.resolution)
        deployed = settings.deployed_resolution  # of evaluations
        self.deployed = planner.transformer(deployed, policy.gradient_checkpointing)
        self.deployed_vae = planner.decoder(deployed)
        compares = settings.loss.kl_weight > 0 or settings.loss.norm_weight > 0
        self.decisions = sampling.window or sampling.steps - 1
        self.adapters = 0  # copies of the LoRA beside its average
        self.anchors = int(compares)  # passes beside the trained one, without gradient
        if settings.loss.kind == "forward":
            rules = forward_rules(settings.loss.forward)
            self.decisions, self.adapters = rules.draws, len(rules.copies)
            self.anchors += sum(copy.weight > 0 for copy in rules.copies.values())
        self.copies = _copies(sampling.guidance)
        steps = min(policy.step_batch, self.decisions)
        self.rows = cut.micro_batch * steps * self.copies  # rows of a training pass
        self.judges = planner.judges if judges else ()
        watching = planner.watching if judges and self._evaluations() else ()
        self.everyone = (*self.judges, *watching)
        sizes, tokens = planner.shape.transformer, planner.shape.clip_tokens
        tokens += policy.max_sequence_length
        numbers = tokens * sizes["joint_attention_dim"] + sizes["pooled_projection_dim"]
        self.embeddings = planner.prompts * numbers * DTYPES[policy.dtype].itemsize  # bytes
        self.on_disk = policy.embeds_dir is not None
        limit = policy.embeds_memory_gb * 1e9
        self.encoders_stay = not self.on_disk and self.embeddings > limit

    def forecast(self) -> Forecast:
        """Return all phases, and what the machine needs."""
        settings, planner, cut = self.settings, self.planner, self.cut
        rounds, steps = settings.trainer.steps, settings.sampling.steps
        card, rollout = self._resident(), {"rollout": self._rollout()}
        # All are loaded at the start; those that were moved away come back when they are asked.
        offload = settings.scoring.offload
        judges: Sizes = {"judges": _weights(self.judges if offload else self.everyone)}
        busy: Sizes = {"their activations": self._scoring_peak()}
        # With overlap heads score a batch while the next one is drawn.
        drawing = card | rollout | judges | (busy if settings.scoring.overlap else {})
        draw = {"activations": self.model.forward_peak.at(cut.sample_batch * self.copies)}
        decode = {"activations": self._decode_peak(self.vae, settings.sampling.resolution)}
        encode = {"text encoders": float(planner.encoders.weights)}
        encode |= {"activations": planner.encoders.peak.at(PROMPTS)}
        encode |= judges if self.encoders_stay else {}
        guided = cut.sample_batch * _copies(settings.evaluation.guidance)
        generate = max(
            self.deployed.forward_peak.at(guided),
            self._decode_peak(self.deployed_vae, settings.deployed_resolution),
        )
        evaluate = {"judges": _weights(self.everyone)} | busy | {"activations": generate}
        training = rollout | self._training() | ({} if offload else judges)
        n, m = cut.per_rank, planner.references / cut.world_size
        drawn = (self._draw(n, steps, self.copies, self.model),)
        largest = max(draw["activations"], decode["activations"])
        rows: list[tuple[str, float, Sizes, tuple[Work, ...]]] = [
            (LOAD, 1, card, (self._load(),)),
            (ENCODE, rounds if self.encoders_stay else 1, card | encode, (self._encode(),)),
            (SAMPLE, rounds, drawing | draw, drawn),
            (DECODE, rounds, drawing | decode, (self._decode(n, self.vae),)),
            (SCORE, rounds, card | rollout | judges | busy, _score(self.judges, n)),
            (UPDATE, rounds, card | training, (self._train(),)),
            (EVALUATE, self._evaluations(), card | evaluate, self._evaluate()),
            (REFERENCES, 1, drawing | {"activations": largest}, self._rollout_work(m)),
        ]
        left_out = {EVALUATE} if not self._evaluations() else set()
        left_out |= set() if planner.references else {REFERENCES}
        phases = tuple(
            Phase(name=name, times=times, memory=memory, work=work)
            for name, times, memory, work in rows
            if name not in left_out
        )
        return Forecast(gpus=cut.world_size, phases=phases, disk=self._disk(), host=self._host())

    # ------------------------------------------------------------------ bytes of a card

    def _resident(self) -> Sizes:
        trained, frozen_bytes = FLOAT * self.model.trained, float(self.model.frozen_bytes)
        if self.settings.policy.shard:  # a block at work is whole, and so is the next
            whole, part = self.model.blocks_bytes, self.model.blocks_bytes / self.planner.gpus
            frozen_bytes -= whole - min(whole, part + 2 * self.model.block_bytes)
        frozen = {"transformer": frozen_bytes, "VAE": float(self.vae.weights)}
        copies = {"LoRA copies": self.adapters * trained} if self.adapters else {}
        return frozen | {"LoRA": trained, "EMA": trained, "optimizer": 2 * trained} | copies

    def _rollout(self) -> float:
        """Return the bytes of the latents, and of their noise where it is kept."""
        loss = self.settings.loss
        with_noise = loss.steps == "equal" or loss.clip != "ratio"
        kept = self.decisions + 1 + (self.decisions if with_noise else 0)
        if loss.kind == "forward":
            kept = 1
        shape = self.planner.shape.latent(self.settings.sampling.resolution)
        return FLOAT * self.cut.per_rank * kept * math.prod(shape)

    def _decode_peak(self, vae: PartCost, resolution: int) -> float:
        images = min(self.settings.policy.vae_batch, self.cut.sample_batch)
        values = self.cut.sample_batch * 3 * resolution**2
        return vae.peak.at(images) + 2 * FLOAT * values  # the parts, and all joined

    def _scoring_peak(self) -> float:
        peaks = [judge.peak for judge in self.everyone]
        return sum(peaks) if self.settings.scoring.overlap else max(peaks, default=0.0)

    def _training(self) -> Sizes:
        trained = self.model.trained
        rows = len(self.settings.rewards) if self.planner.tapped else 0
        return {
            "gradients": (FLOAT + DOUBLE) * trained,  # those of a pass, and their sum
            "objectives' gradients": DOUBLE * rows * trained,
            "saved activations": self.model.saved.at(self.rows),
            "temporary": max(0.0, self.model.temporary.at(self.rows)),
        }

    # ------------------------------------------------------------------ work of a card

    def _load(self) -> Work:
        parts = (self.model.frozen_bytes, self.vae.weights, self.planner.encoders.weights)
        moved = sum(parts) + _weights(self.everyone)
        return Work(kind=LOAD, flops=0, moved=moved, dtype=self.settings.policy.dtype)

    def _encode(self) -> Work:
        prompts: float = self.planner.prompts
        if self.encoders_stay:  # every rollout may bring as many new prompts as it has groups
            prompts = self.settings.trainer.groups
        if self.encoders_stay or self.on_disk:
            prompts /= self.cut.world_size
        cost, dtype = self.planner.encoders, self.settings.policy.dtype
        moved = prompts * cost.moved.each
        return Work(kind=ENCODE, flops=prompts * cost.flops, moved=moved, dtype=dtype)

    def _draw(self, images: float, steps: int, copies: int, model: TransformerCost) -> Work:
        rows, batch = images * steps * copies, self.cut.sample_batch * copies
        return Work(
            kind=SAMPLE,
            flops=rows * model.forward_flops,
            moved=rows / batch * model.forward_moved.at(batch),
            dtype=self.settings.policy.dtype,
        )

    def _decode(self, images: float, vae: PartCost) -> Work:
        batch, dtype = self.settings.policy.vae_batch, self.settings.policy.vae_dtype
        flops, moved = images * vae.flops, images / batch * vae.moved.at(batch)
        return Work(kind=DECODE, flops=flops, moved=moved, dtype=dtype, convolutions=True)

    def _train(self) -> Work:
        model, probe = self.model, self.settings.gradients
        rows = self.cut.per_rank * self.decisions * self.copies
        passes = 1 + (probe.share / probe.every if self.planner.probed else 0)
        moved = passes * model.training_moved.at(self.rows)
        moved += self.anchors * model.forward_moved.at(self.rows)
        return Work(
            kind=UPDATE,
            flops=rows * (passes * model.training_flops + self.anchors * model.forward_flops),
            moved=rows / self.rows * moved,
            dtype=self.settings.policy.dtype,
        )

    def _rollout_work(self, images: float) -> tuple[Work, ...]:
        drawn = self._draw(images, self.settings.sampling.steps, self.copies, self.model)
        return (drawn, self._decode(images, self.vae), *_score(self.judges, images))

    def _evaluate(self) -> tuple[Work, ...]:
        chosen, world = self.settings.evaluation, self.cut.world_size
        images = self.planner.evaluated / world
        return (
            self._draw(images, chosen.steps, _copies(chosen.guidance), self.deployed),
            self._decode(images, self.deployed_vae),
            *_score(self.everyone, images),
            *self._rollout_work(min(chosen.rollout_images, self.planner.evaluated) / world),
        )

    def _evaluations(self) -> int:
        every = self.settings.evaluation.every
        wanted = every and self.planner.evaluated
        return 1 + math.ceil(self.settings.trainer.steps / every) if wanted else 0

    # ------------------------------------------------------------------ the machine

    def _disk(self) -> Sizes:
        options = self.settings.checkpoint
        written = math.ceil(self.settings.trainer.steps / options.every) if options.every else 1
        kept = min(written, (options.keep or written) + options.front)
        # state.pt has the LoRA, its average, two moments and copies; loaders get the LoRA and the
        # average.
        checkpoints = kept * (6 + self.adapters) * FLOAT * self.model.trained
        embeddings = self.embeddings if self.on_disk else 0
        return {"checkpoints": checkpoints, "prompt embeddings": embeddings}

    def _host(self) -> Sizes:
        encoders, policy = self.planner.encoders.weights, self.settings.policy
        images = FLOAT * self.cut.per_rank * 3 * self.settings.sampling.resolution**2
        training = images + min(self.embeddings, policy.embeds_memory_gb * 1e9)
        training += encoders if self.encoders_stay else 0
        training += _weights(self.judges) if self.settings.scoring.offload else 0
        loading = self.model.frozen_bytes + self.vae.weights + encoders
        return {"while loading": loading, "while training": training}


def _judges(settings: Config, section: str) -> tuple[Judge, ...]:
    """Return what the heads of a section take of a card.

    Their option ``device`` is left out: a card of the machine that trains is none of this one's.
    """
    chosen = settings.rewards if section == "rewards" else settings.evaluation.rewards
    kept = {
        name: {key: value for key, value in options.items() if key != "device"}
        for name, options in chosen.items()
    }
    if section == "rewards":
        settings = replace(settings, rewards=kept)
    else:
        settings = replace(settings, evaluation=replace(settings.evaluation, rewards=kept))
    return tuple(
        judge(head, on_cpu=chosen[name].get("device") == "cpu")
        for name, head in heads(settings, section).items()
    )


def _copies(guidance: float) -> int:
    """Return the rows of a sample in a pass: with guidance, one more without the prompt."""
    return 2 if guidance > 1 else 1


def _weights(judges: Sequence[Judge]) -> float:
    """Return the bytes of the judges' models, each once."""
    return sum({judge.model: judge.weights for judge in judges}.values())


def _score(judges: Sequence[Judge], images: float) -> tuple[Work, ...]:
    return tuple(
        Work(kind=SCORE, flops=images * judge.flops, moved=images * judge.moved, dtype=judge.dtype)
        for judge in judges
    )
