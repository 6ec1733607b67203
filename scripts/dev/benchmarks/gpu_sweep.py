"""Short updates with other settings: micro-batch, checkpointing, attention, compilation."""

from __future__ import annotations

import dataclasses
import gc
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_report import (
    Report,
    clock_of,
    described,
    forget,
    out_of_memory,
    peak_bytes,
)
from benchmarks.pipelines import Sizes, random_pipeline, trainer_on
from moa_diffusion.config import Config
from moa_diffusion.config.schema import PolicyConfig
from moa_diffusion.objectives.normalize import GDPO
from moa_diffusion.objectives.static import Static
from moa_diffusion.policies.sd3 import DTYPES, SD3Policy
from moa_diffusion.policies.sd3.attention import backend
from moa_diffusion.training.critic import Credit
from moa_diffusion.training.geometry import Geometry
from moa_diffusion.training.trainer import Trainer
from moa_diffusion.training.update import Scalarization
from moa_diffusion.types import RewardMatrix, Rollout

# Attention backends that are tried where they are installed; those of the hub would be downloaded.
ATTENTION = {
    "cuda": ("_native_cudnn", "flash", "_flash_3", "_native_efficient"),
    "cpu": ("_native_math",),
}
COMPILE = "compile"  # the key of the section `policy`, where the configuration has it
LARGEST = 4  # micro-batches of the recipe in the largest one


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Settings that an update is measured with."""

    micro_batch: int
    checkpointing: bool
    attention: str
    compile: str | None  # None where the configuration has no such key

    def applied(self, settings: Config) -> Config:
        """Return a configuration with the settings that the policy is built with."""
        changes: dict[str, Any] = {"gradient_checkpointing": self.checkpointing}
        changes |= {"attention": self.attention}
        if self.compile is not None:
            changes[COMPILE] = self.compile
        return replace(settings, policy=replace(settings.policy, **changes))


def cells(settings: Config, micro_batch: int, *, device: str) -> tuple[Cell, ...]:
    """Return what is measured, the most informative first.

    Args:
        settings: The recipe.
        micro_batch: The micro-batch that its rollouts were trained with.
        device: 'cuda' or 'cpu', which have other kernels.
    """
    policy = settings.policy
    known = COMPILE in {field.name for field in dataclasses.fields(PolicyConfig)}
    compiled = str(vars(policy)[COMPILE]) if known else None
    own = Cell(
        micro_batch=micro_batch,
        checkpointing=policy.gradient_checkpointing,
        attention=policy.attention,
        compile=compiled,
    )
    flipped = replace(own, checkpointing=not own.checkpointing)
    kernels = [replace(own, attention=name) for name in _installed(ATTENTION[device])]
    blocks = [replace(own, compile="off" if compiled == "blocks" else "blocks")] if known else []
    chosen = [
        own,
        flipped,
        replace(own, micro_batch=2 * micro_batch),
        *blocks,
        *kernels,
        replace(own, micro_batch=max(1, micro_batch // 2)),
        replace(own, checkpointing=True, micro_batch=2 * micro_batch),
        *(replace(cell, checkpointing=flipped.checkpointing) for cell in (*blocks, *kernels)),
        *(replace(cell, compile=blocks[0].compile) for cell in kernels if blocks),
        replace(own, checkpointing=True, micro_batch=LARGEST * micro_batch),
        replace(own, micro_batch=LARGEST * micro_batch),
        replace(own, micro_batch=1),
    ]
    return tuple(dict.fromkeys(chosen))


class Embeddings:
    """Embeddings of some prompts, in main memory; nothing of the encoders is kept.

    Args:
        encode: Computes them, as a policy does.
        prompts: The prompts.
        device: Where they are wanted.
    """

    def __init__(self, encode: Any, prompts: Sequence[str], device: str) -> None:
        self._known = {
            prompt: tuple(part[0].cpu() for part in encode([prompt])) for prompt in set(prompts)
        }
        self._device = device

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return embeddings ``[n, L, D]`` and pooled ones ``[n, E]``, on the device."""
        embeds, pooled = zip(*(self._known[prompt] for prompt in prompts), strict=True)
        return torch.stack(embeds).to(self._device), torch.stack(pooled).to(self._device)


class Sweep:
    """Measures cells one after the other until the time is up.

    Each combination of settings has a policy of its own, with equal weights, which draws a small
    rollout and never moves: its learning rate is 0. So every update is the first on its rollout,
    and ``ratio_gap`` is what rounding differs by between sampling and training.

    Args:
        settings: The recipe.
        sizes: Sizes of the pipeline.
        device: 'cuda' or 'cpu'.
        encode: Returns embeddings of the prompts of the first rollout.
        rewards: Rewards without a model, as many as the recipe has.
        geometry: How the recipe's rollouts were cut.
    """

    def __init__(
        self,
        settings: Config,
        sizes: Sizes,
        *,
        device: str,
        encode: Embeddings,
        rewards: Mapping[str, Any],
        geometry: Geometry,
    ) -> None:
        self.settings, self.sizes, self.device = settings, sizes, device
        self.encode, self.rewards, self.geometry = encode, rewards, geometry
        self.clock: Callable[[], float] = clock_of(device)
        self._stack = ExitStack()
        self._at: tuple[Cell, Trainer, Rollout, float] | None = None  # the last, ready for more

    def measure(self, report: Report, *, until: float) -> None:
        """Measure as many cells as there is time for; the others are named.

        Args:
            report: Gets the list ``sweep``, anew after each cell.
            until: When no further cell begins, by ``time.monotonic``.
        """
        plan = cells(self.settings, self.geometry.micro_batch, device=self.device)
        rows: list[dict[str, Any]] = []
        left: list[dict[str, Any]] = [dataclasses.asdict(cell) for cell in plan]
        report.add(sweep=rows, not_reached=left)
        with self._stack:
            for cell in plan:
                if time.monotonic() >= until:
                    break
                row = left.pop(0)
                try:
                    row |= {"status": "measured", **self._cell(cell)}
                except Exception as error:  # kernels and compilers raise anything; others follow
                    status = "out of memory" if out_of_memory(error) else "failed"
                    row |= {"status": status, "error": described(error)}
                    if status == "failed":
                        report.problem(f"sweep {cell}", error)
                    forget(error)
                if row["status"] != "measured":  # what is left of it is not to be used again
                    self._leave()
                rows.append(row)
                report.add(sweep=rows, not_reached=left)
            self._at = None

    def _cell(self, cell: Cell) -> dict[str, Any]:
        """Measure a cell, with the policy of the one before if that has the same settings."""
        alike = replace(cell, micro_batch=1)
        if self._at is None or self._at[0] != alike:
            self._leave()
            trainer = self._stack.enter_context(self._variant(cell))
            self._at = (alike, trainer, *self._draw(trainer))
        _, trainer, rollout, sampling = self._at
        return {"sample_seconds": sampling} | self._update(trainer, rollout, cell.micro_batch)

    def _leave(self) -> None:
        self._at = None
        self._stack.close()

    @contextmanager
    def _variant(self, cell: Cell) -> Iterator[Trainer]:
        """Return a trainer of a policy that is built with a cell's settings."""
        settings = cell.applied(self.settings)
        policy, cut = settings.policy, self.geometry
        settings = replace(
            settings,
            loss=replace(settings.loss, ratio_tolerance=1e9),
            trainer=replace(
                settings.trainer, sample_batch=cut.sample_batch, micro_batch=cut.micro_batch
            ),
        )
        pipeline = random_pipeline(
            self.sizes,
            device=self.device,
            dtype=DTYPES[policy.dtype],
            vae_dtype=DTYPES[policy.vae_dtype],
            encoders=False,
        )
        with tempfile.TemporaryDirectory() as folder:
            with redirect_stdout(io.StringIO()):  # assembly says how rollouts are cut
                run, trainer = trainer_on(pipeline, settings, folder, self.rewards)
            assert isinstance(trainer.policy, SD3Policy)
            trainer.policy.encode = self.encode  # type: ignore[assignment]
            trainer.stepper.lr = lambda count: 0.0
            try:
                yield trainer
            finally:
                run.close()
                del run, trainer, pipeline
                if cell.compile not in (None, "off"):
                    torch.compiler.reset()
                gc.collect()
                if self.device == "cuda":
                    torch.cuda.empty_cache()

    def _draw(self, trainer: Trainer) -> tuple[Rollout, float]:
        """Return a batch, repeated for the largest micro-batch, and the seconds of an image."""
        size = self.geometry.sample_batch
        requests = trainer.sampler.requests(0)[:size]
        trainer.policy.sample(requests, step=0)  # warms up
        start = self.clock()
        rollout = trainer.policy.sample(requests, step=0)
        seconds = (self.clock() - start) / len(requests)
        count = LARGEST * self.geometry.micro_batch
        return rollout.select(torch.arange(count) % len(requests)), seconds

    def _update(self, trainer: Trainer, rollout: Rollout, micro_batch: int) -> dict[str, Any]:
        """Take an optimizer step twice; return seconds of an image, memory, and the gap."""
        size = self.geometry.sample_batch
        trainer.geometry = trainer.steps.geometry = Geometry(
            groups=1,
            group_size=len(rollout),
            updates=1,
            world_size=1,
            sample_batch=size,
            micro_batch=micro_batch,
        )
        scalarization = even_objectives(trainer, rollout)
        seconds = []
        for _ in range(2):  # the first warms up, and may compile
            peak_bytes()
            start = self.clock()
            done = trainer.update.improve(rollout, scalarization)
            seconds.append((self.clock() - start) / len(rollout))
        return {
            "update_seconds": seconds[1],
            "first_update_seconds": seconds[0],
            "peak_bytes": peak_bytes(),
            "ratio_gap": done.metrics["policy/ratio_gap"],
        }


def even_objectives(trainer: Trainer, rollout: Rollout) -> Scalarization:
    """Return random advantages of a trainer's objectives, which are weighed alike.

    So an update costs what it costs with the recipe's method, and nothing depends on what that
    method has seen before.

    Args:
        trainer: Its objectives and processes.
        rollout: The n samples.
    """
    names, n = trainer.objectives, len(rollout)
    source = torch.Generator().manual_seed(0)
    matrix = RewardMatrix(
        names=names,
        values=torch.randn(len(names), n, generator=source, dtype=torch.float64),
        groups=torch.zeros(n, dtype=torch.int64),
        prompts=tuple(request.prompt for request in rollout.requests),
    )
    normalizer = GDPO(names)
    return Scalarization(
        normalizer=normalizer,
        weighting=Static(names),
        comm=trainer.comm,
        step=0,
        credit=Credit(matrix=matrix),
        advantages=normalizer.per_objective(matrix),
        clip=trainer.steps.settings.advantage_clip,
    )


def _installed(names: Sequence[str]) -> list[str]:
    """Return those of the attention backends that diffusers finds installed."""
    found = []
    for name in names:
        try:
            backend(name)
        except ValueError:
            continue
        found.append(name)
    return found
