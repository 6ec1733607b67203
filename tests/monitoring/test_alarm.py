"""Alarms: the rules on numbers, then what each action does to a run that games its reward."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from moa_diffusion import assembly
from moa_diffusion.config import check, from_dict
from moa_diffusion.config.schema import AlarmConfig
from moa_diffusion.monitoring import alarm
from moa_diffusion.monitoring.alarm import Watch
from moa_diffusion.monitoring.heldout import Evaluation
from moa_diffusion.storage import checkpoint
from moa_diffusion.storage.log import read_metrics
from moa_diffusion.training.loop import Run
from moa_diffusion.training.stepper import TrainingError
from moa_diffusion.types import ConfigError

NOISE = torch.randn(12, generator=torch.Generator().manual_seed(0)).double()


def evaluation(step: int, *, train: float, held: float, jitter: float = 0.1, **more) -> Evaluation:
    """Means on 12 samples of 4 prompts; what is paired differs by ``jitter`` times a pattern."""
    pattern = jitter * NOISE.roll(step)
    return Evaluation(
        step=step,
        names=("a", "held"),
        values=torch.stack([NOISE + train + pattern, NOISE + held + pattern]),
        prompts=torch.arange(4).repeat_interleave(3),
        statistics=more.get("statistics", {}),
        gaps=more.get("gaps", {}),
        metrics={},
    )


def alarms(watch: Watch, course: list[tuple[float, float]]) -> list[alarm.Alarm]:
    return [
        found
        for step, (train, held) in enumerate(course)
        for found in watch.look(evaluation(step, train=train, held=held))
    ]


def watch(**rules) -> Watch:
    return Watch(["a"], ["held"], AlarmConfig(**rules))


HACKED = [(0, 0), (1, 1), (2, 0.5), (3, -1), (4, -2)]


def test_training_up_and_held_out_down_twice_in_a_row():
    found = alarms(watch(), HACKED)
    assert [(one.step, one.kind, one.name, one.action) for one in found] == [
        (3, "reward_hack", "held", "warn")
    ]
    one = found[0]
    assert (one.best_step, one.to_step, one.risen) == (1, None, "a")
    # Noise that is rolled keeps its mean; float64.
    assert one.fall == pytest.approx(-2)
    pooled = torch.cat([NOISE + 1 + 0.1 * NOISE.roll(1), NOISE + 3 + 0.1 * NOISE.roll(3)])
    assert one.rise == pytest.approx(2 / float(pooled.std(correction=0)))
    assert "since rollout 1" in one.message
    assert json.loads(json.dumps(one.row()))["fall"] == one.fall


@pytest.mark.parametrize(
    "course",
    [
        [(0, 0), (1, 1), (2, 2), (3, 3)],  # both up
        [(0, 0), (-1, -1), (-2, -2), (-3, -3)],  # both down: no gaming
        [(0, 0), (1, -1), (2, 0.5), (3, -1), (4, 1)],  # never twice in a row
        [(0, 0), (1, -0.01), (2, -0.01), (3, -0.01)],  # within the noise
    ],
)
def test_no_alarm(course):
    assert alarms(watch(), course) == []


def test_the_loudest_objective_may_rise_alone():
    one = Watch(["quiet", "a"], ["held"], AlarmConfig(patience=1))
    for step, expected in ((0, []), (1, ["a"])):
        found = evaluation(step, train=step, held=-step)
        row = Evaluation(
            step=step,
            names=("quiet", "a", "held"),
            values=torch.cat([found.values[:1] - 9 * step, found.values]),
            prompts=found.prompts,
            statistics={},
            gaps={},
            metrics={},
        )
        assert [alarm.risen for alarm in one.look(row)] == expected


def test_patience_and_standard_errors():
    assert [one.step for one in alarms(watch(patience=1), HACKED)] == [2, 3, 4]
    assert [one.step for one in alarms(watch(patience=3), HACKED)] == [4]
    assert alarms(watch(z=1000), HACKED) == []


def test_what_is_reported_is_the_row_of_suspicions():
    one = watch(patience=9)
    seen = []
    for step, (train, held) in enumerate(HACKED):
        one.look(evaluation(step, train=train, held=held))
        seen.append(one.report()["alarm/held"])
    assert seen == [0, 0, 1, 2, 3]


def test_rollback_names_the_best_evaluation_and_the_limit_ends_the_run():
    one = watch(action="rollback", patience=1, limit=2, kl_factor=3)
    assert [(found.step, found.to_step) for found in alarms(one, HACKED[:4])] == [(2, 1), (3, 1)]
    assert one.best_steps == {1}
    assert not one.over
    assert one.kl_scale == 9
    (last,) = one.look(evaluation(4, train=4, held=-2))
    assert (last.action, last.to_step) == ("rollback", 1)
    assert "The run ends." in last.message
    assert one.over


def test_a_best_evaluation_of_weights_that_are_given_up_does_not_count():
    one = Watch(["a"], ["held", "other"], AlarmConfig(action="rollback", patience=1))
    for step, (train, held, other) in enumerate([(0, 0, 0), (1, -1, 1)]):
        found = evaluation(step, train=train, held=held)
        values = torch.cat([found.values, found.values[:1] * 0 + NOISE + other])
        row = Evaluation(
            step=step,
            names=("a", "held", "other"),
            values=values,
            prompts=found.prompts,
            statistics={},
            gaps={},
            metrics={},
        )
        one.look(row)
    assert one.best_steps == {0}


def three(step: int, train: float, one: float, other: float) -> Evaluation:
    """An evaluation with two held-out rewards."""
    found = evaluation(step, train=train, held=one)
    return Evaluation(
        step=step,
        names=("a", "held", "other"),
        values=torch.cat([found.values, (NOISE + other + 0.1 * NOISE.roll(step))[None]]),
        prompts=found.prompts,
        statistics={},
        gaps={},
        metrics={},
    )


def test_of_two_alarms_at_once_the_clearer_is_acted_upon():
    one = Watch(["a"], ["held", "other"], AlarmConfig(action="rollback", patience=2, kl_factor=3))
    course = [(0, 0, 0), (1, 1, -1), (2, -1, -2), (3, -2, -3)]
    found = [
        (alarm.step, alarm.name, alarm.action, alarm.to_step)
        for step, means in enumerate(course)
        for alarm in one.look(three(step, *means))
    ]
    assert found == [(2, "other", "rollback", 0)]
    assert one.kl_scale == 3
    both = Watch(["a"], ["held", "other"], AlarmConfig(action="rollback", patience=1))
    both.look(three(0, 0, 0, 0))
    alarms = both.look(three(1, 1, -1, -4))
    assert [(alarm.name, alarm.action) for alarm in alarms] == [
        ("other", "rollback"),
        ("held", "warn"),
    ]


def test_a_held_out_reward_that_begins_with_nothing_is_watched_later(caplog):
    one = watch(patience=1)
    assert one.look(evaluation(0, train=0, held=math.nan)) == []
    assert "Held-out reward held applies to 0 prompts" in caplog.text
    assert one.best_steps == set()
    assert one.look(evaluation(1, train=1, held=1)) == []
    assert one.best_steps == {1}
    assert one.look(evaluation(2, train=2, held=math.nan)) == []
    assert [alarm.step for alarm in one.look(evaluation(3, train=3, held=-1))] == [3]


def test_raise_kl_until_the_limit():
    one = watch(action="raise_kl", patience=1, limit=1, kl_factor=4)
    found = alarms(one, HACKED)
    assert [alarm.action for alarm in found] == ["raise_kl", "stop", "stop"]
    assert one.kl_scale == 4
    assert one.over


def test_a_watch_goes_on_where_it_was_saved():
    straight, first = watch(), watch()
    expected = alarms(straight, HACKED)
    for step, (train, held) in enumerate(HACKED[:3]):
        first.look(evaluation(step, train=train, held=held))
    second = watch()
    second.load_state_dict(first.state_dict())
    found = [
        one
        for step, (train, held) in list(enumerate(HACKED))[3:]
        for one in second.look(evaluation(step, train=train, held=held))
    ]
    assert found == expected


def test_drift_and_gap_are_said_once_until_they_are_over():
    one = watch()
    said = []
    for step, (brightness, gap) in enumerate([(0, 0), (9, 9), (9, 9), (0, 0), (-9, 9)]):
        found = evaluation(
            step,
            train=0,
            held=0,
            statistics={"brightness": NOISE + brightness, "plain": torch.zeros(12).double()},
            gaps={"a": gap},
        )
        said.append([alarm.kind for alarm in one.look(found)])
    assert said == [[], ["drift", "rollout_gap"], [], [], ["drift", "rollout_gap"]]
    quiet = watch(drift=0, gap=0)
    for step in range(2):
        moved = {"brightness": NOISE + 50 * step}
        found = evaluation(step, train=0, held=0, statistics=moved, gaps={"a": 50.0})
        assert quiet.look(found) == []


def test_an_objective_that_does_not_apply_is_left_out_of_the_rise():
    one = Watch(["none", "a"], ["held"], AlarmConfig(patience=1))
    for step, expected in ((0, []), (1, ["reward_hack"])):
        found = evaluation(step, train=step, held=-step)
        row = Evaluation(
            step=step,
            names=("none", "a", "held"),
            values=torch.cat([torch.full((1, 12), math.nan).double(), found.values]),
            prompts=found.prompts,
            statistics={},
            gaps={},
            metrics={},
        )
        assert [alarm.kind for alarm in one.look(row)] == expected


# ---------------------------------------------------------------------- in a run


def red(images, prompts):
    return images[:, 0].mean((1, 2))


def not_red(images, prompts):
    """What a person would say, who never wanted everything to turn red."""
    return 1 - images[:, 0].mean((1, 2))


STATISTICS = ("brightness", "saturation", "contrast", "high_frequency")


def make(folder: Path, resume: str | None = None, **changes) -> Run:
    """A run of the toy that raises ``red`` while ``not_red`` watches."""
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a\nb\nc\n")
    values: dict = {
        "output_dir": str(folder),
        "resume": resume,
        "policy": {"name": "toy"},
        "sampling": {"steps": 2},
        "prompts": {"train": str(prompts), "heldout": str(prompts)},
        "rewards": {"red": {"path": f"{__file__}:red"}},
        "objectives": {"method": "dual_stage"},
        "loss": {"clip_range": 0.2},
        "optimizer": {"lr": 0.03},
        "ema": {"decay": 0.0, "every": 1},
        "trainer": {
            "steps": 6,
            "groups": 4,
            "group_size": 4,
            "updates": 2,
            "sample_batch": 8,
            "micro_batch": 8,
        },
        "checkpoint": {"every": 0, "keep": 1},
        "evaluation": {"every": 1, "rewards": {"not_red": {"path": f"{__file__}:not_red"}}},
        "log": {"trackers": []},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    settings = from_dict(values)
    check(settings)
    trainer = assembly.trainer(settings)
    trainer.progress.bars = False
    return trainer


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder / "metrics.jsonl")]


def told(folder: Path) -> list[dict]:
    found = read_metrics(folder / "alarms.jsonl")
    return [row for row in found if row["kind"] == "reward_hack"]


def drift(trainer: Run) -> torch.Tensor:
    return trainer.policy.trainable()["drift"].detach().clone()


def test_warn_trains_on_and_evaluates_the_held_out_reward(tmp_path):
    trainer = make(tmp_path / "run")
    trainer.run()
    assert steps(tmp_path / "run") == list(range(7))
    assert [row["step"] for row in told(tmp_path / "run")] == [2, 4, 6]
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    # Two means of float32 scores: within 1e-7.
    assert last["eval_mean/red"] + last["eval_mean/not_red"] == pytest.approx(1)
    assert "reward_mean/not_red" not in last
    assert "weight/not_red" not in last
    noted = json.loads((tmp_path / "run" / "rewards.json").read_text())
    assert list(noted[0]["heads"]) == ["red", "not_red"]
    plain = make(tmp_path / "plain", evaluation__rewards={})
    plain.run()
    assert torch.equal(drift(plain), drift(trainer))


def test_stop_ends_the_run_and_only_another_action_lets_it_go_on(tmp_path, caplog):
    folder = tmp_path / "run"
    make(folder, alarm__action="stop").run()
    assert steps(folder) == [0, 1, 2]
    assert checkpoint.find("latest", folder).name == "step-000002"
    assert told(folder)[0]["action"] == "stop"
    make(folder, resume="latest", alarm__action="stop").run()
    assert "An alarm ended this run after 2 rollouts" in caplog.text
    assert steps(folder) == [0, 1, 2]
    make(folder, resume="latest", alarm__action="warn").run()
    assert steps(folder) == list(range(7))


def test_raise_kl_pulls_back_harder(tmp_path):
    changes = {"loss__kl_weight": 0.01, "trainer__steps": 3}
    trainer = make(tmp_path / "run", alarm__action="raise_kl", alarm__kl_factor=1e4, **changes)
    trainer.run()
    assert told(tmp_path / "run")[0]["action"] == "raise_kl"
    assert trainer.watch.kl_scale == 1e4
    free = make(tmp_path / "free", **changes)
    free.run()
    assert drift(trainer)[:, 0].sum() < drift(free)[:, 0].sum()
    resumed = make(
        tmp_path / "run", resume="latest", alarm__action="raise_kl", alarm__kl_factor=1e4, **changes
    )
    assert resumed.watch.kl_scale == 1e4


def test_raise_kl_reaches_weights_solved_at_every_step(tmp_path):
    """The fused update has a KL term of its own."""
    changes = {"loss__kl_weight": 0.01, "objectives__method": "mgda", "trainer__steps": 1}
    one, ten = (make(tmp_path / name, **changes) for name in ("one", "ten"))
    for trainer, scale in ((one, 1.0), (ten, 1e4)):
        trainer.policy.trainable()["drift"].data[:] = 0.5
        trainer.watch.kl_scale = scale
        trainer.run()
    assert drift(ten)[:, 1:].abs().sum() < drift(one)[:, 1:].abs().sum()


def test_rollback_goes_back_and_ends_at_the_best_weights(tmp_path, capsys):
    """The held-out reward is best before training, so that is where every alarm goes back to."""
    folder = tmp_path / "run"
    trainer = make(folder, alarm__action="rollback", alarm__limit=1, trainer__steps=9)
    trainer.run()
    assert steps(folder) == [0, 1, 2, 3, 4]  # the second alarm is one more than the limit
    said = capsys.readouterr().out
    assert "\nEnded by an alarm: 4 of 9 rollouts, " in said
    assert ") after 2 rollouts, back to those after 0; reward_hack (" in said
    assert [(row["step"], row["to_step"]) for row in told(folder)] == [(2, 0), (4, 0)]
    assert torch.equal(drift(trainer), torch.zeros(2, 3))
    assert trainer.learner.stepper.updates == 0
    means = [row["eval_mean/red"] for row in read_metrics(folder / "metrics.jsonl")]
    assert means[3] < means[2]  # after going back
    front = json.loads((folder / "front.json").read_text())["checkpoints"]
    assert [(row["step"], row["kept_for"]) for row in front] == [
        (0, ["front", "best"]),
        (4, ["last", "front"]),
    ]
    assert front[0]["means"] == front[1]["means"]
    saved = checkpoint.load_state(checkpoint.find("latest", folder))
    assert torch.equal(saved["updater"]["trainable"]["drift"], torch.zeros(2, 3))
    make(folder, resume="latest", alarm__action="warn", trainer__steps=5).run()
    assert steps(folder)[-1] == 5


def test_a_run_cut_short_goes_back_just_the_same(tmp_path):
    changes = {"alarm__action": "rollback", "trainer__steps": 5, "checkpoint__keep": 0}
    straight = make(tmp_path / "straight", **changes)
    straight.run()
    make(tmp_path / "run", **changes | {"trainer__steps": 3}).run()
    resumed = make(tmp_path / "run", resume="latest", **changes)
    resumed.run()
    assert torch.equal(drift(resumed), drift(straight))
    assert told(tmp_path / "run") == told(tmp_path / "straight")
    assert steps(tmp_path / "run") == steps(tmp_path / "straight")


def test_a_checkpoint_to_go_back_to_that_is_gone_is_told(tmp_path, caplog):
    trainer = make(tmp_path / "run", alarm__action="rollback")
    target = checkpoint.step_folder(tmp_path / "run", 0)
    trainer.log.write_alarm = lambda row: shutil.rmtree(target)
    with pytest.raises(TrainingError, match=r"alarm: cannot go back: .*step-000000"):
        trainer.run()
    resumed = make(tmp_path / "run", resume="latest", alarm__action="rollback")
    resumed.run()
    assert "There are no checkpoints after 0 rollouts to go back to" in caplog.text
    assert steps(tmp_path / "run") == list(range(7))


def test_a_run_that_goes_on_in_another_folder_forgets_what_is_not_there(tmp_path, caplog):
    make(tmp_path / "run", alarm__action="rollback", trainer__steps=1).run()
    latest = str(checkpoint.find("latest", tmp_path / "run"))
    make(tmp_path / "other", resume=latest, alarm__action="rollback", trainer__steps=3).run()
    assert "There are no checkpoints after 0 rollouts" in caplog.text
    assert steps(tmp_path / "other") == [2, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"evaluation__images_per_prompt": 3},
        {"evaluation__seed": 7},
        {"evaluation__steps": 3},
        {"evaluation__rewards": {}},
    ],
)
def test_evaluations_of_another_kind_are_not_compared(tmp_path, caplog, change):
    make(tmp_path / "run", trainer__steps=3).run()
    resumed = make(tmp_path / "run", resume="latest", **change)
    assert "Evaluations have other prompts, seeds, rewards or drawing settings" in caplog.text
    resumed.run()
    assert [row["step"] for row in told(tmp_path / "run")][:1] == [2]
    assert steps(tmp_path / "run") == list(range(7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alarm__action": "raise_kl"}, r"^alarm: .*another than raise_kl while `loss.kl_weight`"),
        (
            {"alarm__action": "stop", "evaluation__rewards": {}},
            r"^alarm: .*should be warn without held-out rewards",
        ),
        ({"alarm__action": "stop", "evaluation__every": 0}, r"^alarm: .*should be warn without"),
        ({"evaluation__prompts": 1}, r"^alarm: .*at least 2 held-out prompts.*Found 1"),
        ({"alarm__patience": 0}, r"^alarm.patience: should be at least 1"),
        (
            {"evaluation__rewards": {"red": {}}},
            r"^evaluation.rewards.red: should have another name",
        ),
        (
            {"evaluation__rewards": {"blue": {"head": "ocrr"}}},
            r'^evaluation.rewards.blue: Unknown reward head "ocrr"',
        ),
        ({"evaluation__rewards": {"blue": 3}}, r"^evaluation.rewards.blue: should be a mapping"),
    ],
)
def test_rules_that_cannot_be_kept(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_an_unknown_action():
    with pytest.raises(ValueError, match=r"(?s)action.*'warn', 'stop', 'raise_kl' or 'rollback'"):
        AlarmConfig(action="panic")  # type: ignore[arg-type]


def test_deployed_outputs_are_compared_with_rollouts(tmp_path):
    """A noisy rollout of the toy scores about what its mean does; a crippled one far less."""
    make(tmp_path / "run", trainer__steps=1).run()
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert abs(row["eval_gap/red"]) < 0.3  # 0.04 from the seed, and more than 1 if crippled
    assert "eval_gap/not_red" not in row
    make(tmp_path / "none", trainer__steps=1, evaluation__rollout_images=0).run()
    assert "eval_gap/red" not in read_metrics(tmp_path / "none" / "metrics.jsonl")[0]


def test_statistics_of_rollouts_and_evaluations(tmp_path):
    make(tmp_path / "run", trainer__steps=1, evaluation__images_per_prompt=2).run()
    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert first["eval_image/brightness"] == pytest.approx(0.5)  # float32: within 1e-7
    assert first["eval_image/diversity"] == 0  # the toy's deployed images are all alike
    assert second["image/diversity"] > 0
    assert {"image/saturation", "image/contrast", "image/high_frequency"} <= second.keys()
    assert math.isfinite(second["eval_image/brightness"])
