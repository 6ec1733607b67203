"""The training loop around a policy of six numbers: it learns, resumes exactly, and fails well."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from moa_diffusion import assembly
from moa_diffusion.config import Config, check, from_dict
from moa_diffusion.data.seeds import derive_seed
from moa_diffusion.monitoring.lessons import Lessons
from moa_diffusion.processes.stopping import Interrupted
from moa_diffusion.scoring import RewardError
from moa_diffusion.statistics.groups import mean_and_error
from moa_diffusion.storage import checkpoint
from moa_diffusion.storage.log import read_metrics
from moa_diffusion.training.loop import Run
from moa_diffusion.training.stepper import TrainingError
from moa_diffusion.types import ConfigError, Request, RewardMatrix
from rewards import RewardHead

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


# Reward functions: the trainers below import them from this file by its path.


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


# ---------------------------------------------------------------------- it learns


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kl_weight", [0.0, 0.01])
def test_two_compatible_rewards_both_improve(tmp_path, method, kl_weight):
    trainer = make(
        tmp_path / "run",
        **with_method(method),
        trainer__steps=12,
        optimizer__lr=0.05,
        loss__kl_weight=kl_weight,
        rewards=rewards("red", "green") if kl_weight else rewards("red", "green", "sometimes"),
    )
    trainer.run()
    found = rows(tmp_path / "run")
    for name in ("red", "green"):
        curve = [row[f"reward_mean/{name}"] for row in found]
        assert sum(curve[-3:]) / 3 > sum(curve[:3]) / 3 + 0.1, name
    assert len(found) == 12
    assert ("policy/kl" in found[0]) == bool(kl_weight)
    if kl_weight:
        assert found[0]["policy/kl"] < found[-1]["policy/kl"]


def test_kl_holds_the_policy_back(tmp_path):
    ends = []
    for weight in (0.0, 0.1, 10.0):
        trainer = make(tmp_path / f"{weight}", trainer__steps=10, loss__kl_weight=weight)
        trainer.run()
        ends.append(float(drift(trainer).norm()))
    assert ends[0] > ends[1] > ends[2]


def test_a_negative_weight_minimises(tmp_path):
    options = rewards("red", "green")
    options["green"]["weight"] = -1.0
    trainer = make(tmp_path / "run", rewards=options, trainer__steps=12)
    trainer.run()
    total = drift(trainer).sum(0)
    assert total[0] > 0.1
    assert total[1] < -0.1


def test_the_first_update_is_the_policy_gradient(tmp_path):
    """One plain step: by hand, the gradient of mean(-A log p) of the samples drawn."""
    trainer = make(tmp_path / "run", trainer__updates=1, optimizer__max_grad_norm=1e9)
    seen = {}
    trainer.learner.stepper.optimizer.register_step_pre_hook(
        lambda *_: seen.update(gradient=trainer.policy.drift.grad.clone())
    )
    rollout = trainer.policy.sample(trainer.learner.sampler.requests(0), step=0)
    trainer.step()
    scores = score_files(tmp_path / "run")["step-000001.jsonl"].splitlines()
    advantage = torch.tensor([json.loads(line)["advantage"] for line in scores])
    points = rollout.trace["points"]
    steps = points[:, 1:] - points[:, :-1]  # [N, T, 3]; the drift is 0
    grad_log_prob = steps / trainer.policy.std**2 / 3  # a mean over 3 dimensions
    expected = -(advantage[:, None, None] * grad_log_prob).sum(0) / advantage.numel() / 2
    # Sums of 16 terms of up to some tens in float32: 3e-8 apart.
    torch.testing.assert_close(seen["gradient"], expected, rtol=1e-4, atol=1e-6)


def test_the_update_of_mopo_climbs_its_lagrangian(tmp_path):
    """E S_0 + lambda E S_1 - beta KL, by autograd; the update is a positive multiple of it."""
    trainer = make(
        tmp_path / "run",
        trainer__updates=1,
        loss__kl_weight=0.5,
        optimizer__max_grad_norm=1e9,
        objectives={
            "method": "mopo",
            "normalizer": {"pool_size": 4},
            "weighting": {"bounds": 0.9, "proportional": 2.0},
        },
    )
    policy, seen = trainer.policy, {}
    with torch.no_grad():
        policy.drift.copy_(torch.tensor([[0.2, -0.1, 0.1], [-0.1, 0.15, 0.05]]))
    before = policy.drift.detach().clone()
    trainer.learner.stepper.optimizer.register_step_pre_hook(
        lambda *_: seen.update(gradient=policy.drift.grad.clone())
    )
    rollout = policy.sample(trainer.learner.sampler.requests(0), step=0)
    trainer.step()
    lines = score_files(tmp_path / "run")["step-000001.jsonl"].splitlines()
    found = [json.loads(line) for line in lines]
    values = torch.tensor([[row[f"reward/{name}"] for row in found] for name in ("red", "green")])
    matrix = RewardMatrix(
        names=("red", "green"),
        values=values.double(),
        groups=torch.tensor([row["group"] for row in found]),
        prompts=tuple(row["prompt"] for row in found),
    )
    multiplier = trainer.learner.weighting.multipliers[1]
    assert multiplier > 0.1
    S = trainer.learner.normalizer.win_rates(matrix)
    score = (S[0] + multiplier * S[1]).float()
    score = score - score.view(4, 4).mean(1).repeat_interleave(4)
    with torch.no_grad():
        policy.drift.copy_(before)
    policy.drift.grad = None
    log_probs, kl = policy.log_probs(rollout, slice(0, 2), with_kl=True)
    (-(score[:, None] * log_probs).mean() + 0.5 * kl.mean()).backward()
    expected = policy.drift.grad
    kl_alone = 0.5 * before / policy.std**2 / 6
    assert (expected - kl_alone).norm() > 0.3 * kl_alone.norm() > 0.1 * expected.norm()
    factor = seen["gradient"].norm() / expected.norm()
    assert factor > 1.5  # 1 / ((1 + L) sigma)
    # As above, and with a factor that is measured: 6e-8 apart.
    torch.testing.assert_close(seen["gradient"], factor * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 8, 80])
def test_reference_draws_are_spread_over_the_run(tmp_path, steps):
    """A rollout's windows differ by its number, so a pool of one rollout's would be biased."""
    trainer = make(
        tmp_path / "run",
        trainer__steps=steps,
        objectives={"method": "mopo", "normalizer": {"pool_size": 4}},
    )
    drawn: dict[tuple[str, int], int] = {}
    sample = trainer.policy.sample

    def watched(requests, *, step):
        drawn.update({(request.prompt, request.sibling): step for request in requests})
        return sample(requests, step=step)

    trainer.policy.sample = watched
    trainer.learner.draw_references(trainer.learner.sampler.requests(0))
    assert {prompt for prompt, _ in drawn} == {"a", "b", "c"}
    for sibling in range(4):
        (step,) = {drawn[prompt, sibling] for prompt in "abc"}
        assert sibling * steps // 4 <= step < (sibling + 1) * steps / 4 + 1
    assert max(drawn.values()) < steps
    assert trainer.learner._reference_steps() == [drawn["a", sibling] for sibling in range(4)]
    # Each draw is scored in the pool of its own prompt.
    for prompt, row in trainer.learner.normalizer.rows.items():
        seeds = [derive_seed(trainer.seed, "reference", prompt, sibling) for sibling in range(4)]
        outputs = sample([Request(prompt=prompt, seed=seed) for seed in seeds], step=0).images
        torch.testing.assert_close(
            trainer.learner.normalizer.pool[row, 0], red(outputs, []).double()
        )


def test_advantages_and_gradients_are_clipped(tmp_path):
    trainer = make(tmp_path / "run", loss__advantage_clip=0.5, optimizer__max_grad_norm=1e-3)
    norms = []
    trainer.learner.stepper.optimizer.register_step_pre_hook(
        lambda *_: norms.append(float(trainer.policy.drift.grad.norm()))
    )
    found = trainer.step()
    lines = score_files(tmp_path / "run")["step-000001.jsonl"].splitlines()
    advantages = [json.loads(line)["advantage"] for line in lines]
    assert max(advantages) == 0.5
    assert min(advantages) == -0.5
    assert norms == pytest.approx([1e-3] * 2, rel=1e-2)  # torch adds 1e-6 to the norm of 0.35
    assert found["policy/grad_norm"] > 1e-2  # what is logged is the norm before the clip


def test_heads_load_once_the_encoders_have_left(tmp_path):
    """And the policy hears of the prompts of a rollout or an evaluation before it draws any."""
    trainer = make(tmp_path / "run", trainer__steps=2, evaluation__every=2)
    calls = []

    def note(owner, name):
        inner = getattr(owner, name)

        def noted(*given, **options):
            prompts = {getattr(item, "prompt", item) for item in given[0]} if given else None
            calls.append((name, prompts))
            return inner(*given, **options)

        setattr(owner, name, noted)

    for name in ("prepare", "expect", "sample", "generate"):
        note(trainer.policy, name)
    note(trainer.heldout.scorer, "load")
    trainer.run()
    assert [name for name, _ in calls[:2]] == ["prepare", "load"]
    expected = None
    for name, prompts in calls[2:]:
        if name == "expect":
            expected = prompts
        else:
            assert prompts <= expected, name
    assert (
        sum(name == "expect" for name, _ in calls) == 1 + 2 + 2 * 2
    )  # rewards are tried first, then evaluations, and rollouts
    found = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert found["seconds/statistics"] is not None


# ---------------------------------------------------------------------- invariance


def test_batch_sizes_do_not_matter(tmp_path):
    ends = []
    for size in (2, 3, 8, 100):
        trainer = make(
            tmp_path / f"{size}",
            trainer__micro_batch=size,
            trainer__sample_batch=size,
            loss__kl_weight=0.01,
        )
        trainer.run()
        assert trainer.learner.geometry.micro_batch == {2: 2, 3: 2, 8: 8, 100: 8}[size]
        ends.append((drift(trainer), trainer.learner.stepper.ema.average["drift"]))
    for end in ends[1:]:
        for found, expected in zip(end, ends[0], strict=True):
            # Sums in float32 that are cut otherwise, of steps that add up to 0.2: 3e-8 apart.
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_same_run_twice_is_the_same_run(tmp_path):
    for name in ("one", "two"):
        make(tmp_path / name).run()
    assert rows(tmp_path / "one") == rows(tmp_path / "two")
    assert score_files(tmp_path / "one") == score_files(tmp_path / "two")
    other = make(tmp_path / "other", seed=1)
    other.run()
    assert rows(tmp_path / "other") != rows(tmp_path / "one")


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, method):
    """SIGTERM in the middle of rollout 4; then the same parameters, state, metrics and scores."""
    common = {
        **with_method(method),
        "trainer__steps": 6,
        "optimizer__warmup": 9,
        "evaluation__every": 2,
        "loss__kl_weight": 0.01,
    }
    straight = make(tmp_path / "straight", **common)
    straight.run()

    stopped = make(tmp_path / "resumed", **common)
    at_rollout(stopped, 3, ask_to_stop)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        stopped.run()
    assert signal.getsignal(signal.SIGTERM) == before
    assert "3 rollouts" in caught.value.__notes__[0]
    assert checkpoint.find("latest", tmp_path / "resumed").name == "step-000003"

    resumed = make(tmp_path / "resumed", resume="latest", **common)
    assert resumed.completed == 3
    resumed.run()
    assert torch.equal(drift(resumed), drift(straight))
    assert same(state(resumed), state(straight))
    assert rows(tmp_path / "resumed") == rows(tmp_path / "straight")
    assert score_files(tmp_path / "resumed") == score_files(tmp_path / "straight")


def test_evaluation_switched_on_at_a_resume(tmp_path):
    make(tmp_path / "run", trainer__steps=2, checkpoint__every=1).run()
    make(tmp_path / "run", trainer__steps=4, evaluation__every=2, resume="latest").run()
    last = rows(tmp_path / "run")[-1]
    assert last["eval_mean/red"] is not None
    assert last["eval_gain/red"] is None  # the base model was never evaluated


def test_more_rollouts_from_a_checkpoint(tmp_path):
    straight = make(tmp_path / "straight", trainer__steps=5)
    straight.run()
    make(tmp_path / "resumed", trainer__steps=2, checkpoint__every=1).run()
    resumed = make(tmp_path / "resumed", trainer__steps=5, resume="latest")
    resumed.run()
    assert same(state(resumed), state(straight))
    assert rows(tmp_path / "resumed") == rows(tmp_path / "straight")


def test_resuming_from_an_earlier_checkpoint_forgets_the_later_ones(tmp_path):
    """`latest` must not mean the abandoned branch, and pruning must not eat the new one."""
    folder = tmp_path / "run"
    make(folder, trainer__steps=4, checkpoint__every=1, checkpoint__keep=0).run()
    resumed = make(
        folder,
        trainer__steps=2,
        checkpoint__every=1,
        checkpoint__keep=1,
        resume=str(checkpoint.step_folder(folder, 1)),
    )
    resumed.run()
    assert [row["step"] for row in rows(folder)] == [1, 2]
    assert checkpoint.step_folder(folder, 2).is_dir()
    assert checkpoint.find("latest", folder) == checkpoint.step_folder(folder, 2)


def test_stopped_before_the_first_rollout(tmp_path):
    folder = tmp_path / "run"
    stopped = make(folder, evaluation__every=2)
    at_rollout(stopped, 0, ask_to_stop)
    with pytest.raises(Interrupted):
        stopped.run()
    make(folder, evaluation__every=2, resume="latest").run()
    assert [row["step"] for row in rows(folder)] == [0, 1, 2, 3, 4]


def test_checkpoints_hold_both_adapters_and_the_newest_are_kept(tmp_path):
    folder = tmp_path / "run"
    trainer = make(folder, trainer__steps=5, checkpoint__every=2, checkpoint__keep=2)
    trainer.run()
    kept = checkpoint.list_checkpoints(folder)
    assert [path.name for path in kept] == ["step-000004", "step-000005"]
    live = json.loads((kept[-1] / "drift.json").read_text())["drift"]
    average = json.loads((kept[-1] / "ema" / "drift.json").read_text())["drift"]
    assert live == drift(trainer).tolist()
    assert average == trainer.learner.stepper.ema.average["drift"].tolist()
    assert average != live


def test_weights_solved_at_every_step_scale_the_kl_as_the_normalizer_does(tmp_path, monkeypatch):
    """As weights of advantages do: a normalizer that divides the rewards divides the KL too."""
    ends = []
    for name, weight in (("divided", 0.5), ("none", 0.0)):
        trainer = make(
            tmp_path / name,
            loss={"clip_range": 0.2, "kl_weight": weight},
            objectives={"method": "upgrad"},
        )
        assert trainer.learner.update.fused
        monkeypatch.setattr(trainer.learner.normalizer, "kl_scale", lambda: 0.0, raising=False)
        with torch.no_grad():  # away from the reference, so that there is a KL
            trainer.policy.trainable()["drift"].add_(0.5)
        trainer.step()
        ends.append(trainer.policy.trainable()["drift"].detach().clone())
    assert torch.equal(*ends)


def test_cosines_are_those_of_this_rollouts_gradients_or_none(tmp_path, monkeypatch):
    trainer = make(tmp_path / "run", objectives={"method": "upgrad"})
    assert any(name.startswith("cosine/") for name in trainer.step())
    improve = trainer.learner.update.improve

    def never_finite(rollout, objectives, **options):
        spoilt = replace(objectives, advantages=objectives.advantages * math.nan)
        return improve(rollout, spoilt, **options)

    monkeypatch.setattr(trainer.learner.update, "improve", never_finite)
    assert not any(name.startswith("cosine/") for name in trainer.step())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": rewards("red")}, r"objectives \['red', 'green'\]. Found \['red'\]"),
        ({"rewards": rewards("green", "red")}, r"Found \['green', 'red'\]"),
        ({"seed": 5}, "seed 0. Found 5"),
        ({"sampling__steps": 3}, r"first drift: saved \(2, 3\), here \(3, 3\)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changes, message):
    folder = tmp_path / "run"
    make(folder, trainer__steps=1, checkpoint__every=1).run()
    with pytest.raises(ConfigError, match=f"^resume: .*{message}"):
        make(folder, resume="latest", **changes)


def test_another_method_is_refused(tmp_path):
    folder = tmp_path / "run"
    make(folder, trainer__steps=1, checkpoint__every=1).run()
    with pytest.raises(ConfigError, match="resume: "):
        make(folder, resume="latest", objectives={"method": "gdpo"})


@pytest.mark.parametrize("key", ["optimizer__lr", "optimizer__weight_decay", "weight"])
def test_a_setting_changed_on_resume_is_used_or_refused(tmp_path, key):
    """It must not be reported as changed and then be overwritten by the checkpoint's."""
    folder = tmp_path / "run"
    make(folder, trainer__steps=1, checkpoint__every=1).run()
    changes = {key: 0.07}
    if key == "weight":
        changes = {"rewards": rewards("red", "green")}
        changes["rewards"]["green"]["weight"] = 0.07
    try:
        resumed = make(folder, resume="latest", **changes)
    except ConfigError:
        return
    resumed.run()
    found = rows(folder)[-1]
    used = {
        "optimizer__lr": found["policy/lr"],
        "optimizer__weight_decay": resumed.learner.stepper.optimizer.param_groups[0][
            "weight_decay"
        ],
        "weight": found["weight/green"] / found["weight/red"],
    }
    assert used[key] == pytest.approx(0.07)


def test_a_folder_with_another_run_is_refused(tmp_path):
    folder = tmp_path / "run"
    make(folder, trainer__steps=1).run()
    with pytest.raises(ConfigError, match=r"^output_dir: .*another run.*--resume latest"):
        make(folder)
    with pytest.raises(ConfigError, match="'latest' needs a checkpoint"):
        make(tmp_path / "new", resume="latest")


# ---------------------------------------------------------------------- it fails well


class Failing(RewardHead):
    """Works when it is tried, and for two rollouts of two batches."""

    name = "failing"

    def __init__(self) -> None:
        self.calls = 0

    def score(self, batch):
        self.calls += 1
        if self.calls == 6:
            raise OSError("server gone")
        return batch.require_images()[:, 0].mean((1, 2))


def test_a_failing_head_saves_what_was_learned(tmp_path):
    trainer = make(tmp_path / "run")
    trainer.learner.scorer.heads["green"] = Failing()
    with pytest.raises(RewardError, match=r"failing.*OSError: server gone") as caught:
        trainer.run()
    saved = checkpoint.step_folder(tmp_path / "run", 2)
    assert caught.value.__notes__ == [f"The state after 2 rollouts is in {saved}."]
    assert checkpoint.find("latest", tmp_path / "run") == saved
    assert same(checkpoint.load_state(saved)["updater"]["trainable"]["drift"], drift(trainer))
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]

    straight = make(tmp_path / "straight")
    straight.learner.scorer.heads["green"] = Failing()
    straight.learner.scorer.heads["green"].calls = 10
    straight.run()
    resumed = make(tmp_path / "run", resume="latest")
    resumed.learner.scorer.heads["green"] = Failing()
    resumed.learner.scorer.heads["green"].calls = 10
    resumed.run()
    assert torch.equal(drift(resumed), drift(straight))


class Late(RewardHead):
    """Fails at a chosen call, and remembers how many samples it was given."""

    name = "late"

    def __init__(self, fails_at: int) -> None:
        self.fails_at, self.seen = fails_at, []

    def score(self, batch):
        self.seen.append(len(batch))
        if len(self.seen) == self.fails_at:
            raise OSError("no such thing")
        return batch.require_images()[:, 0].mean((1, 2))


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_reward_that_fails_before_anything_is_learned_leaves_the_folder_free(tmp_path, fails_at):
    """When it is tried on two samples, or in the first rollout."""
    folder = tmp_path / "run"
    trainer = make(folder)
    trainer.learner.scorer.heads["green"] = head = Late(fails_at)
    with pytest.raises(RewardError, match="OSError: no such thing") as caught:
        trainer.run()
    assert head.seen == [2, 8, 8][:fails_at]
    if fails_at == 1:  # there was nothing to save
        assert "__notes__" not in vars(caught.value)
        assert not (folder / "checkpoints").exists()
    assert not (folder / "metrics.jsonl").exists()
    make(folder).run()
    make(tmp_path / "straight").run()
    assert rows(folder) == rows(tmp_path / "straight")


def test_a_held_out_reward_is_tried_before_the_first_evaluation(tmp_path):
    trainer = make(
        tmp_path / "run", evaluation__every=2, evaluation__rewards=rewards("constant", "never")
    )
    trainer.heldout.scorer.heads["never"] = head = Late(1)
    generate, drawn = trainer.policy.generate, []

    def counted(requests):
        drawn.append(len(requests))
        return generate(requests)

    trainer.policy.generate = counted
    with pytest.raises(RewardError, match="no such thing"):
        trainer.run()
    assert (drawn, head.seen) == ([2], [2])


def test_trying_a_reward_leaves_the_global_generators_alone(tmp_path):
    class Drawing(RewardHead):
        name = "drawing"

        def score(self, batch):
            return torch.rand(len(batch)) + random.random() + numpy.random.rand()

    trainer = make(tmp_path / "run")
    trainer.learner.scorer.heads["green"] = Drawing()
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    trainer.learner.try_rewards()
    after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_metadata_that_lacks_is_told_before_the_policy_is_built(tmp_path, monkeypatch):
    def none_is_built(*arguments):
        pytest.fail("the policy was built")

    monkeypatch.setattr("moa_diffusion.assembly.trainers.policy", none_is_built)
    with pytest.raises(
        ConfigError, match=r"^rewards.tagged: The function `tagged\(images, .*`tag`"
    ):
        make(tmp_path / "run", rewards=rewards("tagged"))


# ---------------------------------------------------------------------- nothing to learn


def warnings_of(caplog) -> list[str]:
    return [r.message for r in caplog.records if r.name == "moa_diffusion.monitoring.lessons"]


def test_a_reward_that_never_differs_is_told_at_once_and_at_the_end(tmp_path, caplog):
    make(tmp_path / "run", rewards=rewards("red", "constant", "by_prompt")).run()
    first, second, *last = warnings_of(caplog)
    assert first.startswith("Nothing can be learned from the reward constant in the first rollout")
    assert "it is 0.1 for every sample" in first
    assert "by_prompt in the first rollout: it is equal for all samples of a prompt" in second
    assert [line.split(":")[0] for line in last] == [
        f"Nothing could be learned from the reward {name} in 4 of 4 rollouts"
        for name in ("constant", "by_prompt")
    ]


def test_a_reward_that_never_applies_is_told_at_the_end(tmp_path, caplog):
    make(tmp_path / "run", rewards=rewards("red", "nothing")).run()
    (last,) = warnings_of(caplog)
    assert last.startswith("Nothing could be learned from the reward nothing in 4 of 4 rollouts:")
    assert "NaN for every sample" in last


def test_a_reward_that_seldom_applies_is_judged_by_where_it_does(caplog):
    lessons = Lessons(("seldom", "rare"))
    for step in range(6):
        seldom = [0.5, 0.5] if step == 3 else [math.nan, math.nan]
        rare = [0.0, 1.0] if step == 3 else [math.nan, math.nan]
        values = torch.tensor([seldom, rare], dtype=torch.float64)
        matrix = RewardMatrix(
            names=("seldom", "rare"),
            values=values,
            groups=torch.zeros(2).long(),
            prompts=("a", "a"),
        )
        lessons.look(matrix, values.nan_to_num(), torch.ones(2), first=step == 0)
    lessons.report()
    (last,) = warnings_of(caplog)
    assert last.startswith("Nothing could be learned from the reward seldom in 1 of 6 rollouts:")


def test_a_run_that_learns_nothing_says_so(tmp_path, caplog):
    make(tmp_path / "run", rewards=rewards("constant")).run()
    found = warnings_of(caplog)
    assert found[1] == "This run learns nothing so far: every advantage of the first rollout is 0."
    assert found[-1].startswith("THIS RUN HAS LEARNED NOTHING: every advantage was 0 in all of its")


def test_a_run_that_learns_says_nothing(tmp_path, caplog):
    make(tmp_path / "run").run()
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("error", [RewardError, Interrupted])
def test_an_evaluation_cut_short_is_made_up(tmp_path, error):
    straight = make(tmp_path / "straight", evaluation__every=2)
    straight.run()
    trainer = make(tmp_path / "run", evaluation__every=2)
    generate, calls = trainer.policy.generate, []

    def fail_the_second_time(requests):
        calls.append(1)
        if len(calls) == 2:
            raise error("stop here")
        return generate(requests)

    trainer.policy.generate = fail_the_second_time
    with pytest.raises(error):
        trainer.run()
    assert checkpoint.find("latest", tmp_path / "run").name == "step-000002"
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1]
    for _ in range(2):  # a second resume finds the row written, and writes it once more
        resumed = make(
            tmp_path / "run",
            resume=str(checkpoint.step_folder(tmp_path / "run", 2)),
            evaluation__every=2,
        )
        resumed.run()
        assert rows(tmp_path / "run") == rows(tmp_path / "straight")
        assert score_files(tmp_path / "run") == score_files(tmp_path / "straight")


def test_an_update_cut_short_is_undone(tmp_path):
    """SIGTERM between the two optimizer steps of rollout 2: as if rollout 2 had not begun."""
    straight = make(tmp_path / "straight", trainer__steps=3)
    straight.run()
    trainer = make(tmp_path / "run", trainer__steps=3)
    trainer.learner.stepper.optimizer.register_step_post_hook(
        lambda *_: ask_to_stop() if trainer.learner.stepper.updates == 2 else None
    )
    with pytest.raises(Interrupted):
        trainer.run()
    assert trainer.completed == 1
    assert trainer.learner.stepper.updates == 2
    make(tmp_path / "run", trainer__steps=3, resume="latest").run()
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")
    assert score_files(tmp_path / "run") == score_files(tmp_path / "straight")


def broken_log_probs(trainer: Run, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    log_probs = trainer.policy.log_probs

    def wrapped(rollout, steps, *, with_kl=False):
        values, kl = log_probs(rollout, steps, with_kl=with_kl)
        return change(values), kl

    trainer.policy.log_probs = wrapped


@pytest.mark.parametrize("change", [lambda x: x + 1e-3, lambda x: x * math.nan])
def test_log_probs_that_differ_from_sampling_stop_the_run_at_once(tmp_path, change):
    trainer = make(tmp_path / "run", loss__ratio_tolerance=1e-4)
    broken_log_probs(trainer, change)
    with pytest.raises(TrainingError, match="not on-policy") as caught:
        trainer.run()
    message = str(caught.value)
    for part in ("1.00e-03" if "nan" not in message else "inf", "loss.ratio_tolerance", "Likely"):
        assert part in message
    assert trainer.completed == 0
    assert not drift(trainer).any()


def test_the_on_policy_check_looks_at_every_decision(tmp_path):
    trainer = make(tmp_path / "run", sampling__steps=3, loss__ratio_tolerance=1e-4)
    log_probs = trainer.policy.log_probs
    trainer.policy.log_probs = lambda rollout, steps, with_kl=False: (
        log_probs(rollout, steps)[0] + (5e-3 if steps.start == 2 else 0.0),
        None,
    )
    with pytest.raises(TrainingError, match=r"By decision.*'0.0e\+00', '0.0e\+00', '5.0e-03'"):
        trainer.run()


def test_a_decision_is_checked_when_a_rollout_first_has_it(tmp_path):
    """A window that moves to a step which is not on-policy stops the run there, not before."""
    trainer = make(tmp_path / "run", sampling__steps=3, loss__ratio_tolerance=1e-4)
    log_probs, asked = trainer.policy.log_probs, []

    def wrapped(rollout, steps, with_kl=False):
        number = windows[trainer.completed][steps.start]
        if not torch.is_grad_enabled():
            asked.append((trainer.completed, number))
        return log_probs(rollout, steps)[0] + (5e-3 if number == 7 else 0.0), None

    windows = {0: (0, 1, 2), 1: (1, 2, 3), 2: (0, 1, 2), 3: (2, 3, 7)}
    trainer.policy.log_probs = wrapped
    trainer.policy.trained_steps = windows.__getitem__
    with pytest.raises(TrainingError, match=r"By decision.*'0.0e\+00', '0.0e\+00', '5.0e-03'"):
        trainer.run()
    assert trainer.completed == 3
    assert asked == [(0, 0), (0, 1), (0, 2), (1, 3), (3, 7)]


def test_the_gap_before_any_update_is_logged_and_said_once(tmp_path, caplog):
    trainer = make(tmp_path / "run", loss__ratio_tolerance=1e-4)
    log_probs = trainer.policy.log_probs
    trainer.policy.log_probs = lambda rollout, steps, with_kl=False: (
        log_probs(rollout, steps)[0] + (2e-3 if torch.is_grad_enabled() else 0.0),
        None,
    )
    trainer.run()
    for row in rows(tmp_path / "run"):
        # A log-prob of about 1 plus 0.002, rounded by 1e-7: 6e-5 of the gap.
        assert row["policy/ratio_gap"] == pytest.approx(2e-3, rel=1e-3)
    assert caplog.text.count("before any update") == 1
    exact = make(tmp_path / "exact")
    exact.run()
    # Log-probs of about 1, of the same kernels in batches of another size: 16 roundings of float32.
    assert all(row["policy/ratio_gap"] < 1e-6 for row in rows(tmp_path / "exact"))


def scaled(trainer: Run, scale: float) -> None:
    trainer.learner.stepper.scaler = torch.amp.GradScaler(
        "cpu", init_scale=scale, growth_interval=2
    )


def overflow_above(trainer: Run, limit: float) -> None:
    """Gradients are infinite at a larger loss scale, as float16 has it."""
    trainer.policy.drift.register_hook(
        lambda gradient: (
            gradient * (math.inf if trainer.learner.stepper.loss_scale > limit else 1.0)
        )
    )


def test_a_loss_scale_that_falls_from_its_start_is_no_failure(tmp_path, caplog):
    trainer = make(tmp_path / "run", loss__max_skipped=1, trainer__steps=6)
    scaled(trainer, 2.0**24)
    overflow_above(trainer, 2.0**20)
    trainer.run()
    found = rows(tmp_path / "run")
    # Four fall, and every second update from then on tries twice the scale, which fails.
    assert [row["policy/skipped_updates"] for row in found] == [2, 2, 0, 1, 1, 0]
    scales = [math.log2(row["policy/loss_scale"]) for row in found]
    assert scales == [22, 20, 21, 20, 20, 21]
    assert "Update skipped" not in caplog.text
    assert drift(trainer).any()
    assert trainer.learner.stepper.skipped_in_a_row == 0


def test_at_the_usual_scale_a_skip_is_a_skip(tmp_path):
    trainer = make(tmp_path / "run", loss__max_skipped=3, trainer__steps=20)
    scaled(trainer, 2.0**18)
    overflow_above(trainer, 0.0)
    with pytest.raises(TrainingError, match="non-finite gradients"):
        trainer.run()
    assert trainer.completed == 3  # two updates may fall, three and the rollout's rest are counted


def test_the_loss_scale_is_resumed(tmp_path):
    ends = []
    for name, parts in (("straight", [6]), ("resumed", [3, 6])):
        for number, steps in enumerate(parts):
            trainer = make(
                tmp_path / name, trainer__steps=steps, resume="latest" if number else None
            )
            scaled(trainer, 2.0**24)
            if number:  # as it was built, the scaler had not been there
                trainer.load_state_dict(
                    checkpoint.load_state(checkpoint.find("latest", tmp_path / name))
                )
            overflow_above(trainer, 2.0**20)
            trainer.run()
        ends.append((state(trainer), rows(tmp_path / name)))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_float16_starts_with_a_scale_for_its_latents(tmp_path):
    from moa_diffusion.training.stepper import first_scale

    assert first_scale(16 * 64 * 64) == 2**28  # where a random model's error is below 0.01
    assert first_scale(1) == 2**16  # a text's tokens
    trainer = make(tmp_path / "run", policy__dtype="float16", optimizer__eps=1e-12)
    state = trainer.learner.stepper.scaler.state_dict()
    assert state["scale"] == first_scale(3)
    assert state["growth_interval"] == 50
    assert trainer.learner.stepper.optimizer.param_groups[0]["eps"] == 1e-12
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


def test_the_size_of_a_gradients_elements(tmp_path):
    found = make(tmp_path / "run").step()
    # A float32 norm and Python's division: within 1e-7.
    assert found["policy/grad_rms"] == pytest.approx(found["policy/grad_norm"] / math.sqrt(6))


def test_equal_steps_are_for_images(tmp_path):
    with pytest.raises(ConfigError, match=r"loss\.steps: should be plain for policy\.name toy"):
        settings(tmp_path / "run", loss__steps="equal")


def test_non_finite_gradients_skip_the_update_and_are_counted(tmp_path):
    trainer = make(tmp_path / "run")
    before = {}

    def spoil(values: torch.Tensor) -> torch.Tensor:
        if trainer.completed != 1 or not torch.is_grad_enabled():
            return values
        before.setdefault("drift", drift(trainer))
        before.setdefault("count", trainer.learner.stepper.ema.count)
        return values * math.nan

    broken_log_probs(trainer, spoil)
    at_rollout(trainer, 2, lambda: before.setdefault("after", drift(trainer)))
    trainer.run()
    found = rows(tmp_path / "run")
    assert [row["policy/skipped_updates"] for row in found] == [0, 2, 0, 0]
    assert found[1]["policy/grad_norm"] is None
    assert torch.equal(before["after"], before["drift"])
    assert trainer.learner.stepper.ema.count == before["count"] + 4
    assert drift(trainer).isfinite().all()


def test_many_skipped_updates_in_a_row_stop_the_run(tmp_path):
    trainer = make(tmp_path / "run", loss__max_skipped=3)
    broken_log_probs(trainer, lambda x: x * math.nan if torch.is_grad_enabled() else x)
    with pytest.raises(TrainingError, match="last 4 updates had non-finite gradients") as caught:
        trainer.run()
    assert trainer.completed == 2
    assert "step-000002" in caught.value.__notes__[0]
    assert not drift(trainer).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "names",
    [("red", "never"), ("never",), ("red", "sometimes"), ("constant",), ("red", "constant")],
)
def test_objectives_that_say_nothing_do_no_harm(tmp_path, method, names):
    trainer = make(
        tmp_path / "run",
        rewards=rewards(*names),
        **with_method(method),
        evaluation__every=2,
    )
    trainer.run()
    assert drift(trainer).isfinite().all()
    # Where no objective tells samples apart, nothing may move.
    assert bool(drift(trainer).any()) == ("red" in names)
    found = rows(tmp_path / "run")
    assert len(found) == 5
    if "never" in names:
        assert found[-1]["applies/never"] == 0
        assert found[-1]["reward_mean/never"] is found[-1]["eval_mean/never"] is None


def test_a_probe_that_is_not_finite_does_not_count(tmp_path, caplog):
    trainer = make(tmp_path / "run", **with_method("upgrad_probe"))
    trainer.learner.update.probe.measure = lambda *_: torch.full((2, 2), math.nan)
    trainer.run()
    assert drift(trainer).any()
    assert "not finite" in caplog.text


def test_a_target_that_turns_out_too_low_stops_the_run_saved(tmp_path):
    objectives = {"method": "apex", "weighting": {"targets": {"red": 0.0}, "warmup": 1}}
    trainer = make(tmp_path / "run", objectives=objectives)
    with pytest.raises(TrainingError, match=r"objectives.weighting: .*above the base level") as e:
        trainer.run()
    assert "The state after 0 rollouts" in e.value.__notes__[0]
    state = checkpoint.load_state(checkpoint.find("latest", tmp_path / "run"))
    assert state["weighting"]["seen"] == 0  # the rollout that failed left no trace


@pytest.mark.parametrize(
    ("method", "part", "before", "after"),
    [
        ("apex", "weighting", {"horizon": 3}, {"horizon": 4}),
        ("mopo", "normalizer", {"pool_size": 3}, {"pool_size": 4}),
        ("mopo", "weighting", {"primary": "red"}, {"primary": "green"}),
    ],
)
def test_a_resume_with_settings_that_do_not_fit_says_so(tmp_path, method, part, before, after):
    folder = tmp_path / "run"
    make(folder, trainer__steps=1, objectives={"method": method, part: before}).run()
    with pytest.raises(ConfigError, match=f"^resume: objectives.{part} has other settings"):
        make(folder, resume="latest", objectives={"method": method, part: after})


# ---------------------------------------------------------------------- evaluation


def test_evaluation_uses_the_average_and_gives_the_weights_back(tmp_path):
    trainer = make(tmp_path / "run", trainer__steps=3, evaluation__every=3)
    trainer.run()
    live = drift(trainer)
    expected = torch.sigmoid(trainer.learner.stepper.ema.average["drift"].sum(0))
    assert not torch.equal(trainer.learner.stepper.ema.average["drift"], live)
    found = trainer.evaluate()
    # Pixels in float32, rounded by 6e-8: pytest's default is 1e-6.
    assert found["eval_mean/red"] == pytest.approx(float(expected[0]))
    assert found["eval_mean/green"] == pytest.approx(float(expected[1]))
    assert found["eval_sem/red"] == pytest.approx(0, abs=1e-6)
    assert torch.equal(drift(trainer), live)
    evaluated = [row["step"] for row in rows(tmp_path / "run") if "eval_mean/red" in row]
    assert evaluated == [0, 3]
    assert [path.name for path in sorted((tmp_path / "run" / "samples").iterdir())] == [
        "step-000000.png",
        "step-000003.png",
    ]


def test_the_standard_error_counts_prompts_not_images():
    prompts = torch.tensor([0, 0, 0, 1, 1, 1])
    values = torch.tensor([1.0, 1, 1, 0, 0, 0]).double()
    mean, error = mean_and_error(values, prompts)
    assert (mean, error) == (0.5, pytest.approx(0.5))  # std of (1, 0) over the root of 2
    assert mean_and_error(values, torch.arange(6))[1] == pytest.approx((0.3 / 6) ** 0.5)
    gaps = torch.tensor([1, math.nan, math.nan, 0, 0, 0]).double()
    assert mean_and_error(gaps, prompts)[0] == 0.25
    assert math.isnan(mean_and_error(torch.full((2,), math.nan), prompts[:2])[0])
    assert math.isnan(mean_and_error(values[:3], prompts[:3])[1])


def test_evaluation_of_a_single_prompt(tmp_path):
    trainer = make(tmp_path / "run", evaluation__every=2, evaluation__prompts=1)
    assert len(trainer.heldout.requests) == 1
    found = trainer.evaluate()
    assert found["eval_mean/red"] == pytest.approx(0.5)
    assert not found["eval_sem/red"] > 0  # unknown or 0, but no made-up number


def test_heldout_requests_do_not_depend_on_the_runs_seed(tmp_path):
    one = settings(tmp_path / "one", evaluation__every=2, evaluation__images_per_prompt=2)
    two = settings(tmp_path / "two", evaluation__every=2, evaluation__images_per_prompt=2, seed=9)
    requests = assembly.heldout_requests(one)
    assert requests == assembly.heldout_requests(two)
    assert [request.prompt for request in requests] == ["a", "b", "c"] * 2
    assert len({request.seed for request in requests}) == 6


# ---------------------------------------------------------------------- built from names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": {"method": "dualstage"}}, "objectives.method: .*Did you mean 'dual_stage'"),
        (
            {"objectives": {"method": "gdpo", "normalizer": {"epsilon": 1}}},
            "objectives.normalizer.epsilon: unknown option of GDPO.*'eps'",
        ),
        (
            {"objectives": {"method": "dual_stage", "normalizer": {"floor": 3}}},
            r"objectives.normalizer: Parameter `floor` should be in \[0, 1\]",
        ),
        (
            {"objectives": {"method": "static", "weighting": {"weights": [1, 1]}}},
            "objectives.weighting.weights: unknown option of Static",
        ),
        ({"rewards": {"shapness": {}}}, "rewards.shapness: .*sharpness"),
        ({"rewards": {"red": {"path": "nowhere:f"}}}, "rewards.red: "),
        ({"rewards": {"sharpness": {"sigma": 2}}}, "rewards.sharpness: .*sigma"),
        ({"trainer__updates": 3}, r"4 \* 4 = 16 samples for 1 processes \* 3 updates"),
        ({"prompts__train": "no.txt"}, "`no.txt` does not exist"),
        ({"prompts__heldout": "no.txt", "evaluation__every": 1}, "`no.txt` does not exist"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"


def test_half_the_clip_range_is_the_tolerance_by_default(tmp_path):
    assert make(tmp_path / "a", loss__clip_range=1e-3).learner.steps.settings.tolerance == 5e-4
    told = make(tmp_path / "b", loss__clip_range=1e-3, loss__ratio_tolerance=1e-5)
    assert told.learner.steps.settings.tolerance == 1e-5


def test_a_checkpoint_is_written_at_the_end_in_any_case(tmp_path):
    trainer = make(tmp_path / "run", checkpoint__every=0)
    trainer.run()
    assert checkpoint.step_folder(tmp_path / "run", trainer.completed).is_dir()


def test_resuming_into_the_folder_of_another_run_is_refused(tmp_path):
    for name in ("one", "other"):
        make(tmp_path / name).run()
    saved = checkpoint.list_checkpoints(tmp_path / "one")[0]
    before = checkpoint.list_checkpoints(tmp_path / "other")
    with pytest.raises(ConfigError, match="Found another run"):
        make(tmp_path / "other", resume=str(saved))
    assert checkpoint.list_checkpoints(tmp_path / "other") == before
    assert make(tmp_path / "new", resume=str(saved)).completed > 0


def test_a_tracker_that_is_unknown_or_missing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'tensorboard'"):
        make(tmp_path / "run", log__trackers=["tensorbord"])
    with pytest.raises(ConfigError, match="pip install clearml"):
        make(tmp_path / "run", log__trackers=["clearml"])
