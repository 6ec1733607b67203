"""Evaluation during training: held-out prompts, drawn and scored as deployment would."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from moa_diffusion.config.schema import EvaluationConfig
from moa_diffusion.distributed import agreed, gather_shard_objects, gather_shards, shard
from moa_diffusion.files import png
from moa_diffusion.files.captions import captioned, score_text
from moa_diffusion.files.writing import write_text
from moa_diffusion.monitoring import drift
from moa_diffusion.monitoring.progress import Progress
from moa_diffusion.monitoring.standing import Standing, standings
from moa_diffusion.policies.base import Policy
from moa_diffusion.scoring import Scorer
from moa_diffusion.statistics.groups import mean_and_error, same_prompt, spread_within
from moa_diffusion.storage.log import RunLog
from moa_diffusion.types import Outputs, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What one evaluation found, equal on every process."""

    step: int  # rollouts finished
    names: tuple[str, ...]  # K, objectives and rewards that are not trained on
    values: Tensor  # [K, M] float64, NaN: does not apply
    prompts: Tensor  # [M] int64, the prompt of each sample, equal for equal texts
    statistics: Mapping[
        str, Tensor
    ]  # [M] by name, of the outputs and what the policy knows of them
    gaps: Mapping[str, float]  # deployed minus rollout, same prompts and seeds, by objective
    metrics: Mapping[str, float]


class HeldOut:
    """Draws the same requests at every call, whatever the number of processes.

    Args:
        requests: M samples to draw; their seeds fix the outputs.
        settings: The section ``evaluation``; of what is drawn, the first outputs are shown, and
            the first are also drawn as rollouts draw them. With a resolution, which is not that of
            rollouts, the two are not compared.
        drawing: Names the settings that outputs depend on beside the requests and the weights.
        policy: The policy that draws the outputs.
        scorer: The K reward heads, those that are not trained on included.
        training: The heads of the objectives, for the comparison with rollouts.
        batch: Samples per forward pass.
        log: Where every sample's rewards go, and beside them sheets of images.
        progress: How far the run is, and whether this process shows a bar.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        settings: EvaluationConfig,
        drawing: str,
        policy: Policy,
        scorer: Scorer,
        training: Scorer,
        batch: int,
        log: RunLog,
        progress: Progress,
    ) -> None:
        self.requests = tuple(requests)
        self.settings, self.policy = settings, policy
        self.scorer, self.training = scorer, training
        self.batch, self.log = batch, log
        self.comm, self.bars = progress.comm, progress.bars
        self._device = next(iter(policy.trainable().values())).device
        drawn = [[request.prompt, request.seed] for request in self.requests]
        # Evaluations with another one cannot be compared with these, nor those in another unit.
        text = json.dumps([drawn, scorer.names, drawing, spread_within.__name__])
        self.identity = blake2b(text.encode(), digest_size=8).hexdigest()
        # [K], of the policy as training starts from it: mean, and spread within a prompt.
        self.base = self.unit = torch.full((len(scorer.names),), torch.nan, dtype=torch.float64)
        # [K, M], the rewards of the start and of the last evaluation; NaN before.
        self.start = self.latest = self.base[:, None].repeat(1, len(self.requests))

    @torch.no_grad()
    def try_rewards(self) -> None:
        """Score two outputs with the heads that are not trained on, before many are drawn.

        Raises:
            RewardError, ProcessError: As ``Scorer.try_out``.
        """
        watched = [name for name in self.scorer.names if name not in self.training.names]
        if watched:
            requests = self.requests[: min(2, self.batch)]
            with agreed(self.comm):
                self.policy.expect([request.prompt for request in requests])
                drawn = self.policy.generate(requests).outputs
            self.scorer.try_out(requests, drawn, names=watched)

    @torch.no_grad()
    def __call__(self, step: int, *, before_batch: Callable[[], None]) -> Evaluation:
        """Draw as deployment would, score, compare with the start and with rollouts.

        Outputs of one prompt are alike, so the standard error is that of the mean over prompts,
        which are distinct texts. The gain is over the policy as training starts from it, in units
        of that one's spread within a prompt (``spread_within``): of one scale for all rewards,
        whatever their unit, and for any number of outputs per prompt.

        Args:
            step: Rollouts finished; at 0 the policy is what training starts from: the base model,
                or with ``policy.adapter`` the model with that LoRA.
            before_batch: Called on all processes before each batch.

        Raises:
            RewardError, ProcessError: On all processes, if a head fails or nothing can be written.
        """
        self._expect(self.requests)
        known: list[Mapping[str, Tensor]] = []

        def draw(batch: Sequence[Request]) -> Outputs:
            generated = self.policy.generate(batch)
            known.append(generated.statistics)
            return generated.outputs

        scored = self.scorer.draw_and_score(
            self.requests,
            draw,
            batch=self.batch,
            title="evaluate",
            before_batch=before_batch,
            bars=self.bars,
            lockstep=self.policy.lockstep,
        )
        shards = shard(len(self.requests), self.batch, self.comm)
        texts: Sequence[str] = ()
        if isinstance(scored.outputs, Tensor):
            self._show_images(step, scored.outputs, scored.values, shards)
        else:
            texts = gather_shard_objects(scored.outputs, shards, self.comm)
            with agreed(self.comm, as_one=True):
                self._show_texts(step, texts)
        values = scored.values  # [K, M]
        with agreed(self.comm, as_one=True):
            self.log.write_evaluation(
                step, self.requests, self.scorer.names, values, scored.extra, texts
            )
        prompts = self._prompts()
        siblings = torch.tensor([request.group for request in self.requests])
        if step == 0:
            self.base, self.start = values.nanmean(1), values
            self.unit = spread_within(values, siblings)
        self.latest = values
        gains = (values.nanmean(1) - self.base) / self.unit
        metrics: dict[str, float] = {}
        for name, row, gain in zip(self.scorer.names, values, gains.tolist(), strict=True):
            mean, error = mean_and_error(row, prompts)
            metrics |= {f"eval_mean/{name}": mean, f"eval_sem/{name}": error}
            if step:
                metrics[f"eval_gain/{name}"] = gain
        statistics = {
            name: gather_shards(numbers, shards, self.comm)
            for name, numbers in {
                **drift.statistics(scored.outputs, device=self._device, batch=self.batch),
                **{name: torch.cat([part[name] for part in known]) for name in known[0]},
            }.items()
        }
        means = {name: float(numbers.mean()) for name, numbers in statistics.items()}
        means["diversity"] = self._diversity(scored.outputs, shards, siblings)
        metrics |= drift.prefixed("eval_", scored.outputs, means)
        gaps = self._gaps(step, values, before_batch)
        return Evaluation(
            step=step,
            names=self.scorer.names,
            values=values,
            prompts=prompts,
            statistics=statistics,
            gaps=gaps,
            metrics=metrics | {f"eval_gap/{name}": gap for name, gap in gaps.items()},
        )

    def standings(self) -> tuple[Standing, ...]:
        """Return where each reward stood in the last evaluation; NaN before the first."""
        return standings(
            self.scorer.names,
            self.training.names,
            base=self.base,
            unit=self.unit,
            start=self.start,
            latest=self.latest,
            prompts=self._prompts(),
        )

    def _prompts(self) -> Tensor:
        return same_prompt([request.prompt for request in self.requests])

    def _gaps(
        self, step: int, values: Tensor, before_batch: Callable[[], None]
    ) -> dict[str, float]:
        """Return the mean rewards of deployed outputs minus those of rollouts, prompt by prompt."""
        requests = self.requests[: self.settings.rollout_images]
        if not requests or self.settings.resolution:
            return {}
        self._expect(requests)
        scored = self.training.draw_and_score(
            requests,
            lambda batch: self.policy.sample(batch, step=step).outputs,
            batch=self.batch,
            title="as rollouts",
            before_batch=before_batch,
            bars=self.bars,
            lockstep=self.policy.lockstep,
        )
        rows = [self.scorer.names.index(name) for name in self.training.names]
        gaps = (values[rows, : len(requests)] - scored.values).nanmean(1)  # [objectives]
        return dict(zip(self.training.names, gaps.tolist(), strict=True))

    def _expect(self, requests: Sequence[Request]) -> None:
        """Let the policy make ready for this process's shard of the requests."""
        own = shard(len(requests), self.batch, self.comm)[self.comm.rank] or [0]
        self.policy.expect([requests[i].prompt for i in own])

    def _show_images(
        self, step: int, images: Tensor, values: Tensor, shards: Sequence[Sequence[int]]
    ) -> None:
        """Write a sheet of the first images, with prompt and rewards ``[K, M]`` under each."""
        if shown := min(self.settings.pictures, len(self.requests)):
            wanted = [[i for i in items if i < shown] for items in shards]
            first = gather_shards(images, wanted, self.comm)
            with agreed(self.comm, as_one=True):
                if self.comm.rank == 0:
                    cells = [
                        captioned(png.to_image(picture), request.prompt, self._scores(rewards))
                        for picture, request, rewards in zip(
                            first, self.requests, values.T.tolist(), strict=False
                        )
                    ]
                    columns = math.ceil(math.sqrt(shown))
                    self.log.write_sheet(step, png.grid(torch.stack(cells), columns=columns))

    def _scores(self, rewards: Sequence[float]) -> list[str]:
        """Return the K rewards of a sample in words."""
        return [
            f"{name} {score_text(reward)}"
            for name, reward in zip(self.scorer.names, rewards, strict=True)
        ]

    def _show_texts(self, step: int, texts: Sequence[str]) -> None:
        """Write the first texts under their prompts."""
        if self.comm.rank > 0 or not self.settings.pictures:
            return
        parts = [
            f"{request.prompt}\n-> {text}\n"
            for request, text in zip(self.requests[: self.settings.pictures], texts, strict=False)
        ]
        target = self.log.folder / "samples" / f"step-{step:06d}.txt"
        write_text(target, "\n".join(parts))

    def _diversity(
        self, outputs: Outputs, shards: Sequence[Sequence[int]], siblings: Tensor
    ) -> float:
        prints = drift.fingerprints(outputs)
        if isinstance(prints, Tensor):
            return drift.diversity(gather_shards(prints, shards, self.comm), siblings)
        return drift.diversity(gather_shard_objects(prints, shards, self.comm), siblings)

    def state_dict(self) -> dict[str, Any]:
        """Return what gains are measured against, what it was measured on, and the last rewards."""
        return {
            "base": self.base,
            "unit": self.unit,
            "identity": self.identity,
            "start": self.start,
            "latest": self.latest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to the saved start and unit of the gains."""
        self.base, self.unit = state["base"], state["unit"]
        # Checkpoints of earlier versions have no samples: errors of gains then stay unknown.
        self.start = state.get("start", self.start)
        self.latest = state.get("latest", self.latest)
