"""Runs on images that are noised again: they learn, resume, go back, and need rewards to do so."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.pipelines import SMALLEST, random_pipeline
from moa_diffusion import assembly
from moa_diffusion.config import check, from_dict
from moa_diffusion.processes.stopping import Interrupted
from moa_diffusion.storage import checkpoint
from moa_diffusion.training.loop import Run
from moa_diffusion.types import Request
from toy_runs import ask_to_stop, at_rollout, rows, same, score_files, state


@pytest.fixture(scope="module")
def pipeline() -> Any:
    shape = {**SMALLEST.transformer, "sample_size": 8, "pos_embed_max_size": 4}
    return random_pipeline(replace(SMALLEST, transformer=shape))


def redness(images: Any, prompts: Any) -> Any:
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def contrast(images: Any, prompts: Any) -> Any:
    return images.flatten(1).std(1)


def half(images: Any, prompts: Any) -> Any:
    """Applies to every other sample."""
    values = contrast(images, prompts).double()
    values[::2] = math.nan
    return values


def never(images: Any, prompts: Any) -> Any:
    return [math.nan] * len(prompts)


def make(folder: Path, pipeline: Any, *, preset: str = "nft", **changes: Any) -> Run:
    """A run of two groups of four images; ``changes`` are sections."""
    folder.parent.mkdir(exist_ok=True)
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a red circle\na blue circle\n")
    names = changes.pop("rewards", ("redness", "contrast"))
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "policy": {"name": "sd3", "max_sequence_length": 16, "lora": {"rank": 4}, "step_batch": 2},
        "sampling": {"resolution": 16, "steps": 4, "guidance": 1.0},
        "prompts": {"train": str(prompts), "heldout": str(prompts)},
        "rewards": {name: {"path": f"{__file__}:{name}"} for name in names},
        "objectives": {"method": "dual_stage"},
        "loss": {"kind": "forward", "forward": {"preset": preset, "draws": 2}},
        "optimizer": {"lr": 3e-3},
        "trainer": {"steps": 4, "groups": 2, "group_size": 4, "updates": 2, "micro_batch": 4},
        "checkpoint": {"every": 0},
        "evaluation": {"every": 0, "steps": 4, "guidance": 1.0},
        "log": {"trackers": []},
    }
    for section, change in changes.items():
        if isinstance(change, dict):
            change = values.get(section, {}) | change
        values[section] = change
    settings = from_dict(values)
    check(settings)
    run = assembly.trainer(settings, copy.deepcopy(pipeline))
    run.progress.bars = False
    return run


@pytest.mark.parametrize("preset", ["nft", "awm", "ram"])
def test_a_reward_improves(tmp_path: Path, pipeline: Any, preset: str) -> None:
    """Of images that are the latents, where the last layer is trained: a decoder of no training
    has nothing to say.

    Samples of the same seeds end at least 3.5 of their standard deviations higher.
    """
    run = make(
        tmp_path / "run",
        pipeline,
        preset=preset,
        policy={"lora": {"rank": 4, "target_modules": ["proj_out"]}},
        rewards=("redness",),
        loss={"kl_weight": 0.02 if preset == "ram" else 0.0},  # RAM of 50 times the advantage
        optimizer={"lr": 0.02},
        trainer={"steps": 6, "group_size": 8, "updates": 1, "micro_batch": 8},
    )
    policy: Any = run.policy
    policy._decode = lambda latents: latents[:, :3].sigmoid()
    policy.prepare(["a red circle", "a blue circle"])
    requests = [Request(prompt="a red circle", seed=i) for i in range(16)]
    before = redness(policy.generate(requests).outputs, [])
    run.run()
    after = redness(policy.generate(requests).outputs, [])
    assert (after - before).min() > 2 * before.std()
    row = rows(tmp_path / "run")[-1]
    assert ("policy/pull" in row) == (preset != "ram")
    assert row.keys().isdisjoint({"policy/clip_fraction", "policy/ratio_gap"})


@pytest.mark.parametrize(("method", "preset"), [("upgrad", "nft"), ("mopo", "awm")])
def test_a_run_that_was_stopped_ends_in_the_same_bits(
    tmp_path: Path, pipeline: Any, method: str, preset: str
) -> None:
    """With its copies, which an alarm's way back takes along, too."""
    options: dict[str, Any] = {
        "preset": preset,
        "objectives": {"method": method}
        | ({"normalizer": {"pool_size": 2}} if method == "mopo" else {}),
        "loss": {
            "kind": "forward",
            "kl_weight": 0.01,
            "forward": {"preset": preset, "draws": 2, "old": {"weight": 1.0, "decay_rate": 0.2}},
        },
        "trainer": {"steps": 3, "groups": 1, "group_size": 4, "updates": 2, "micro_batch": 2},
        "checkpoint": {"every": 1, "keep": 0},
    }
    straight = make(tmp_path / "straight", pipeline, **options)
    straight.run()

    stopped = make(tmp_path / "resumed", pipeline, **options)
    learner: Any = stopped.learner
    expect = learner.expect
    learner.expect = lambda drawn: (stopped.completed == 2 and ask_to_stop(), expect(drawn))
    with pytest.raises(Interrupted):
        stopped.run()
    resumed = make(tmp_path / "resumed", pipeline, resume="latest", **options)
    assert resumed.completed == 2
    resumed.run()
    assert same(state(resumed), state(straight))
    assert rows(tmp_path / "resumed") == rows(tmp_path / "straight")
    assert score_files(tmp_path / "resumed") == score_files(tmp_path / "straight")

    saved = checkpoint.load_state(checkpoint.step_folder(tmp_path / "straight", 1))["updater"]
    found = straight.learner.stepper.state_dict
    assert not same(found()["copies"], saved["copies"])
    alarm: Any = SimpleNamespace(to_step=1)
    straight._roll_back(alarm)
    assert same(checkpoint.to_cpu(found()), saved)
    assert not same(found()["copies"]["old"], found()["trainable"])


def test_a_rollout_that_fails_at_its_end_takes_the_copies_back(
    tmp_path: Path, pipeline: Any
) -> None:
    """They have followed the optimizer steps by then."""
    run = make(tmp_path / "run", pipeline, optimizer={"lr": 0.02})
    learner: Any = run.learner
    record, before = learner.record, []

    def failing(*given: Any) -> None:
        if run.completed == 1:
            assert not same(learner.stepper.state_dict()["copies"], before[-1]["copies"])
            raise MemoryError("of the device")
        record(*given)

    learner.record = failing
    at_rollout(run, 1, lambda: before.append(checkpoint.to_cpu(learner.stepper.state_dict())))
    with pytest.raises(MemoryError):
        run.run()
    assert same(learner.stepper.state_dict(), before[-1])
    assert not run.torn


def test_a_checkpoint_without_the_copies_is_refused(tmp_path: Path, pipeline: Any) -> None:
    options: dict[str, Any] = {"trainer": {"steps": 1, "groups": 2, "group_size": 4}}
    make(tmp_path / "run", pipeline, preset="ram", loss={"kl_weight": 1.0}, **options).run()
    with pytest.raises(ValueError, match=r"resume: loss\.forward has other copies .* lacks old"):
        make(tmp_path / "run", pipeline, resume="latest", **options)


@pytest.mark.parametrize("rewards", [("half",), ("redness", "half")])
def test_a_sample_without_any_reward_adds_nothing(
    tmp_path: Path, pipeline: Any, rewards: tuple[str, ...]
) -> None:
    """Not even a pull; one that has some of the rewards gets what they say."""
    trainer = {"updates": 1, "micro_batch": 4}
    optimizer = {"max_grad_norm": 1e9}
    run = make(tmp_path / "run", pipeline, rewards=rewards, trainer=trainer, optimizer=optimizer)
    policy: Any = run.policy
    learner: Any = run.learner
    policy.prepare(["a red circle", "a blue circle"])
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1)  # away from the copies
    before, seen = checkpoint.to_cpu(learner.stepper.state_dict()), []
    parameters = list(policy.trainable().values())
    learner.stepper.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in parameters)
    )
    rollout = policy.sample(learner.sampler.requests(0), step=0)
    run.step()
    lines = score_files(tmp_path / "run")["step-000001.jsonl"].splitlines()
    found = [json.loads(line) for line in lines]
    advantage = torch.tensor([row["advantage"] for row in found])
    applies = [any(row[f"reward/{name}"] is not None for name in rewards) for row in found]
    chosen = torch.tensor(applies).nonzero()[:, 0]
    assert len(chosen) == 4 * len(rewards)
    assert advantage[chosen].abs().min() > 1e-3

    learner.stepper.load_state_dict(before)
    part, expected = rollout.select(chosen), torch.zeros(())
    for steps in policy.step_chunks(2):
        terms = policy.log_probs(part, steps)
        losses = terms.pull - advantage[chosen, None] * terms.log_probs
        gradients = torch.autograd.grad(losses.sum() / (2 * len(chosen)), parameters)
        expected = expected + torch.cat([gradient.flatten() for gradient in gradients])
    gradient = torch.cat([values.flatten() for values in seen])
    # Sums of some 100 products of float32, in micro-batches of another size.
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("method", ["dual_stage", "upgrad"])
def test_rollouts_without_rewards_do_no_harm(tmp_path: Path, pipeline: Any, method: str) -> None:
    run = make(
        tmp_path / "run",
        pipeline,
        rewards=("never",),
        objectives={"method": method},
        optimizer={"weight_decay": 0.0},
        trainer={"steps": 2},
    )
    before = checkpoint.to_cpu(dict(run.policy.trainable()))
    run.run()
    assert same(checkpoint.to_cpu(dict(run.policy.trainable())), before)
    assert [row["policy/pull"] for row in rows(tmp_path / "run")] == [0.0, 0.0]
    assert [row["policy/skipped_updates"] for row in rows(tmp_path / "run")] == [0.0, 0.0]
    update: Any = run.learner.update  # type: ignore[attr-defined]
    assert method != "upgrad" or not update.check._passed  # nothing was looked at
