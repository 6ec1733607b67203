"""A run goes on as if nothing had interrupted it, and refuses what is not its own."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from moa_diffusion.processes.stopping import Interrupted
from moa_diffusion.scoring import RewardError
from moa_diffusion.storage import checkpoint
from moa_diffusion.types import ConfigError
from rewards import RewardHead
from toy_runs import (
    METHODS,
    ask_to_stop,
    at_rollout,
    drift,
    make,
    rewards,
    rows,
    same,
    score_files,
    state,
    with_method,
)


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
