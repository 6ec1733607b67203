"""A rollout's step on a policy of six numbers: it learns, in any batches, and fails well."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import numpy
import pytest
import torch

from moa_diffusion.data.seeds import derive_seed
from moa_diffusion.scoring import RewardError
from moa_diffusion.storage import checkpoint
from moa_diffusion.storage.log import read_metrics
from moa_diffusion.training.stepper import TrainingError
from moa_diffusion.types import ConfigError, Request, RewardMatrix
from rewards import RewardHead
from toy_runs import (
    METHODS,
    drift,
    make,
    red,
    rewards,
    rows,
    score_files,
    settings,
    with_method,
)

# ---------------------------------------------------------------------- it learns


@pytest.mark.parametrize(
    ("method", "kl_weight"),
    # A KL goes through each kind of update: plain, with a probe, and fused.
    [*((method, 0.0) for method in METHODS), ("static", 0.01), ("apex", 0.01), ("upgrad", 0.01)],
)
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


def test_the_kl_is_brought_near_its_target(tmp_path):
    """From weights that are too small and too large, while it passes 20 targets by itself.

    It swings, by some factor: the policy answers to a weight some rollouts later.
    """
    options: dict[str, object] = {"loss__kl_target": 0.5, "trainer__steps": 60}
    for weight in (0.05, 5.0):
        folder = tmp_path / f"{weight}"
        make(folder, **options, loss__kl_weight=weight).run()
        kls = [row["policy/kl"] for row in rows(folder)]
        weights = [row["policy/kl_weight"] for row in rows(folder)]
        assert weights[0] == weight
        for before, after, kl in zip(weights, weights[1:], kls, strict=False):
            free = before * (1 + min(max(kl / 0.5 - 1, -0.2), 0.2))
            assert after == pytest.approx(min(max(free, weight / 100), 100 * weight))
        assert 0.2 < sum(kls[-30:]) / 30 / 0.5 < 5
    make(tmp_path / "free", loss__kl_weight=0.05, trainer__steps=60).run()
    assert rows(tmp_path / "free")[-1]["policy/kl"] > 10

    make(tmp_path / "half", **options | {"trainer__steps": 30}, loss__kl_weight=5.0).run()
    make(tmp_path / "half", **options, loss__kl_weight=5.0, resume="latest").run()
    assert rows(tmp_path / "half")[-1] == rows(tmp_path / "5.0")[-1]


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
    log_probs, kl, *_ = policy.log_probs(rollout, slice(0, 2), with_kl=True)
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


# ---------------------------------------------------------------------- weights from gradients


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


# ---------------------------------------------------------------------- it fails well


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


# ---------------------------------------------------------------------- signals that fail


def test_equal_steps_are_for_images(tmp_path):
    with pytest.raises(ConfigError, match=r"loss\.steps: should be plain for policy\.name toy"):
        settings(tmp_path / "run", loss__steps="equal")


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
        trainer__steps=2,
        evaluation__every=2,
    )
    trainer.run()
    assert drift(trainer).isfinite().all()
    # Where no objective tells samples apart, nothing may move.
    assert bool(drift(trainer).any()) == ("red" in names)
    found = rows(tmp_path / "run")
    assert len(found) == 3
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


def test_a_tracker_that_is_unknown_or_missing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'tensorboard'"):
        make(tmp_path / "run", log__trackers=["tensorbord"])
    with pytest.raises(ConfigError, match="pip install clearml"):
        make(tmp_path / "run", log__trackers=["clearml"])
