"""Runs on a policy of six numbers, and what there is to see of them."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from moa_diffusion import assembly
from moa_diffusion.config import Config, check, from_dict
from moa_diffusion.storage.log import read_metrics
from moa_diffusion.training.loop import Run

METHODS = [*assembly.METHODS, "apex_gradients", "upgrad_probe"]


# So that what methods remember is used within a few rollouts.
OPTIONS = {
    "ddpo": {"normalizer": {"size": 8, "min_count": 4}},
    "apex": {"weighting": {"warmup": 1}},
    "apex_gradients": {"method": "apex", "weighting": {"warmup": 1, "conflict": "gradients"}},
    "mopo": {"normalizer": {"pool_size": 4}},
    "upgrad_probe": {"method": "upgrad"},
}


GRADIENTS = {"upgrad_probe": {"mode": "probe", "every": 2, "share": 0.5}}


def with_method(name: str) -> dict:
    """Settings that choose one of METHODS."""
    return {
        "objectives": {"method": name} | OPTIONS.get(name, {}),
        "gradients": GRADIENTS.get(name, {}),
    }


def red(images, prompts):
    return images[:, 0].mean((1, 2))


def green(images, prompts):
    return images[:, 1].mean((1, 2))


def never(images, prompts):
    return [math.nan] * len(prompts)


def sometimes(images, prompts):
    values = images[:, 2].mean((1, 2)).double()
    values[::3] = math.nan
    return values


def constant(images, prompts):
    return [0.1] * len(prompts)


def by_prompt(images, prompts):
    return [float(ord(prompt[0])) for prompt in prompts]


def nothing(images, prompts):
    return [math.nan] * len(prompts)


def tagged(images, prompts, tag):
    return [0.0] * len(prompts)


def settings(folder: Path, **changes: object) -> Config:
    """A run of the toy; ``changes`` are dotted keys with ``__`` for the dot."""
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a\nb\nc\n")
    values: dict = {
        "output_dir": str(folder),
        "policy": {"name": "toy"},
        "sampling": {"steps": 2},
        "prompts": {"train": str(prompts), "heldout": str(prompts)},
        "rewards": {name: {"path": f"{__file__}:{name}"} for name in ("red", "green")},
        "objectives": {"method": "dual_stage"},
        "loss": {"clip_range": 0.2},
        "optimizer": {"lr": 0.03},
        "ema": {"decay": 0.5, "every": 2},
        "trainer": {
            "steps": 4,
            "groups": 4,
            "group_size": 4,
            "updates": 2,
            "sample_batch": 8,
            "micro_batch": 8,
        },
        "checkpoint": {"every": 0},
        "evaluation": {"every": 0},
        "log": {"trackers": []},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[section] = value
    config = from_dict(values)
    check(config)
    return config


def make(folder: Path, **changes: object) -> Run:
    trainer = assembly.trainer(settings(folder, **changes))
    trainer.progress.bars = False
    return trainer


def rewards(*names: str) -> dict[str, dict[str, str]]:
    return {name: {"path": f"{__file__}:{name}"} for name in names}


def drift(trainer: Run) -> torch.Tensor:
    return trainer.policy.trainable()["drift"].detach().clone()


def rows(folder: Path) -> list[dict]:
    """Metrics without what a clock measured."""
    return [
        {name: value for name, value in row.items() if not name.startswith("seconds/")}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def score_files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((folder / "scores").iterdir())}


def same(left: object, right: object) -> bool:
    """Equal to the last bit, through nested containers."""
    if isinstance(left, torch.Tensor):
        return torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def state(trainer: Run) -> dict:
    """All of it but what a clock says."""
    return {key: value for key, value in trainer.state_dict().items() if key != "seconds"}


def at_rollout(trainer: Run, number: int, act: Callable[[], None]) -> None:
    """Call ``act`` before the first batch of a rollout (0 = the first)."""
    sample = trainer.policy.sample

    def wrapped(requests, *, step):
        if step == number:
            act()
        return sample(requests, step=step)

    trainer.policy.sample = wrapped


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def broken_log_probs(trainer: Run, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    log_probs = trainer.policy.log_probs

    def wrapped(rollout, steps, *, with_kl=False):
        terms = log_probs(rollout, steps, with_kl=with_kl)
        return terms._replace(log_probs=change(terms.log_probs))

    trainer.policy.log_probs = wrapped
